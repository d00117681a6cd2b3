"""The import table of the design, and what may stand nowhere in the packages."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("search", "quantizers", "evaluators", "exporters", "workers", "bitgenome")
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MAY_IMPORT = {  # package -> modules of other packages, by prefix
    "search": ("quantizers.formats",),
    "quantizers": (),
    "evaluators": ("search", "quantizers"),
    "exporters": ("search", "quantizers"),
    "workers": ("search", "quantizers", "evaluators"),
    "bitgenome": PACKAGES,
}
ONLY_IN = {  # third-party package -> where it may be imported, by path prefix; bitgenome/ may import all
    "ray": ("workers/",),
    "deap": ("search/strategies/genetic.py",),
    "optuna": ("search/strategies/optuna_tpe.py",),
    "gguf": ("exporters/", "quantizers/formats.py", "quantizers/codebooks.py"),
    "transformers": ("evaluators/", "exporters/tokenizer.py"),
    "torch": ("quantizers/", "evaluators/", "exporters/", "workers/"),
}
SEARCH_MAY_IMPORT = {"numpy", "scipy", "deap", "optuna", *PACKAGES, *sys.stdlib_module_names}
DEVICE_SELECTION = "evaluators/devices.py"
BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


def imports(module: str) -> Iterator[str]:
    """Dotted names of everything ``module`` imports, also inside functions."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_only_those_below_them(module: str) -> None:
    package = module.split("/", maxsplit=1)[0]
    allowed = (package, *MAY_IMPORT[package])
    wrong = [
        name
        for name in imports(module)
        if name.split(".", maxsplit=1)[0] in PACKAGES and not any(within(name, prefix) for prefix in allowed)
    ]
    assert not wrong, f"{package}/ may import {', '.join(allowed)}, found {', '.join(wrong)}"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_packages_stay_in_their_place(module: str) -> None:
    wrong = [
        name
        for name in imports(module)
        if not module.startswith(("bitgenome/", *ONLY_IN.get(name.split(".", maxsplit=1)[0], (module,))))
    ]
    assert not wrong, f"{module} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("search/")])
def test_the_search_needs_only_numpy_and_scipy_beside_its_libraries(module: str) -> None:
    assert {name.split(".", maxsplit=1)[0] for name in imports(module)} <= SEARCH_MAY_IMPORT


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_and_no_text_is_executed(module: str) -> None:
    assert not BANNED_MODULES & {name.split(".", maxsplit=1)[0] for name in imports(module)}
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)}
    assert not BANNED_CALLS & called


@pytest.mark.parametrize("module", MODULES)
def test_transformers_loads_nothing_with_a_models_own_code(module: str) -> None:
    loads = [
        call
        for call in ast.walk(tree_of(module))
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("from_pretrained", "from_config")
    ]
    given = [{keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} for call in loads]
    assert all(keywords.get("trust_remote_code") == "False" for keywords in given)


@pytest.mark.parametrize("module", MODULES)
def test_devices_are_named_only_where_they_are_chosen(module: str) -> None:
    if module == DEVICE_SELECTION:
        return
    tree = tree_of(module)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    assert not [n.lineno for n in texts if "cuda" in n.value.lower() and id(n) not in prose]


def test_the_rules_see_every_package() -> None:
    found = {module.split("/", maxsplit=1)[0] for module in MODULES}
    assert found == set(PACKAGES)
