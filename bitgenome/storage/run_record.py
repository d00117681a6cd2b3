"""run.json: what a run was asked, what it has done, and where its artefacts lie."""

import json
import platform
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitgenome.common.errors import StorageError, UserError
from bitgenome.common.files import atomic_write_text
from bitgenome.config.run import RunConfig
from bitgenome.storage.lease import LeaseLostError

SCHEMA = 1
RECORDED_PACKAGES = ("bitgenome", "torch", "transformers", "ray", "optuna", "deap", "gguf", "numpy", "xllamacpp")


class RunRecord(UserDict[str, Any]):
    """The object in a run's run.json; ``save`` writes it.

    ``before_write`` is called in front of every write, and keeps the file from being written by raising.
    """

    def __init__(self, file: Path, values: dict[str, Any]):
        super().__init__(values)
        self.file = file
        self.before_write: Callable[[], None] = lambda: None

    @classmethod
    def begin(cls, file: Path, config: RunConfig) -> "RunRecord":
        """Return the record of a run that has done nothing yet; it is not written."""
        record = {
            "schema": SCHEMA,
            "config": config.model_dump(mode="json"),
            "config_digest": config.digest,
            "python": platform.python_version(),
            "packages": {name: version(name) for name in RECORDED_PACKAGES},
            "stages": {},
        }
        return cls(file, record)

    @classmethod
    def parse(cls, content: bytes, file: Path, source: str) -> "RunRecord":
        """Return the record in ``content``; ``source`` names it in errors.

        Raises UserError if it cannot be read, or is of another version.
        """
        try:
            record: dict[str, Any] = json.loads(content)
            schema = record["schema"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"expected a run record in {source}, found a file that cannot be read") from None
        if schema != SCHEMA:
            raise UserError(f"expected run schema {SCHEMA} in {source}, found {schema}: written by another version")
        return cls(file, record)

    def save(self) -> None:
        """Write run.json, atomically. Raises StorageError, and what ``before_write`` raises."""
        self.before_write()
        atomic_write_text(self.file, json.dumps(self.data, indent=1) + "\n")

    def pin(self, key: str, value: str) -> None:
        """Record a digest once. Raises UserError if the run was begun with another."""
        digests = self.setdefault("digests", {})
        found = digests.get(key, value)
        if found != value:
            raise UserError(
                f"expected the {key} that {self.file.parent} was begun with ({found[:12]}), found {value[:12]}"
            )
        if key not in digests:
            digests[key] = value
            self.save()

    @contextmanager
    def timed(self, stage: str, evaluations: int) -> Iterator[None]:
        """Record that ``stage`` goes on, begun after ``evaluations``, and the time spent inside, however it ends."""
        self["stage"] = {"name": stage, "since": round(time.time(), 2), "evaluations": evaluations}
        self.save()
        started = time.monotonic()
        try:
            yield
        finally:
            stages = self["stages"]
            stages[stage] = round(stages.get(stage, 0.0) + time.monotonic() - started, 2)
            self.save()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Record how this attempt ends, for who looks at the run later; a process that is killed records nothing."""
        for key in ("ended", "error"):
            self.pop(key, None)
        try:
            yield
            self["ended"] = "finished"
        except BaseException as error:
            self["ended"] = "failed" if isinstance(error, Exception) else "stopped"
            self["error"] = str(error)
            raise
        finally:
            with suppress(LeaseLostError, StorageError):  # the record is another driver's by then, or the disk is full
                self.save()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent by stage, over all attempts."""
        return dict(self["stages"])
