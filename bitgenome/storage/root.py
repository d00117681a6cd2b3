"""Checks that what a run reads as its own artefacts, and where it writes, is inside the storage path."""

from pathlib import Path

from bitgenome.common.errors import UserError


def check_inside(path: Path, root: Path, what: str, remedy: str = "") -> Path:
    """Return ``path``, which ``what`` names in errors. Raises UserError unless it is below ``root``, links followed."""
    if root.resolve() not in path.resolve().parents:
        raise UserError(f"expected {what} inside the storage path {root}, found {path.resolve()}{remedy}")
    return path
