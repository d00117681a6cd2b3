"""Reads the files of a run for an observer, from a local directory or from a URL with logs in segments.

The run may be writing meanwhile: missing files are treated as empty.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import json_object
from workers.storage.folders import is_url, open_folder

TAIL_BYTES = 1 << 16
SCHEMA = 1  # of run.json
KINDS = {"config": dict, "stages": dict, "digests": dict, "bank": str, "scaled_model": str}  # what readers rely on


class RunFiles(ABC):
    """Reads the files of one run directory, by the names that the run's own driver uses."""

    def look(self) -> None:  # noqa: B027 - a local directory is read with every call
        """Bring ``size`` and ``lines`` up to date."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file, 0 if there is none."""

    @abstractmethod
    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Yield the lines from byte ``start`` on; the last one may be incomplete."""

    def last_segment(self, name: str) -> int:
        """Return the byte at which the last segment of a file begins; 0 without segments."""
        return 0

    def content(self, name: str) -> bytes:
        """Return the bytes of a file, b"" if there is none."""
        return b"".join(self.lines(name))

    def record(self, name: str) -> dict[str, Any]:
        """Return the object in a file, or {} if there is none that can be read."""
        return json_object(self.content(name))

    def tail(self, name: str) -> list[str]:
        """Return the last complete lines, from ``TAIL_BYTES`` at most; of a file in segments, from the last segment."""
        lines = self.lines(name, max(self.last_segment(name), self.size(name) - TAIL_BYTES))
        whole = [line.decode("utf-8", "replace").rstrip("\r\n") for line in lines if line.endswith(b"\n")]
        return [line for line in whole if line]


class LocalRunFiles(RunFiles):
    """Reads a run in a local directory."""

    def __init__(self, path: Path):
        self._path = path

    def size(self, name: str) -> int:
        try:
            return (self._path / name).stat().st_size
        except OSError:
            return 0

    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        try:
            with (self._path / name).open("rb") as stream:
                stream.seek(start)
                yield from stream
        except OSError:
            return


class RemoteRunFiles(RunFiles):
    """Reads a run behind a URL, as of its last push (see bitgenome.storage.mirror). Raises StorageError."""

    def __init__(self, url: str):
        self._folder = open_folder(url)
        self.look()

    def look(self) -> None:
        self._sizes = self._folder.sizes()

    def size(self, name: str) -> int:
        return max((start + self._sizes[part] for start, part in self._parts(name)), default=0)

    def last_segment(self, name: str) -> int:
        return max((start for start, _ in self._parts(name)), default=0)

    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        for offset, part in self._parts(name):
            if offset + self._sizes[part] > start:
                data = self._folder.read(part) or b""
                yield from data[max(0, start - offset) :].splitlines(keepends=True)

    def _parts(self, name: str) -> list[tuple[int, str]]:
        """Return the segments of a file, each with the byte at which it begins; a whole file is one segment."""
        if name in self._sizes:
            return [(0, name)]
        parts = sorted(part for part in self._sizes if part.startswith(f"{name}{layout.SEGMENTS}/"))
        return [(int(part.rpartition("/")[2]), part) for part in parts]


def run_files(location: str | Path) -> RunFiles:
    """Return the files of the run at a path or URL."""
    return RemoteRunFiles(str(location)) if is_url(location) else LocalRunFiles(Path(location))


def record_in(content: bytes, source: str) -> dict[str, Any]:
    """Return the object in a run.json; ``source`` names it in errors.

    Raises UserError if it cannot be read, or has another schema version.
    """
    with expecting("a run record", source, "restore it, or begin a run of another name"):
        record: dict[str, Any] = json.loads(content)
        schema = record["schema"]
        for key, kind in KINDS.items():
            if not isinstance(record.get(key, kind()), kind):
                raise TypeError(f"{key} is {record[key]!r}")
    if schema != SCHEMA:
        raise UserError(f"expected run schema {SCHEMA} in {source}, found {schema}: written by another version")
    return record
