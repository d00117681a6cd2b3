"""The run directory: what a run was asked, what it has done, and where its artefacts lie."""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitgenome.config import RunConfig, parse_config
from bitgenome.lease import Lease, LeaseLostError
from bitgenome.storage_root import check_inside
from search.errors import UserError
from search.files import atomic_write_text

SCHEMA = 1
EVALUATIONS_FILE = "evaluations.jsonl"
SENSITIVITY_FILE = "sensitivity.parquet"
GENE_GROUPS_FILE = "gene-groups.json"
WINDOWS_FILE = "windows.safetensors"
RECORDED_PACKAGES = ("bitgenome", "torch", "transformers", "ray", "optuna", "deap", "gguf", "numpy", "xllamacpp")


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    keys = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


class RunDirectory:
    """``run.json`` and the paths beside it. Use ``create`` or ``open``."""

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path = path
        self.record = record
        self.lease: Lease | None = None  # of the one driver that may write here

    @classmethod
    @contextmanager
    def owned(cls, config: RunConfig) -> Iterator["RunDirectory"]:
        """``create`` it, as the only driver for as long as the context lasts; see ``own``."""
        path = check_inside(config.storage_path / config.name, config.storage_path, f"the run {config.name}")
        with Lease(path, f"the run {path}") as lease:
            directory = cls.create(config)
            directory.lease = lease
            with directory.recorded_end():
                yield directory

    @classmethod
    def find(cls, config: RunConfig) -> "RunDirectory | None":
        """The directory of ``config`` if something was evaluated in it.

        Raises UserError if it belongs to another configuration, naming the keys that differ.
        """
        path = check_inside(config.storage_path / config.name, config.storage_path, f"the run {config.name}")
        if not ((path / "run.json").is_file() and (path / EVALUATIONS_FILE).is_file()):
            return None
        existing = cls.open(path)
        differing = differing_keys(existing.config.result_keys(), config.result_keys())
        if differing:
            raise UserError(
                f"expected {path} to be a run of this configuration, found one that differs in "
                f"{', '.join(differing)}: choose another name, or resume it with: bitgenome resume {path}"
            )
        return existing

    @classmethod
    def create(cls, config: RunConfig) -> "RunDirectory":
        """The directory of ``config``, new or continued; one that has evaluated nothing yet is begun anew.

        Raises UserError if it belongs to another configuration, naming the keys that differ.
        """
        if existing := cls.find(config):
            existing.record["config"] = config.model_dump(mode="json")  # workers and places may have changed
            existing.save()
            return existing
        path = config.storage_path / config.name
        try:
            path.mkdir(parents=True, exist_ok=True)
            for stale in (SENSITIVITY_FILE, GENE_GROUPS_FILE):  # of an attempt that got no further
                (path / stale).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"expected to create the run directory {path}, found {error.strerror}") from None
        packages = {name: version(name) for name in RECORDED_PACKAGES}
        record = {
            "schema": SCHEMA,
            "config": config.model_dump(mode="json"),
            "config_digest": config.digest,
            "python": platform.python_version(),
            "packages": packages,
            "stages": {},
        }
        directory = cls(path, record)
        directory.save()
        return directory

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run. Raises UserError if there is none at ``path`` or its record cannot be read.

        A link to a run elsewhere is none: its artefacts are not the storage path's.
        """
        check_inside(path, path.parent, f"the run {path.name}")
        file = path / "run.json"
        if not file.is_file():
            raise UserError(f"expected a run directory with run.json, found none at {path}")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            schema = record["schema"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"expected a run record in {file}, found a file that cannot be read") from None
        if schema != SCHEMA:
            raise UserError(f"expected run schema {SCHEMA} in {file}, found {schema}: written by another version")
        return cls(path, record)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Be its only driver for as long as the context lasts.

        Raises LeaseHeldError, having touched nothing, while another driver works on it, and LeaseLostError once one
        has taken over.
        """
        with Lease(self.path, f"the run {self.path}") as self.lease:
            yield

    @property
    def config(self) -> RunConfig:
        return parse_config(self.record["config"], str(self.path / "run.json"))

    def artefact(self, key: str) -> Path:
        """The path that the record has for ``key``. Raises UserError if it is outside the storage path."""
        root = self.path.resolve().parent
        return check_inside(Path(self.record[key]), root, f"the {key.replace('_', ' ')} of {self.path / 'run.json'}")

    def check(self) -> None:
        """Before a file is written: raise LeaseLostError if another driver has taken over."""
        if self.lease is not None:
            self.lease.check()

    def save(self) -> None:
        self.check()
        atomic_write_text(self.path / "run.json", json.dumps(self.record, indent=1) + "\n")

    def pin(self, key: str, value: str) -> None:
        """Record a digest once. Raises UserError if the run was begun with another."""
        digests = self.record.setdefault("digests", {})
        found = digests.get(key, value)
        if found != value:
            raise UserError(f"expected the {key} that {self.path} was begun with ({found[:12]}), found {value[:12]}")
        if key not in digests:
            digests[key] = value
            self.save()

    @contextmanager
    def recorded_end(self) -> Iterator[None]:
        """Record how this attempt ends, for who looks at the run later; a process that is killed records nothing."""
        for key in ("ended", "error"):
            self.record.pop(key, None)
        try:
            yield
            self.record["ended"] = "finished"
        except BaseException as error:
            self.record["ended"] = "failed" if isinstance(error, Exception) else "stopped"
            self.record["error"] = str(error)
            raise
        finally:
            with suppress(LeaseLostError, OSError):  # the record is another driver's by then, or the disk is full
                self.save()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record that the stage goes on; add the time spent inside to its seconds, also when it is interrupted."""
        log = self.path / EVALUATIONS_FILE
        evaluations = log.read_bytes().count(b"\n") if log.exists() else 0
        self.record["stage"] = {"name": name, "since": round(time.time(), 2), "evaluations": evaluations}
        self.save()
        started = time.monotonic()
        try:
            yield
        finally:
            stages = self.record["stages"]
            stages[name] = round(stages.get(name, 0.0) + time.monotonic() - started, 2)
            self.save()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent by stage, over all attempts."""
        return dict(self.record["stages"])
