"""Staging of the files that tasks read and write on every node of a cluster.

What a task reads is fetched once per node; what it makes is sent from the node where it was made. A storage root is a
directory of the driver's machine and the URL of the same files. Paths in tasks lie below such directories. On another
node they are moved below that node's own copy (workers.storage.folders.mirror_root), on fast local disk, from which
weights are memory-mapped. Files whose content may change under their names are sent as they are at the time, so that a
task that runs again reads what it read.
"""

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from filelock import FileLock

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import StorageError
from workers.pool.base import Pool, PoolStatistics, Task, work_of
from workers.storage.folders import mirror_root, open_folder
from workers.storage.transfers import fetch, follow, local_sizes, send, send_missing


@dataclass(frozen=True)
class StorageRoot:
    """A storage root names the same files twice: by a local directory and by a URL."""

    local: Path  # on the driver's machine
    url: str
    changing: bool = False  # other processes may replace its files by others of the same names and sizes


@dataclass(frozen=True)
class StagedFile:
    """Names a file or directory below a storage root.

    ``digest`` is the sha256 of a file whose content may change under its name, and None otherwise.
    """

    root: StorageRoot
    name: str
    digest: str | None = None
    folder: bool = False


@dataclass(frozen=True)
class Staged:
    """Holds the answer of a StagedTask: the task's own result, and the files that it made."""

    result: Any
    made: tuple[StagedFile, ...]


@dataclass(frozen=True)
class StagedTask:
    """A staged task runs another task of the pool, with the files that it needs and makes."""

    task: Task
    roots: tuple[StorageRoot, ...]
    needs: tuple[StagedFile, ...]
    makes: tuple[StagedFile, ...]
    home: str  # node whose disk holds the local directories of the roots

    @property
    def label(self) -> str:
        return self.task.label

    @property
    def work(self) -> float:
        return work_of(self.task)

    def run(self, state: dict[Any, Any]) -> Staged:
        """Fetch the files needed, run the task and send the files made.

        Raises StorageError if a file cannot be fetched or sent.
        """
        at_home = self.home == this_node()
        local = {root: root.local if at_home else mirror_root(root.url) for root in self.roots}
        for file in self.needs:
            stage(file.root.url, local[file.root], file.name, file.digest, file.root.changing)
        before = [marks(local[file.root], file.name) for file in self.makes]
        for file in self.makes:
            path = local[file.root] / file.name
            (path if file.folder else path.parent).mkdir(parents=True, exist_ok=True)
        task = self.task if at_home else relocated(self.task, lambda path: moved(path, local))
        result = task.run(state)
        made: list[StagedFile] = []
        for file, old in zip(self.makes, before, strict=True):
            made += send_made(file, local[file.root], old)
        if not at_home:
            forget_passing(local, (*self.needs, *made))
        return Staged(result, tuple(made))


def forget_passing(local: Mapping[StorageRoot, Path], files: Sequence[StagedFile]) -> None:
    """Remove this node's copies of files that are removed when their task is done (layout.PASSING)."""
    for file in files:
        if layout.PASSING in file.name.split("/"):
            (local[file.root] / file.name).unlink(missing_ok=True)


def send_made(target: StagedFile, root: Path, before: Mapping[str, tuple[int, int]]) -> list[StagedFile]:
    """Send what was made at ``target`` since ``before`` (from ``marks``), and return those files.

    ``root`` is the local directory. Other workers on the node may have made and sent some of the files.
    """
    remote = open_folder(target.root.url)
    there = remote.sizes(target.name)
    new = {name: size for name, (time, size) in marks(root, target.name).items() if before.get(name) != (time, size)}
    files = {n: StagedFile(target.root, n, None if is_shared(n) else digest_of_file(root / n)) for n in new}
    send(remote, root, [name for name, size in new.items() if not files[name].digest and there.get(name) != size])
    for file in files.values():
        send_changeable(file, root)
    return list(files.values())


def send_changeable(file: StagedFile, root: Path) -> None:
    """Send a file under a name that depends on its content; do nothing for a file without a digest."""
    if file.digest is not None:
        open_folder(file.root.url).upload(root / file.name, staged_name(file.name, file.digest))


def staged_name(name: str, digest: str) -> str:
    """Return the remote name of a file with the content of ``digest``."""
    return f"{layout.STAGED}/{hashlib.sha256(f'{name} {digest}'.encode()).hexdigest()[:32]}"


class StagedPool(Pool):
    """Wraps a pool so that its tasks find their files below ``roots`` on every node."""

    def __init__(self, pool: Pool, roots: Sequence[StorageRoot]):
        self._pool = pool
        self._roots = tuple(roots)
        self._sent: dict[StagedFile, None] = {}
        self._made: dict[StagedFile, None] = {}

    @property
    def size(self) -> int:  # type: ignore[override]
        return self._pool.size

    @property
    def statistics(self) -> PoolStatistics:  # type: ignore[override]
        return self._pool.statistics

    @property
    def one_machine(self) -> bool:  # type: ignore[override]
        return self._pool.one_machine

    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        for answer in self._pool.map([self._staged(task) for task in tasks]):
            for file in answer.made:
                self._made[file] = None
                stage(file.root.url, file.root.local, file.name, file.digest)
            yield answer.result

    def close(self) -> None:
        self._pool.close()
        with suppress(StorageError):  # what is left there does no harm
            for file in {**self._sent, **self._made}:
                if file.digest is not None:
                    open_folder(file.root.url).delete(staged_name(file.name, file.digest))

    def _staged(self, task: Task) -> StagedTask:
        """Return ``task`` with the files it needs, which are sent first, and those it makes."""
        makes = tuple(getattr(task, "makes", ()))
        read = (path for path in paths_of(task) if path.is_file() or (path.is_dir() and path not in makes))
        needs = [file for path in read if (file := self._file(path, changes=path.is_file()))]
        for file in needs:
            if file not in self._sent:
                self._send(file)
        made = tuple(file for path in makes if (file := self._file(path)))
        return StagedTask(task, self._roots, tuple(needs), made, this_node())

    def _send(self, file: StagedFile) -> None:
        """Send a file and remember that it was sent."""
        if file.digest is None:
            send_missing(open_folder(file.root.url), file.root.local, file.name)
        send_changeable(file, file.root.local)
        self._sent[file] = None

    def _file(self, path: Path, changes: bool = False) -> StagedFile | None:
        """Return the staged file of ``path``; None for a path outside all roots.

        ``changes`` says that the content may change under the name.
        """
        root = next((root for root in self._roots if path.is_relative_to(root.local)), None)
        if root is None:
            return None
        name = path.relative_to(root.local).as_posix().removeprefix(".")
        digest = digest_of_file(path) if changes and not is_shared(name) else None
        return StagedFile(root, name, digest, path.is_dir())


def this_node() -> str:
    """Return the name of this node: its host, and its cache directory."""
    return f"{socket.gethostname()} {layout.cache_root()}"


def is_shared(name: str) -> bool:
    """Return whether a file lies in the directory of shared artefacts, where names are digests of content."""
    return name.startswith(f"{layout.SHARED}/")


@cache
def stage(url: str, root: Path, name: str, digest: str | None, changing: bool = False) -> None:
    """Bring a file or directory from below ``url`` to ``root``, once per process, and over the network once per node.

    ``changing`` says that others may replace the files under the same names. Raises StorageError if the file cannot be
    fetched, or is not what ``digest`` says.
    """
    remote, locks = open_folder(url), root / layout.LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / hashlib.sha256(name.encode()).hexdigest()[:16]):
        if digest is None:
            (follow if changing else fetch)(remote, root, name)
        elif digest_of_file(root / name) != digest:
            remote.download(staged_name(name, digest), root / name)
            if digest_of_file(root / name) != digest:
                raise StorageError(f"expected {url}/{name} as the driver has it, found other content")


def marks(root: Path, name: str) -> dict[str, tuple[int, int]]:
    """Return the modification time (ns) and size (bytes) of every file below ``root / name``, which change with it."""
    found = {file: (root / file).stat() for file in local_sizes(root, name)}
    return {file: (status.st_mtime_ns, status.st_size) for file, status in found.items()}


def moved(path: Path, local: Mapping[StorageRoot, Path]) -> Path:
    """Return ``path`` below the directory that stands for its root on this node."""
    for root, folder in local.items():
        if path.is_relative_to(root.local):
            return folder / path.relative_to(root.local)
    return path


@cache
def path_fields(kind: type[Any]) -> tuple[str, ...]:
    """Return the fields of a dataclass that hold a path, or a dataclass that does."""
    return tuple(name for name, hint in get_type_hints(kind).items() if _mentions_path(hint))


def _mentions_path(hint: Any) -> bool:
    if arguments := get_args(hint):
        return any(_mentions_path(argument) for argument in arguments)
    return isinstance(hint, type) and (issubclass(hint, Path) or (is_dataclass(hint) and bool(path_fields(hint))))


def relocated(value: Any, move: Callable[[Path], Path]) -> Any:
    """Return ``value`` with ``move`` applied to every path in it, also inside its tuples and dataclass fields."""
    if isinstance(value, Path):
        return move(value)
    if isinstance(value, tuple):
        return tuple(relocated(item, move) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {name: relocated(getattr(value, name), move) for name in path_fields(type(value))}
        return replace(value, **changes) if changes else value
    return value


def paths_of(value: Any) -> list[Path]:
    """Return every path in ``value``, once."""
    found: dict[Path, None] = {}

    def note(path: Path) -> Path:
        found[path] = None
        return path

    relocated(value, note)
    return list(found)
