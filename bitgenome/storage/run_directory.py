"""Opens run directories: where a run's files are, which configuration it belongs to, and who may write there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig, parse_config
from bitgenome.storage.lease import Lease
from bitgenome.storage.mirror import RunMirror, mirrored
from bitgenome.storage.root import check_inside
from bitgenome.storage.run_record import RunRecord
from bitgenome.storage.shared import pull_shared
from workers.storage.folders import is_url


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ between two nested mappings."""
    keys = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


class RunDirectory:
    """The directory of a run with its record; made by ``owned``, ``create`` or ``open``."""

    def __init__(self, path: Path, record: RunRecord, mirror: RunMirror | None = None):
        self.path = path
        self.mirror = mirror  # None: storage is a local directory
        self.lease: Lease | None = None  # of the one driver that may write here
        self._use(record)

    def _use(self, record: RunRecord) -> None:
        """Take ``record`` as that of this directory, written only while no other driver has taken over."""
        self.record = record
        self.record.before_write = self.check

    @classmethod
    @contextmanager
    def owned(cls, config: RunConfig) -> Iterator["RunDirectory"]:
        """Yield the directory of ``config``, new or continued, as its only driver while the context lasts.

        Raises what ``create`` and ``own`` raise.
        """
        check_inside(config.storage_path / config.name, config.storage_path, f"the run {config.name}")
        location = f"{config.storage_root}/{config.name}"
        with Lease(location, f"the run {location}") as lease, mirrored(location) as mirror:
            directory = cls.create(config)
            directory.lease, directory.mirror = lease, mirror
            with directory.record.ending():
                yield directory
            directory.check()

    @classmethod
    def find(cls, config: RunConfig) -> "RunDirectory | None":
        """Return the directory of ``config`` if something was evaluated in it, else None.

        Raises UserError if it belongs to another configuration, naming the keys that differ, and for one that another
        version began and did not end.
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
        begun, ended = existing.record["config_digest"], (path / layout.BEST).is_file()
        if begun != config.digest and not ended:  # settings have come or gone: what is there is of other digests
            raise UserError(
                f"expected {path} to be begun by this version, found one of bitgenome "
                f"{existing.record['packages']['bitgenome']} with other settings: choose another name"
            )
        return existing

    @classmethod
    def create(cls, config: RunConfig) -> "RunDirectory":
        """Return the directory of ``config``, new or continued; one in which nothing was evaluated is started afresh.

        Raises UserError if it cannot be created, or belongs to another configuration, naming the keys that differ.
        """
        if existing := cls.find(config):
            existing.record["config"] = config.model_dump(mode="json")  # workers and paths may have changed
            existing.record.save()
            return existing
        path = config.storage_path / config.name
        try:
            path.mkdir(parents=True, exist_ok=True)
            for stale in (layout.SENSITIVITY, layout.GENE_GROUPS):  # left by an attempt that evaluated nothing
                (path / stale).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"expected to create the run directory {path}, found {error.strerror}") from None
        directory = cls(path, RunRecord.begin(path / layout.RECORD, config))
        directory.record.save()
        return directory

    @classmethod
    def open(cls, location: Path | str) -> "RunDirectory":
        """Return an existing run, at a path or URL.

        A link to a run elsewhere is refused: its artefacts are outside the storage path. Raises UserError if there is
        no run or its record cannot be read.
        """
        mirror = RunMirror(str(location)) if is_url(location) else None
        if mirror is None:
            check_inside(Path(location), Path(location).parent, f"the run {Path(location).name}")
        path = mirror.path if mirror else Path(location)
        file = path / layout.RECORD
        content = mirror.read(layout.RECORD) if mirror else file.read_bytes() if file.is_file() else None
        if content is None:
            raise UserError(f"expected a run directory with {layout.RECORD}, found none at {location}")
        return cls(path, RunRecord.parse(content, file, f"{location}/{layout.RECORD}"), mirror)

    @property
    def location(self) -> str:
        """Path or URL of the run directory."""
        return self.mirror.url if self.mirror else str(self.path)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Be the only driver of the run while the context lasts.

        Raises LeaseHeldError, before anything is touched, while another driver works on the run, and LeaseLostError
        once another driver has taken over.
        """
        with Lease(self.location, f"the run {self.location}") as self.lease:
            if self.mirror is not None:
                self.mirror.pull()
                file = self.path / layout.RECORD
                self._use(RunRecord.parse(file.read_bytes(), file, f"{self.location}/{layout.RECORD}"))
            yield
            self.sync()

    @property
    def config(self) -> RunConfig:
        """The configuration that the run was started with, but with the storage path and name where it was found."""
        parent, _, name = (self.mirror.url if self.mirror else str(self.path.resolve())).rpartition("/")
        data = {**self.record["config"], "storage_path": parent, "storage_url": None, "name": name}
        return parse_config(data, f"{self.location}/{layout.RECORD}")

    def artefact(self, key: str) -> Path:
        """Return the path that the record has for ``key``.

        Behind a URL it is a path in this machine's mirror, fetched if it is missing. Raises UserError if it is outside
        the storage path.
        """
        recorded, root = Path(self.record[key]), self.path.resolve().parent
        if self.mirror is not None and layout.SHARED in recorded.parts:
            kind = recorded.parts.index(layout.SHARED)
            pull_shared(self.config, root.joinpath(*recorded.parts[kind : kind + 3]))
            recorded = root.joinpath(*recorded.parts[kind:])
        what = f"the {key.replace('_', ' ')} of {self.location}/{layout.RECORD}"
        remedy = f": if the storage has moved, bitgenome resume {self.location} records its new place"
        return check_inside(recorded, root, what, remedy)

    def check(self) -> None:
        """Raise LeaseLostError if another driver has taken over; called before a file is written."""
        if self.lease is not None:
            self.lease.check()

    def sync(self) -> None:
        """Send what has changed, if storage is behind a URL. Raises LeaseLostError if another driver has taken over."""
        self.check()
        if self.mirror is not None:
            self.mirror.push()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record a stage and its time while the context lasts; behind a URL, send what it left."""
        log = self.path / layout.EVALUATIONS
        evaluations = log.read_bytes().count(b"\n") if log.exists() else 0
        self.record.begin_stage(name, evaluations)
        started = time.monotonic()
        try:
            yield
        finally:
            self.record.end_stage(name, time.monotonic() - started)
            self.sync()
