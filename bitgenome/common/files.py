"""Writes files atomically: a reader sees the old content or the new, never half of either."""

import errno
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitgenome.common.errors import StorageError

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file in the same directory, which replaces ``path`` at the end.

    At the end it is fsynced and renamed to ``path``; after an error it is deleted. Raises StorageError if the disk is
    full or cannot be written.
    """
    path = Path(path)
    with disk_errors(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            yield temporary
            os.fsync(descriptor)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(path.parent)


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Replace ``path`` by ``data``: temporary file in the same directory, fsync, rename, fsync of the directory.

    Raises StorageError if the disk is full or cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing ``path`` into a StorageError that names the file.

    Errors of writing to an open file do not name it.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = ": make room, then resume" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise StorageError(f"expected to write {path}, found: {reason}{remedy}") from None


def atomic_write_text(path: Path | str, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8; see atomic_write_bytes."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path | str, value: Any, indent: int | None = 2) -> None:
    """Replace ``path`` by ``value`` as strict JSON; see atomic_write_bytes.

    Raises ValueError for NaN and infinities.
    """
    atomic_write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def json_object(content: bytes) -> dict[str, Any]:
    """Return the object in a JSON text, or {} if the text is incomplete or holds no object."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def cut_torn_tail(path: Path) -> int:
    """Cut off what follows the last newline, as a killed writer leaves it, and return the number of bytes cut."""
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
    """Fsync ``folder``, so that renames and new files in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the process's file mode mask.

    mkstemp ignores it and creates files that only their owner can read.
    """
    mask = os.umask(0)
    os.umask(mask)
    return mask
