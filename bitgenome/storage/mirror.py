"""Keeps a local mirror of a run behind a URL, pulled at the start and pushed as the run grows.

Append-only files (evaluations above all) are pushed as segments, ``evaluations.jsonl.parts/<offset>``, of complete new
lines. A segment is created, never replaced, so that of two drivers only one can go on. All other files are pushed whole
if they have changed, the checkpoint last: a reader never sees a checkpoint ahead of its evaluations.
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
from bitgenome.common.errors import StorageError, expecting
from bitgenome.common.files import atomic_write_json, replacing
from workers.storage.folders import is_url, mirror_root, open_folder
from workers.storage.transfers import local_sizes, send

log = logging.getLogger(__name__)


@dataclass
class Pushed:
    """Records which content of a mirror is remote already."""

    version: str = ""
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    marks: dict[str, list[int]] = field(default_factory=dict)  # name -> time of change (ns) and bytes when digested
    bytes: dict[str, int] = field(default_factory=dict)  # name -> bytes pushed of an append-only file


class RunMirror:
    """The local mirror of a run whose storage is at ``url``."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        parent, _, self.name = self.url.rpartition("/")
        self.path = mirror_root(parent) / self.name
        self._remote = open_folder(self.url)
        self._pushed = Pushed()

    def pull(self) -> None:
        """Bring the mirror up to date; nothing is fetched if the last push came from it.

        If the run went on elsewhere, local files are replaced, and what was not pushed is evaluated again.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._pushed = self._state()
        version = self._remote.read(layout.PUSH_VERSION)
        if version is None:
            self._pushed = Pushed()  # nothing is remote: the next push sends everything
        else:
            with expecting("the number of a push", f"{self.url}/{layout.PUSH_VERSION}", "remove it to send all again"):
                number = str(json.loads(version)["version"])
            if number != self._pushed.version:
                self._replace()
        self._mark()  # mirrors on other machines are outdated from here on, and must pull before they push

    def read(self, name: str) -> bytes | None:
        """Return the content of a remote file, or None if there is none, without touching the mirror."""
        return self._remote.read(name)

    def push(self) -> None:
        """Send everything that has changed. Raises StorageError if the remote has other lines than this run's."""
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
        """Record that this push was the last, remotely and in the mirror."""
        self._pushed.version = uuid.uuid4().hex
        self._remote.write(layout.PUSH_VERSION, json.dumps({"version": self._pushed.version}).encode())
        atomic_write_json(self.path / layout.PUSH_STATE, asdict(self._pushed), indent=None)

    def _state(self) -> Pushed:
        """Return what the mirror has recorded as pushed."""
        file = self.path / layout.PUSH_STATE
        with expecting("what was sent from this mirror", file, "remove it, and what is remote is fetched again"):
            return Pushed(**json.loads(file.read_bytes())) if file.is_file() else Pushed()

    def _changed(self) -> dict[str, tuple[str, list[int]]]:
        """Return digest and mark of each file that differs from the remote one, by name."""
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
        """Send the complete lines of an append-only file that are not remote yet."""
        while data := self._new_lines(name, start := self._pushed.bytes.get(name, 0)):
            segment = f"{name}{layout.SEGMENTS}/{start:015d}"
            if not self._remote.create(segment, data):
                there = self._remote.read(segment) or b""
                if not there or not data.startswith(there):
                    raise StorageError(f"expected lines of this run in {self.url}/{segment}, found others")
                data = there  # sent by a process of this run that then died, or did not get the answer
            self._pushed.bytes[name] = start + len(data)

    def _new_lines(self, name: str, start: int) -> bytes:
        """Return the complete lines from byte ``start`` on."""
        if not (path := self.path / name).is_file():
            return b""
        with path.open("rb") as stream:
            stream.seek(start)
            data = stream.read()
        return data[: data.rfind(b"\n") + 1]

    def _replace(self) -> None:
        """Replace the mirror by the remote files."""
        log.info("fetching %s", self.url)
        for old in self.path.iterdir():
            if old.name != layout.WORKER_LIMIT:  # limits the workers of this machine's driver
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
        """Write a file from its segments, and return its bytes. Raises StorageError if a segment is missing."""
        total = 0
        with replacing(self.path / name) as temporary, temporary.open("wb") as stream:
            for segment in segments:
                if int(segment.rpartition("/")[2]) != total:
                    raise StorageError(f"expected segments without a gap in {self.url}, found {segment} at {total}")
                total += stream.write(self._remote.read(segment) or b"")
        return total


@contextmanager
def mirrored(location: str) -> Iterator[RunMirror | None]:
    """Yield the mirror of a URL, pulled at the start and pushed at the end; None for a path.

    After an error nothing is pushed.
    """
    mirror = RunMirror(location) if is_url(location) else None
    if mirror is not None:
        mirror.pull()
    yield mirror
    if mirror is not None:
        mirror.push()
