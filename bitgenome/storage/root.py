"""The storage path is a border: what a run reads as its own artefacts and where it writes lies inside."""

from pathlib import Path

from bitgenome.common.errors import UserError


def check_inside(path: Path, root: Path, what: str) -> Path:
    """``path``, which ``what`` names. Raises UserError if it is not below ``root``, links followed."""
    if root.resolve() not in path.resolve().parents:
        raise UserError(f"expected {what} inside the storage path {root}, found {path.resolve()}")
    return path
