"""The checkpoint of a search, checkpoint.json: its state, and the digest of the configuration that it belongs to.

What the strategy was told only grows. It is kept in a file of its own, one line per batch, and the checkpoint says how
much of it counts. Both are written while a search goes on, the checkpoint last, at a cost that does not grow with the
search.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import atomic_write_json, disk_errors, sync_folder

SCHEMA_VERSION = 3
REMEDY = "remove checkpoint.json, and resume the run, which searches again with what is evaluated"
READABLE_VERSIONS = (2, SCHEMA_VERSION)  # version 2 keeps what was told in the checkpoint itself


class ToldFile:
    """Stores the batches that a strategy was told, one JSON line each; what follows the first ``bytes`` is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches = self.bytes = 0

    def extend(self, since: int, batches: list[Any]) -> None:
        """Write ``batches`` after the first ``since``, which must be all there are, or 0 to start over.

        Raises ValueError for another ``since``, and StorageError if the disk cannot be written.
        """
        if since not in (0, self.batches):
            raise ValueError(f"expected batches from number {self.batches} on, found them from {since} on")
        self.batches, self.bytes = (since, self.bytes) if since else (0, 0)
        new = not self.path.exists()
        with disk_errors(self.path), self.path.open("wb" if new else "r+b") as stream:
            stream.truncate(self.bytes)
            stream.seek(self.bytes)
            for batch in batches:
                self.bytes += stream.write(json.dumps(batch, allow_nan=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            sync_folder(self.path.parent)
        self.batches += len(batches)

    def read(self, batches: int, size: int) -> list[Any]:
        """Return the first ``batches`` batches, of ``size`` bytes together. Raises UserError if they are not there."""
        data = b""
        if self.path.is_file():
            with self.path.open("rb") as stream:
                data = stream.read(size)
        lines = data.splitlines()
        if (len(data), len(lines)) != (size, batches):
            raise UserError(
                f"expected {batches} batches in {size} bytes of {self.path}, found {len(lines)} in {len(data)}: "
                f"{REMEDY}"
            )
        self.batches, self.bytes = batches, size
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint holds the state of one configuration's search, and a file beside it what its strategy was told."""

    path: Path
    digest: str  # of everything that decides the course of the search: configuration, bank, text

    @cached_property
    def told(self) -> ToldFile:
        """The file of the batches that the strategy was told."""
        return ToldFile(self.path.with_name(f"{self.path.stem}-told.jsonl"))

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint file atomically by ``state``, which is JSON-serializable.

        Its ``strategy`` holds, of the batches told, those that are not in their file yet, or all.
        """
        state = dict(state)
        if strategy := state.get("strategy"):
            self.told.extend(strategy["told_before"], strategy["told"])
            places = {"told": {"batches": self.told.batches, "bytes": self.told.bytes}, "told_before": 0}
            state["strategy"] = {**strategy, **places}
        record = {"schema_version": SCHEMA_VERSION, "digest": self.digest, "state": state}
        atomic_write_json(self.path, record, indent=None)

    def load(self) -> dict[str, Any] | None:
        """Return the saved state; None if there is no file yet.

        Raises ValueError for a file of another configuration or schema version, or one that is no checkpoint.
        """
        if not self.path.exists():
            return None
        with expecting("a checkpoint", self.path, REMEDY):
            record = json.loads(self.path.read_bytes())
            if (version := record["schema_version"]) in READABLE_VERSIONS:
                state, digest = dict(record["state"]), record["digest"]
                if type(generation := state.get("generation", 0)) is not int:
                    raise TypeError(f"generation {generation!r}")
        if version not in READABLE_VERSIONS:
            raise UserError(f"{self.path} has checkpoint schema version {version}, expected {SCHEMA_VERSION}")
        if digest != self.digest:
            raise UserError(
                f"{self.path} belongs to another configuration (digest {digest}, expected {self.digest}): "
                "choose another run name or restore the configuration it was made with"
            )
        if version == SCHEMA_VERSION and (strategy := state.get("strategy")):
            with expecting("what the strategy was told", self.told.path, REMEDY):
                told = self.told.read(strategy["told"]["batches"], strategy["told"]["bytes"])
                state["strategy"] = {**strategy, "told": told}
        return state
