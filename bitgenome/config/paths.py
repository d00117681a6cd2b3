"""Defines the types of paths in settings; a leading ~ is the home folder in all of them."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expanded(path: Path) -> Path:
    """Return ``path`` with a leading ~ or ~user replaced. Raises ValueError if there is no such home folder."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"expected a path, found {path}: {path.parts[0]} is no user with a home folder") from None


def expanded_text(path: str) -> str:
    """Return a text that may be a path, as ``expanded`` does; any other, such as a URL, as it is."""
    return str(expanded(Path(path))) if path.startswith("~") else path


UserPath = Annotated[Path, AfterValidator(expanded)]
UserPathOrName = Annotated[str, AfterValidator(expanded_text)]  # such as a model: a folder, an id or a URL
