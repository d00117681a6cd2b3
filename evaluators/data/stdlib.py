"""This module reads text that every Python installation has: the sources of its standard library."""

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from bitgenome.common.errors import UserError

SPLITS = ("calibration", "search", "validation", "test")
# Tests and site-packages are not in every installation; the encodings are generated tables.
EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__", "ensurepip"}
)


def stdlib_root() -> Path:
    """Return the directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def read_modules(modules: Sequence[str]) -> dict[str, str]:
    """Return the source text of single-file standard library modules, by name, in the order given.

    Modules that this interpreter does not ship are missing from the result.
    """
    root = stdlib_root()
    files = {name: root / f"{name}.py" for name in modules}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}


def load_held_out(splits_file: Path) -> dict[str, list[str]]:
    """Return the names of held-out modules by split, read from ``splits_file`` (a model's ``splits.json``).

    Raises UserError if the file does not list modules for every split.
    """
    try:
        splits: dict[str, list[str]] = json.loads(splits_file.read_text(encoding="utf-8"))
        if not all(isinstance(splits[split], list) for split in SPLITS):
            raise TypeError
        return {split: list(splits[split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"expected lists of modules for {', '.join(SPLITS)} in {splits_file}, found none") from None


def training_documents(held_out: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the library, source) of every library file that is not held out, in sorted order.

    ``held_out`` lists names of top-level modules and packages. Files in EXCLUDED_DIRECTORIES are left out too.
    """
    root = stdlib_root()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if EXCLUDED_DIRECTORIES.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if relative.parts[0].removesuffix(".py") in held_out:
            continue
        yield relative.as_posix(), file.read_text(encoding="utf-8", errors="replace")
