"""Artefacts that several runs share: ``<storage_path>/shared/<kind>/<digest of all that they depend on>``."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from bitgenome.common import layout
from bitgenome.storage.lease import Lease
from workers.storage.folders import open_folder
from workers.storage.transfers import fetch, send_missing


class Storage(Protocol):
    """The settings that say where runs lie."""

    @property
    def storage_path(self) -> Path: ...

    @property
    def storage_url(self) -> str | None: ...


def shared_directory(config: Storage, kind: str, digest: str) -> Path:
    directory = config.storage_path / layout.SHARED / kind / digest[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()  # workers have a working directory of their own


def build_once(
    config: Storage, directory: Path, what: str, done: Callable[[], bool], build: Callable[[], None]
) -> None:
    """Build the artefact ``what`` in ``directory`` unless it is ``done``; while another process does, wait for it.

    Behind a URL what is there remotely is fetched first, and what is built is sent.
    """
    pull_shared(config, directory)
    if not done():
        location = f"{config.storage_url}/{shared_name(directory)}" if config.storage_url else directory
        with Lease(location, f"{what} {location}", wait=True):
            pull_shared(config, directory)
            if not done():  # by whoever had the lease before
                build()
                push_shared(config, directory)
    push_shared(config, directory)  # also what an earlier attempt has built and not sent


def shared_name(directory: Path) -> str:
    """Relative to the storage's root."""
    return "/".join((layout.SHARED, *directory.parts[-2:]))


def pull_shared(config: Storage, directory: Path) -> None:
    """Fetch what of a shared directory is remote and not here."""
    if config.storage_url:
        remote = open_folder(config.storage_url)
        fetch(remote, config.storage_path, shared_name(directory))


def push_shared(config: Storage, directory: Path) -> None:
    """Send what of a shared directory is here and not remote."""
    if config.storage_url:
        send_missing(open_folder(config.storage_url), config.storage_path, shared_name(directory))
