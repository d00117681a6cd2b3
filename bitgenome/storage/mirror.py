"""Runs behind a URL: a local mirror of the run directory, pulled at the start and pushed as it grows.

Files that only grow (evaluations above all) go up as segments, ``evaluations.jsonl.parts/<offset>``, of whole lines and
of new bytes only; a segment is created, never replaced, so that of two drivers only one can go on. Everything else goes
up whole, if it has changed, the checkpoint last: a reader never sees one ahead of its evaluations.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import StorageError
from bitgenome.common.files import atomic_write_json, replacing
from workers.storage.folders import is_url, mirror_root, open_folder
from workers.storage.transfers import local_sizes, send

log = logging.getLogger(__name__)


@dataclass
class Pushed:
    """What of a mirror is remote already."""

    version: str = ""
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    marks: dict[str, list[int]] = field(default_factory=dict)  # name -> time of change and bytes, when it was digested
    bytes: dict[str, int] = field(default_factory=dict)  # of files that only grow


class RunMirror:
    """The local folder of a run whose storage is at ``url``."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        parent, _, self.name = self.url.rpartition("/")
        self.path = mirror_root(parent) / self.name
        self._remote = open_folder(self.url)
        self._pushed = Pushed()

    def pull(self) -> None:
        """Make the mirror what is remote, unless it is that already, or ahead of it as the last that was pushed from.

        Of a run that went on elsewhere, local files are replaced; what was not pushed is evaluated again.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._pushed = self._state()
        version = self._remote.read(layout.PUSH_VERSION)
        if version is None:
            self._pushed = Pushed()  # nothing is remote: the next push sends everything
        elif json.loads(version)["version"] != self._pushed.version:
            self._replace()
        self._mark()  # whoever pushes from an older mirror from now on must pull before

    def read(self, name: str) -> bytes | None:
        """A remote file, without touching the mirror."""
        return self._remote.read(name)

    def push(self) -> None:
        """Send what has changed."""
        before = asdict(self._pushed)
        for name in layout.GROWING:
            self._push_lines(name)
        changed = self._changed()
        send(self._remote, self.path, list(changed))
        for name, (digest, mark) in changed.items():
            self._pushed.files[name], self._pushed.marks[name] = digest, mark
        if asdict(self._pushed) != before:
            self._mark()

    def _mark(self) -> None:
        """Say which push was the last, here and there."""
        self._pushed.version = uuid.uuid4().hex
        self._remote.write(layout.PUSH_VERSION, json.dumps({"version": self._pushed.version}).encode())
        atomic_write_json(self.path / layout.PUSH_STATE, asdict(self._pushed), indent=None)

    def _state(self) -> Pushed:
        file = self.path / layout.PUSH_STATE
        return Pushed(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else Pushed()

    def _changed(self) -> dict[str, tuple[str, list[int]]]:
        """Digests and marks of the files that differ from what is remote."""
        found: dict[str, tuple[str, list[int]]] = {}
        for name in local_sizes(self.path, ""):
            if name in layout.GROWING or name == layout.WORKER_LIMIT or name.endswith(".lock"):
                continue
            status = (self.path / name).stat()
            mark = [status.st_mtime_ns, status.st_size]
            if self._pushed.marks.get(name) == mark:
                continue
            digest = digest_of_file(self.path / name)
            if digest == self._pushed.files.get(name):
                self._pushed.marks[name] = mark
            elif digest is not None:
                found[name] = digest, mark
        return found

    def _push_lines(self, name: str) -> None:
        """Send the whole lines behind what is remote of a file that only grows."""
        while data := self._new_lines(name, start := self._pushed.bytes.get(name, 0)):
            segment = f"{name}{layout.SEGMENTS}/{start:015d}"
            if not self._remote.create(segment, data):
                there = self._remote.read(segment) or b""
                if not there or not data.startswith(there):
                    raise StorageError(f"expected lines of this run in {self.url}/{segment}, found others")
                data = there  # sent just before this process or another one of the run died, or lost its answer
            self._pushed.bytes[name] = start + len(data)

    def _new_lines(self, name: str, start: int) -> bytes:
        """Whole lines from byte ``start`` on."""
        if not (path := self.path / name).is_file():
            return b""
        with path.open("rb") as stream:
            stream.seek(start)
            data = stream.read()
        return data[: data.rfind(b"\n") + 1]

    def _replace(self) -> None:
        """Replace the mirror by what is remote."""
        log.info("fetching %s", self.url)
        for old in self.path.iterdir():
            if old.name != layout.WORKER_LIMIT:  # says what may be held from here
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        names = [name for name in self._remote.sizes() if name != layout.PUSH_VERSION]
        state = Pushed()
        for name in names:
            if layout.SEGMENTS not in name:
                self._remote.download(name, self.path / name)
                status = (self.path / name).stat()
                state.files[name] = digest_of_file(self.path / name) or ""
                state.marks[name] = [status.st_mtime_ns, status.st_size]
        for name in layout.GROWING:
            segments = sorted(n for n in names if n.startswith(f"{name}{layout.SEGMENTS}/"))
            if segments:
                state.bytes[name] = self._join(name, segments)
        self._pushed = state

    def _join(self, name: str, segments: list[str]) -> int:
        """Write a file of its segments; its bytes. Raises StorageError where one is missing."""
        total = 0
        with replacing(self.path / name) as temporary, temporary.open("wb") as stream:
            for segment in segments:
                if int(segment.rpartition("/")[2]) != total:
                    raise StorageError(f"expected segments without a gap in {self.url}, found {segment} at {total}")
                total += stream.write(self._remote.read(segment) or b"")
        return total


@contextmanager
def mirrored(location: str) -> Iterator[RunMirror | None]:
    """The mirror of a URL, pulled, and pushed at the end; None for a path."""
    mirror = RunMirror(location) if is_url(location) else None
    if mirror is not None:
        mirror.pull()
    yield mirror
    if mirror is not None:
        mirror.push()
