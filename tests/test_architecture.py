"""The import rules of the rooms, and what may stand nowhere in the packages.

A room is a folder of modules (``evaluators.engine``). The rules are those of docs/architecture.md.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("search", "quantizers", "evaluators", "exporters", "workers", "bitgenome")
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_MODULES = 20  # of one folder

COMMON = "bitgenome.common"  # may be imported by all, and imports none of the others
MAY_IMPORT = {  # package -> rooms or modules of other packages, by prefix
    "search": (COMMON, "quantizers.formats.table"),
    "quantizers": (COMMON,),
    "evaluators": (COMMON, "search", "quantizers"),
    "exporters": (COMMON, "search", "quantizers", "evaluators.model.families", "evaluators.data.tokenizer"),
    "workers": (COMMON,),
    "bitgenome": PACKAGES,
}
ONLY_IN = {  # third-party package -> where it may be imported, by path prefix; bitgenome/ may import all
    "ray": ("workers/cluster/",),
    "deap": ("search/strategies/genetic.py",),
    "optuna": ("search/strategies/optuna_tpe.py",),
    "gguf": ("exporters/", "quantizers/formats/table.py", "quantizers/formats/codebooks.py"),
    "transformers": ("evaluators/", "exporters/opening/"),
    "torch": ("quantizers/", "evaluators/", "exporters/", "workers/"),
}
SEARCH_MAY_IMPORT = {"numpy", "scipy", "deap", "optuna", "pydantic", *PACKAGES, *sys.stdlib_module_names}
DEVICE_SELECTION = "bitgenome/common/devices.py"
BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


@cache
def imports(module: str) -> tuple[str, ...]:
    """Dotted names of everything ``module`` imports, also inside functions."""
    found: list[str] = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(found)


def top(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))


def module_of(name: str) -> str:
    """The module of ours that a dotted name is, or is in; a package stands for its ``__init__``."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return ".".join(parts[:length])
        if (path / "__init__.py").is_file():
            return ".".join([*parts[:length], "__init__"])
    raise AssertionError(f"{name} is imported and is not there")


def room_of(name: str) -> str:
    """The folder of a module."""
    return name.rpartition(".")[0]


def circle(needs: Mapping[str, set[str]]) -> list[str]:
    """Names that need each other in a circle; empty where there is none."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_packages_import_only_those_below_them() -> None:
    wrong = [
        f"{module}: {name}"
        for module in MODULES
        for name in imports(module)
        if top(name) in PACKAGES
        and not any(
            within(name, prefix) for prefix in (top(module.replace("/", ".")), *MAY_IMPORT[module.split("/")[0]])
        )
    ]
    assert not wrong


def test_the_common_room_imports_no_other() -> None:
    modules = [module for module in MODULES if module.startswith(COMMON.replace(".", "/"))]
    found = {name for module in modules for name in imports(module) if top(name) in PACKAGES}
    assert modules and all(within(name, COMMON) for name in found)


def test_neither_modules_nor_rooms_import_each_other_in_a_circle() -> None:
    modules: dict[str, set[str]] = {}
    rooms: defaultdict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        own = module.removesuffix(".py").replace("/", ".")
        modules[own] = {module_of(name) for name in imports(module) if top(name) in PACKAGES} - {own}
        rooms[room_of(own)] |= {room_of(name) for name in modules[own]} - {room_of(own)}
    assert len(rooms) > len(PACKAGES)
    assert circle(modules) == []
    assert circle(rooms) == []


def test_no_room_is_crowded() -> None:
    counts: defaultdict[Path, int] = defaultdict(int)
    for path in (*(ROOT / module for module in MODULES), *(ROOT / "tests").rglob("*.py")):
        counts[path.parent] += path.name != "__init__.py"
    assert max(counts.values()) <= MOST_MODULES


def test_third_party_packages_stay_in_their_place() -> None:
    wrong = [
        f"{module}: {name}"
        for module in MODULES
        for name in imports(module)
        if not module.startswith(("bitgenome/", *ONLY_IN.get(top(name), (module,))))
    ]
    assert not wrong


def test_the_search_needs_only_numpy_scipy_and_pydantic_beside_its_libraries() -> None:
    found = {top(name) for module in MODULES if module.startswith("search/") for name in imports(module)}
    assert found <= SEARCH_MAY_IMPORT


def test_nothing_is_unpickled_and_no_text_is_executed() -> None:
    for module in MODULES:
        assert not BANNED_MODULES & {top(name) for name in imports(module)}, module
        assert not BANNED_CALLS & {ast.unparse(call.func) for call in calls(module)}, module


def test_transformers_loads_nothing_with_a_models_own_code() -> None:
    loads = [
        (module, {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords})
        for module in MODULES
        for call in calls(module)
        if ast.unparse(call.func).split(".")[-1] in ("from_pretrained", "from_config")
    ]
    assert loads
    assert [module for module, given in loads if given.get("trust_remote_code") != "False"] == []


def test_devices_are_named_only_where_they_are_chosen() -> None:
    wrong = []
    for module in MODULES:
        tree = tree_of(module)
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        if module != DEVICE_SELECTION:
            wrong += [f"{module}:{n.lineno}" for n in texts if "cuda" in n.value.lower() and id(n) not in prose]
    assert not wrong


def test_the_rules_see_every_package() -> None:
    assert {module.split("/", maxsplit=1)[0] for module in MODULES} == set(PACKAGES)
