"""Writing files so that a reader sees the old content or the new one, never half of either."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Replace ``path`` by ``data``: temporary file in the same folder, fsync, rename, fsync of the folder."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8; see atomic_write_bytes."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path | str, value: Any, indent: int | None = 2) -> None:
    """Replace ``path`` by ``value`` as strict JSON. Raises ValueError for NaN and infinities."""
    atomic_write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def cut_torn_tail(path: Path) -> int:
    """Cut off what follows the last newline, as a killed writer of lines leaves it; the number of bytes cut."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    torn = len(content) - (content.rfind(b"\n") + 1)
    if torn:
        with path.open("r+b") as stream:
            stream.truncate(len(content) - torn)
            os.fsync(stream.fileno())
        logger.warning("cut a torn last line of %d bytes off %s", torn, path)
    return torn


def sync_folder(folder: Path) -> None:
    """Make renames and new files of ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask; mkstemp ignores it and makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
