"""Artefacts that several runs share: ``<storage_path>/shared/<kind>/<digest of all that they depend on>``."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol


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
