"""Writing files so that a reader sees the old content or the new one, never half of either."""

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
    """A new file beside ``path`` to write into; at the end it takes its place, fsynced, or is gone after an error.

    Raises StorageError if the disk is full or cannot be written.
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
    """Replace ``path`` by ``data``: temporary file in the same folder, fsync, rename, fsync of the folder."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the system says of writing ``path``, as StorageError: writing itself names no file."""
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
    """Replace ``path`` by ``value`` as strict JSON. Raises ValueError for NaN and infinities."""
    atomic_write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def json_object(content: bytes) -> dict[str, Any]:
    """The object in a JSON text, which may be half a one; empty if there is none."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
