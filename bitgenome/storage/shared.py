"""Builds and exchanges artefacts that several runs share.

An artefact is at ``<storage_path>/shared/<kind>/<digest of all that it depends on>``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_text
from bitgenome.storage.lease import Lease
from workers.storage.folders import open_folder
from workers.storage.transfers import fetch, send_missing


class Storage(Protocol):
    """Settings that say where runs are stored."""

    @property
    def storage_path(self) -> Path: ...

    @property
    def storage_url(self) -> str | None: ...


def shared_directory(config: Storage, kind: str, digest: str) -> Path:
    """Return the directory of a shared artefact, created if it is missing.

    ``digest`` is that of everything that the artefact depends on.
    """
    directory = config.storage_path / layout.SHARED / kind / digest[:16]
    directory.mkdir(parents=True, exist_ok=True)
    note_use(config, f"{kind}/{directory.name}")
    return directory.resolve()  # absolute, because workers have their own working directories


def note_use(config: Storage, name: str) -> None:
    """List the artefact ``name`` (kind/digest) among those that the run or study of ``config`` uses, if it has begun.

    What a run needs is not removed by ``bitgenome prune``.
    """
    run: str | None = getattr(config, "name", None)
    if run is None or not (config.storage_path / run).is_dir():
        return
    file = config.storage_path / run / layout.USED
    known = file.read_text(encoding="utf-8").split() if file.is_file() else []
    if name not in known:
        atomic_write_text(file, "".join(f"{line}\n" for line in [*known, name]))


def build_once(
    config: Storage, directory: Path, what: str, done: Callable[[], bool], build: Callable[[], None]
) -> None:
    """Build the artefact ``what`` in ``directory`` unless ``done`` returns True.

    While another process builds it, wait. Behind a URL, remote files are fetched first, and what is built is sent.
    """
    pull_shared(config, directory)
    if not done():
        location = f"{config.storage_url}/{shared_name(directory)}" if config.storage_url else directory
        with Lease(location, f"{what} {location}", wait=True):
            pull_shared(config, directory)
            if not done():  # by the previous owner of the lease
                build()
                push_shared(config, directory)
    push_shared(config, directory)  # also what an earlier attempt built but did not send


def shared_name(directory: Path) -> str:
    """Return the name of a shared directory relative to the storage root."""
    return "/".join((layout.SHARED, *directory.parts[-2:]))


def pull_shared(config: Storage, directory: Path) -> None:
    """Fetch the remote files of a shared directory that are missing here, if storage is behind a URL."""
    if config.storage_url:
        remote = open_folder(config.storage_url)
        fetch(remote, config.storage_path, shared_name(directory))


def push_shared(config: Storage, directory: Path) -> None:
    """Send the files of a shared directory that are missing remotely, if storage is behind a URL."""
    if config.storage_url:
        send_missing(open_folder(config.storage_url), config.storage_path, shared_name(directory))


def remove_shared(config: Storage, path: Path) -> None:
    """Remove a file of a shared directory, or all files below a directory in it, here and behind a URL."""
    if config.storage_url:
        remote = open_folder(config.storage_url)
        for name in remote.sizes(path.relative_to(config.storage_path.resolve()).as_posix()):
            remote.delete(name)
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        file.unlink(missing_ok=True)
