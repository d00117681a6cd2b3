"""Reads and writes run.json: a run's configuration, what it has done, and the paths of its artefacts."""

import json
import platform
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from bitgenome.common.errors import StorageError, UserError
from bitgenome.common.files import atomic_write_text
from bitgenome.config.run import RunConfig
from bitgenome.storage.lease import LeaseLostError
from bitgenome.storage.run_files import SCHEMA, record_in

CHANGED = {  # what may have changed, by the key of a digest
    "model": ": have its weights, config.json or tokenizer files changed, such as chat_template.jinja (which versions "
    "before left out)? Put them back, or begin a run of another name"
}
T = TypeVar("T")

PARENT = "parent"  # key: the run that a file of another size was made from, by name
RECORDED_PACKAGES = ("bitgenome", "torch", "transformers", "ray", "optuna", "deap", "gguf", "numpy", "xllamacpp")


class RunRecord(UserDict[str, Any]):
    """Holds the object in a run's run.json as a dict; ``save`` writes it.

    ``before_write`` is called before every write; the file is not written if it raises.
    """

    def __init__(self, file: Path, values: dict[str, Any]):
        super().__init__(values)
        self.file = file
        self.before_write: Callable[[], None] = lambda: None
        self._final: set[str] = set()  # stages of a run that was finished before this attempt

    @classmethod
    def begin(cls, file: Path, config: RunConfig) -> "RunRecord":
        """Return the record of a run that has done nothing yet, without writing it."""
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
        """Return the record in ``content``; ``source`` names it in errors, ``file`` is where it will be saved.

        Raises UserError if it cannot be read, or has another schema version.
        """
        return cls(file, record_in(content, source))

    def save(self) -> None:
        """Write run.json atomically. Raises StorageError, and whatever ``before_write`` raises."""
        self.before_write()
        atomic_write_text(self.file, json.dumps(self.data, indent=1) + "\n")

    def once(self, key: str, decide: Callable[[], T]) -> T:
        """Return what is recorded under ``key``; the first time that is what ``decide`` returns, a JSON value."""
        if key not in self:
            self[key] = decide()
            self.save()
        found: T = self[key]
        return found

    def pin(self, key: str, value: str) -> None:
        """Record a digest once. Raises UserError if the run was started with another."""
        digests = self.setdefault("digests", {})
        found = digests.get(key, value)
        if found != value:
            raise UserError(
                f"expected the {key} that {self.file.parent} was begun with ({found[:12]}), found {value[:12]}"
                f"{CHANGED.get(key, '')}"
            )
        if key not in digests:
            digests[key] = value
            self.save()

    def begin_stage(self, stage: str, evaluations: int) -> None:
        """Save that ``stage`` is running; ``evaluations`` is the number of evaluations before it."""
        self["stage"] = {"name": stage, "since": round(time.time(), 2), "evaluations": evaluations}
        self.save()

    def end_stage(self, stage: str, seconds: float) -> None:
        """Save that ``stage`` took ``seconds`` in this attempt, added to those of earlier ones.

        Of a run that was finished before, the seconds of its stages stay: they are what its result took.
        """
        stages = self["stages"]
        if stage not in self._final:
            stages[stage] = round(stages.get(stage, 0.0) + seconds, 2)
        self.save()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Record how this attempt ends: finished, failed or stopped. A process that is killed records nothing."""
        self._final = set(self["stages"]) if self.get("ended") == "finished" else set()
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
            with suppress(LeaseLostError, StorageError):  # another driver owns the record by then, or the disk is full
                self.save()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent by stage, over all attempts until the run was finished."""
        return dict(self["stages"])
