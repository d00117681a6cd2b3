"""The run directory: what a run was asked, what it has done, and where its artefacts lie."""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import StorageError, UserError
from bitgenome.common.files import atomic_write_text
from bitgenome.config.run import RunConfig, parse_config
from bitgenome.storage.lease import Lease, LeaseLostError
from bitgenome.storage.mirror import RunMirror, mirrored
from bitgenome.storage.root import check_inside
from bitgenome.storage.shared import pull_shared
from workers.storage.folders import is_url

SCHEMA = 1
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


def parse_record(content: bytes, source: str) -> dict[str, Any]:
    """run.json. Raises UserError if it cannot be read, or is of another version."""
    try:
        record: dict[str, Any] = json.loads(content)
        schema = record["schema"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"expected a run record in {source}, found a file that cannot be read") from None
    if schema != SCHEMA:
        raise UserError(f"expected run schema {SCHEMA} in {source}, found {schema}: written by another version")
    return record


class RunDirectory:
    """``run.json`` and the paths beside it. Use ``create`` or ``open``."""

    def __init__(self, path: Path, record: dict[str, Any], mirror: RunMirror | None = None):
        self.path = path
        self.record = record
        self.mirror = mirror  # None: storage is a folder
        self.lease: Lease | None = None  # of the one driver that may write here

    @classmethod
    @contextmanager
    def owned(cls, config: RunConfig) -> Iterator["RunDirectory"]:
        """``create`` it, as the only driver for as long as the context lasts; see ``own``."""
        check_inside(config.storage_path / config.name, config.storage_path, f"the run {config.name}")
        place = f"{config.place}/{config.name}"
        with Lease(place, f"the run {place}") as lease, mirrored(place) as mirror:
            directory = cls.create(config)
            directory.lease, directory.mirror = lease, mirror
            with directory.recorded_end():
                yield directory
            directory.check()

    @classmethod
    def find(cls, config: RunConfig) -> "RunDirectory | None":
        """The directory of ``config`` if something was evaluated in it.

        Raises UserError if it belongs to another configuration, naming the keys that differ.
        """
        path = check_inside(config.storage_path / config.name, config.storage_path, f"the run {config.name}")
        if not ((path / layout.RECORD).is_file() and (path / layout.EVALUATIONS).is_file()):
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
            for stale in (layout.SENSITIVITY, layout.GENE_GROUPS):  # of an attempt that got no further
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
    def open(cls, place: Path | str) -> "RunDirectory":
        """An existing run, at a path or URL. Raises UserError if there is none or its record cannot be read.

        A link to a run elsewhere is none: its artefacts are not the storage path's.
        """
        mirror = RunMirror(str(place)) if is_url(place) else None
        if mirror is None:
            check_inside(Path(place), Path(place).parent, f"the run {Path(place).name}")
        file = Path(place) / layout.RECORD
        content = mirror.read(layout.RECORD) if mirror else file.read_bytes() if file.is_file() else None
        if content is None:
            raise UserError(f"expected a run directory with run.json, found none at {place}")
        return cls(mirror.path if mirror else Path(place), parse_record(content, f"{place}/{layout.RECORD}"), mirror)

    @property
    def place(self) -> str:
        """Path or URL."""
        return self.mirror.url if self.mirror else str(self.path)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Be its only driver for as long as the context lasts.

        Raises LeaseHeldError, having touched nothing, while another driver works on it, and LeaseLostError once one
        has taken over.
        """
        with Lease(self.place, f"the run {self.place}") as self.lease:
            if self.mirror is not None:
                self.mirror.pull()
                self.record = parse_record((self.path / layout.RECORD).read_bytes(), f"{self.place}/{layout.RECORD}")
            yield
            self.sync()

    @property
    def config(self) -> RunConfig:
        """As it was begun, but stored where it was found."""
        parent, _, name = (self.mirror.url if self.mirror else str(self.path.resolve())).rpartition("/")
        data = {**self.record["config"], "storage_path": parent, "storage_url": None, "name": name}
        return parse_config(data, f"{self.place}/{layout.RECORD}")

    def artefact(self, key: str) -> Path:
        """The path that the record has for ``key``; behind a URL, in this machine's mirror, fetched if it is not there.

        Raises UserError if it is outside the storage path.
        """
        recorded, root = Path(self.record[key]), self.path.resolve().parent
        if self.mirror is not None and layout.SHARED in recorded.parts:
            kind = recorded.parts.index(layout.SHARED)
            pull_shared(self.config, root.joinpath(*recorded.parts[kind : kind + 3]))
            recorded = root.joinpath(*recorded.parts[kind:])
        return check_inside(recorded, root, f"the {key.replace('_', ' ')} of {self.place}/{layout.RECORD}")

    def check(self) -> None:
        """Before a file is written: raise LeaseLostError if another driver has taken over."""
        if self.lease is not None:
            self.lease.check()

    def sync(self) -> None:
        """Behind a URL, send what has changed."""
        self.check()
        if self.mirror is not None:
            self.mirror.push()

    def save(self) -> None:
        self.check()
        atomic_write_text(self.path / layout.RECORD, json.dumps(self.record, indent=1) + "\n")

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
            with suppress(LeaseLostError, StorageError):  # the record is another driver's by then, or the disk is full
                self.save()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record that the stage goes on; add the time spent inside to its seconds, also when it is interrupted."""
        log = self.path / layout.EVALUATIONS
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
            self.sync()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent by stage, over all attempts."""
        return dict(self.record["stages"])
