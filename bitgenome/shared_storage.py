"""Artefacts that several runs share: ``<storage_path>/shared/<kind>/<digest of all that they depend on>``."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from bitgenome.lease import Lease


class Storage(Protocol):
    """The setting that says where runs lie."""

    @property
    def storage_path(self) -> Path: ...


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def shared_directory(config: Storage, kind: str, digest: str) -> Path:
    directory = config.storage_path / "shared" / kind / digest[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()  # workers have a working directory of their own


def build_once(directory: Path, what: str, done: Callable[[], bool], build: Callable[[], None]) -> None:
    """Build the artefact ``what`` in ``directory`` unless it is ``done``; while another process does, wait for it."""
    if done():
        return
    with Lease(directory, f"{what} {directory}", wait=True):
        if not done():  # by whoever had the lease before
            build()
