"""checkpoint.json: the state of a search, and the digest of the configuration that it belongs to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import UserError
from search.files import atomic_write_json

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint file of one configuration."""

    path: Path
    digest: str  # of everything that decides the course of the search: configuration, bank, text

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file atomically. ``state`` is JSON-serializable."""
        record = {"schema_version": SCHEMA_VERSION, "digest": self.digest, "state": dict(state)}
        atomic_write_json(self.path, record, indent=None)

    def load(self) -> dict[str, Any] | None:
        """The saved state; None where there is no file yet.

        Raises ValueError for a file of another configuration or schema version, or that is no checkpoint.
        """
        if not self.path.exists():
            return None
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path} is not a checkpoint: expected JSON, found {error}") from error
        version = record.get("schema_version") if isinstance(record, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(f"{self.path} has checkpoint schema version {version}, expected {SCHEMA_VERSION}")
        if record["digest"] != self.digest:
            raise UserError(
                f"{self.path} belongs to another configuration (digest {record['digest']}, expected {self.digest}): "
                "choose another run name or restore the configuration it was made with"
            )
        state: dict[str, Any] = record["state"]
        return state
