"""Reads state, progress and best genome of a run from its directory, without a cluster, a model or a lock.

Of a run behind a URL the remote files are read, as of the last push; no mirror is touched.

A run may be writing meanwhile, or have been killed while it wrote: incomplete lines and missing files are skipped. What
no run writes makes the state ``damaged``, with a sentence on it.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.errors import StorageError, UserError, expecting
from bitgenome.storage.lease import is_owned
from bitgenome.storage.run_files import RunFiles, record_in, run_files
from bitgenome.storage.run_names import has_run
from workers.storage.folders import is_url, mirror_root, open_folder


@dataclass(frozen=True)
class RunStatus:
    """The state of a run; a field is None if the run directory does not tell it."""

    name: str
    path: str
    state: str  # running, stopped, finished, failed or damaged
    error: str | None = None  # why it failed, or what is damaged
    stage: str | None = None  # the last stage that began
    stage_since: float | None = None  # seconds since the epoch
    generation: int = 0
    evaluations: int = 0  # genomes evaluated by the search
    expected: int | None = None
    best_loss: float | None = None  # before healing
    best_kl: float | None = None  # of a finished run, that of its file: after healing, if it was applied
    best_on: str | None = None  # the text of the figures: search, or validation
    healed: bool = False
    best_bytes: int | None = None
    bits_per_weight: float | None = None
    budget_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, over all attempts
    seconds_left: float | None = None  # until the search ends
    workers: int | None = None  # when the run began
    last_line: str | None = None  # of events.log


class Lines:
    """Reads a growing JSON Lines file; ``new`` yields the objects that it has not yielded yet.

    ``count`` is the number of complete lines read so far.
    """

    def __init__(self, files: RunFiles, name: str):
        self._files, self._name = files, name
        self._offset = 0
        self.count = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of complete lines that were appended since the last call. Raises ValueError."""
        if self._files.size(self._name) < self._offset:  # truncated or replaced
            self._offset = self.count = 0
        for line in self._files.lines(self._name, self._offset):
            if not line.endswith(b"\n"):
                return
            yield json.loads(line)
            self._offset += len(line)  # not if the reader did not understand the line: it comes again
            self.count += 1


class RunReader:
    """Reads the run directory at a path or URL repeatedly, each time only what was appended.

    ``learn`` is given every evaluation as it is read; the ``files`` are as of the last reading. Raises UserError if
    there is no run, and StorageError if storage cannot be read.
    """

    def __init__(self, location: str | Path, learn: Callable[[Mapping[str, Any]], None] | None = None):
        self.location = str(location).rstrip("/")
        self.files = run_files(location)
        self._also = learn
        if not self.files.size(layout.RECORD) and not has_run(self.location):
            raise UserError(f"expected a run directory with {layout.RECORD}, found none at {location}")
        self._lines = Lines(self.files, layout.EVALUATIONS)
        self._genomes: set[tuple[int, ...]] = set()
        self._best: dict[tuple[int, int], dict[str, Any]] = {}  # by tokens and draw of the search text
        self._text = (-1, 0)  # tokens and draw of the longest text, of equally long ones the last read

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.location.rpartition("/")[2]

    def read(self, running: bool = False) -> RunStatus:
        """Return the present state of the run.

        ``running`` tells that the caller watches the run's process and knows that it runs; otherwise its lease is read.
        """
        self.files.look()
        try:
            with expecting("figures", self.location, f"bitgenome resume {self.location} tells more"):
                return self._read(running)
        except StorageError:
            raise
        except UserError as error:  # of one run of many: the others are shown too
            return RunStatus(self.name, self.location, "damaged", str(error))

    def _read(self, running: bool) -> RunStatus:
        """Return the present state. Raises UserError for a file that no run writes."""
        with self._expecting("a run record", layout.RECORD):
            record = record_in(self.files.content(layout.RECORD), self._source(layout.RECORD))
            state = "running" if running else self._state(record)
            seconds = self._seconds(record, state)
            stage = record.get("stage") or {}
            stage_name, since = stage.get("name"), stage.get("since")
        with self._expecting("evaluations", layout.EVALUATIONS):
            for evaluation in self._lines.new():
                self._learn(evaluation)
                if self._also:
                    self._also(evaluation)
            best = self._best.get(self._text, {})
        healed = False
        if state == "finished" and self.files.size(layout.BEST):
            resume = f"bitgenome resume {self.location} writes it again"
            with expecting("the result of a run", self._source(layout.BEST), resume):
                result = json.loads(self.files.content(layout.BEST))
                best = dict(result["winner"])
                healing = result.get("healing") or {}
                if healed := bool(healing.get("applied")):
                    best["kl"] = healing[best["split"]]["after"]["kl"]
        with self._expecting("generations", layout.GENERATIONS):
            generations = self.files.tail(layout.GENERATIONS)
            last = json.loads(generations[-1])["generation"] if generations else 0
        size, weights = best.get("file_bytes"), record.get("weights")
        events = self.files.tail(layout.EVENTS)
        return RunStatus(
            name=self.name,
            path=self.location,
            state=state,
            error=str(record.get("error")) if state == "failed" else None,
            stage=stage_name,
            stage_since=since,
            generation=last,
            evaluations=len(self._genomes),
            expected=record.get("expected_evaluations"),
            best_loss=best.get("loss"),
            best_kl=best.get("kl"),
            best_on=best.get("split"),
            healed=healed,
            best_bytes=size,
            bits_per_weight=8 * size / weights if size and weights else None,
            budget_bytes=record.get("budget_bytes"),
            seconds=seconds,
            seconds_left=self._seconds_left(record, state),
            workers=record.get("workers"),
            last_line=events[-1] if events else None,
        )

    def _expecting(self, what: str, name: str) -> AbstractContextManager[None]:
        """Return a context that says what is wrong with the file ``name``."""
        return expecting(what, self._source(name), f"restore it, or begin a run of another name than {self.name}")

    def _source(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _learn(self, evaluation: Mapping[str, Any]) -> None:
        """Take one evaluation into account, if it is on search text."""
        if evaluation["split"] != "search":
            return
        self._genomes.add(tuple(evaluation["genome"]))
        text = (int(evaluation["tokens"]), int(evaluation.get("draw", 0)))
        if text[0] >= self._text[0]:
            self._text = text
        loss, best = evaluation["loss"], self._best.get(text)
        if loss is not None and (best is None or loss < best["loss"]):
            self._best[text] = dict(evaluation)

    def _state(self, record: Mapping[str, Any]) -> str:
        """Return running, finished, failed or stopped."""
        if is_owned(self._lease_place(record)):
            return "running"
        if (ended := record.get("ended")) or not self.files.size(layout.BEST):
            return str(ended or "stopped")
        return "finished" if self.files.record(layout.BEST).get("proof") else "stopped"

    def _lease_place(self, record: Mapping[str, Any]) -> str:
        """Return the path or URL where the run's driver holds its lease: of a mirror, the URL."""
        config = record.get("config")
        url = config.get("storage_url") if isinstance(config, dict) else None
        if url and Path(self.location).absolute().parent.name == mirror_root(url).name:
            return f"{url}/{self.name}"
        return self.location

    @staticmethod
    def _seconds(record: Mapping[str, Any], state: str) -> dict[str, float]:
        """Return the seconds of every stage, those of the running one until the present."""
        seconds, stage = {str(k): float(v) for k, v in record.get("stages", {}).items()}, record.get("stage") or {}
        if state == "running" and "since" in stage:
            seconds[stage["name"]] = round(seconds.get(stage["name"], 0.0) + max(0.0, time.time() - stage["since"]), 2)
        return seconds

    def _seconds_left(self, record: Mapping[str, Any], state: str) -> float | None:
        """Return the seconds until the search ends, at the rate of this attempt.

        None in other stages, and until there is a rate.
        """
        stage, expected = record.get("stage") or {}, record.get("expected_evaluations")
        if state != "running" or stage.get("name") != "search" or not expected or not self._genomes:
            return None
        done, passed = self._lines.count - stage.get("evaluations", 0), time.time() - stage["since"]
        if done <= 0 or passed <= 0:
            return None
        lines_a_genome = self._lines.count / len(self._genomes)
        return round(max(0, expected - len(self._genomes)) * lines_a_genome * passed / done, 1)


def runs_under(storage: str) -> list[str]:
    """Return the run directories below a storage path or URL, sorted by name.

    Raises UserError if the path is not a directory, or if there is no run below the URL.
    """
    if is_url(storage):
        found = [name.split("/") for name in open_folder(storage).sizes()]
        runs = sorted(name for name, *rest in found if rest == [layout.RECORD])
        if not runs:
            raise UserError(f"expected a storage path with runs, found none at {storage}")
        return [f"{storage.rstrip('/')}/{name}" for name in runs]
    if not Path(storage).is_dir():
        raise UserError(f"expected a storage path with runs, found no folder at {storage}")
    return sorted(str(path.parent) for path in Path(storage).glob(f"*/{layout.RECORD}"))
