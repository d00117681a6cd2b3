"""The files of a run for who only looks at it: in a folder of this machine, or behind a URL, with logs in segments.

The run may be writing meanwhile: files that are not there are empty.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.files import json_object
from workers.storage.folders import is_url, open_folder

TAIL_BYTES = 1 << 16


class RunFiles(ABC):
    """Of one directory; names as the run's own driver has them."""

    def look(self) -> None:  # noqa: B027 - a folder of this machine is looked at with every call
        """What ``size`` and ``lines`` say is as of now."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def lines(self, name: str, start: int = 0) -> Iterator[bytes]:
        """Lines behind the byte ``start``, the last one perhaps without its end."""

    def last_segment(self, name: str) -> int:
        """The byte that the lines which were sent last begin at."""
        return 0

    def record(self, name: str) -> dict[str, Any]:
        """The object in a file; empty if there is none that can be read."""
        return json_object(b"".join(self.lines(name)))

    def tail(self, name: str) -> list[str]:
        """The last whole lines, up to ``TAIL_BYTES``; of segments those of the last one."""
        lines = self.lines(name, max(self.last_segment(name), self.size(name) - TAIL_BYTES))
        whole = [line.decode("utf-8", "replace").rstrip("\r\n") for line in lines if line.endswith(b"\n")]
        return [line for line in whole if line]


class LocalRunFiles(RunFiles):
    """In a folder of this machine."""

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
    """Behind a URL, as its mirror was pushed last (see bitgenome.storage.mirror). Raises StorageError."""

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
        """The segments of a file that grows, each with the byte that it begins at; another file is one."""
        if name in self._sizes:
            return [(0, name)]
        parts = sorted(part for part in self._sizes if part.startswith(f"{name}{layout.SEGMENTS}/"))
        return [(int(part.rpartition("/")[2]), part) for part in parts]


def run_files(location: str | Path) -> RunFiles:
    """Those at a path or URL."""
    return RemoteRunFiles(str(location)) if is_url(location) else LocalRunFiles(Path(location))
