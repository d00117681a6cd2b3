"""Computes the digests by which artefacts are named and found."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitgenome.common.remembered import Found, found_in


def digest_of(*parts: Any) -> str:
    """Return the sha256 (hexadecimal) of ``parts`` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str | None:
    """Return the sha256 (hexadecimal) of a file's content, or None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests_of_files(files: Sequence[Path], group: Path) -> dict[Path, str]:
    """Return the sha256 (hexadecimal) of those ``files`` that exist; one that has not changed is not read again.

    ``group`` is their folder (``found_in``).
    """
    present = [file for file in files if file.is_file()]
    return {file: str(found["sha256"]) for file, found in found_in(present, "digest", group, _digest).items()}


def _digest(file: Path) -> Found:
    return {"sha256": digest_of_file(file)}
