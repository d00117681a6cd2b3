"""Reads JSON files that a user provides, and says in one sentence what is wrong with one."""

import json
from pathlib import Path
from typing import Any

from bitgenome.common.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
KINDS = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number", type(None): "null"}


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in the JSON file ``path``.

    Raises UserError for a file that is missing, cannot be read, was never fetched from Git LFS, or holds no object.
    """
    refuse_lfs_pointer(path)
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"expected a readable JSON file at {path}, found: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"expected JSON in {path}, found: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"expected a JSON object in {path}, found {KINDS[type(found)]}")
    return found


def refuse_lfs_pointer(path: Path) -> None:
    """Raise UserError if ``path`` holds the name of a file in Git LFS in place of its content."""
    try:
        with path.open("rb") as stream:
            pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # whoever reads it says so
    if pointer:
        raise UserError(
            f"expected the content of {path}, found a Git LFS pointer: fetch it with git lfs pull in {path.parent}"
        )
