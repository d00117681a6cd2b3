"""What a run directory says of its run: state, progress and best genome, read without a cluster, a model or a lock.

A run may be writing meanwhile, or have been killed while it wrote: lines without an end and files that are not there
yet are passed over.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgenome.lease import FOLDER, TTL_S, Claim, since_start, this_machine
from search.errors import UserError

RECORD, EVALUATIONS, GENERATIONS, BEST, EVENTS = (
    "run.json", "evaluations.jsonl", "generations.jsonl", "best.json", "events.log",
)  # fmt: skip
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class RunStatus:
    """A run as it stands; None is what its directory does not say."""

    name: str
    path: str
    state: str  # running, stopped, finished or failed
    error: str | None  # why it failed
    stage: str | None  # the last one that began
    stage_since: float | None  # seconds since the epoch
    generation: int
    evaluations: int  # genomes searched
    expected: int | None
    best_loss: float | None
    best_kl: float | None
    best_bytes: int | None
    bits_per_weight: float | None
    budget_bytes: int | None
    seconds: dict[str, float]  # by stage, over all attempts
    seconds_left: float | None  # of the search
    workers: int | None  # that the run began with
    last_line: str | None  # of its log


class Lines:
    """A growing file of JSON objects, a line each, of which ``new`` gives those that are whole and not yet given."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0
        self.count = 0

    def new(self) -> Iterator[dict[str, Any]]:
        if size_of(self._path) < self._offset:  # cut or begun anew
            self._offset = self.count = 0
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    self.count += 1
                    if record := parsed(line):
                        yield record
        except OSError:
            return


class RunReader:
    """Reads one run directory again and again, what was appended since only. Raises UserError if it is none."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / RECORD).is_file():
            raise UserError(f"expected a run directory with {RECORD}, found none at {path}")
        self._lines = Lines(path / EVALUATIONS)
        self._genomes: set[tuple[int, ...]] = set()
        self._best: dict[tuple[int, int], dict[str, Any]] = {}  # by tokens and draw of the search's text
        self._text = (-1, 0)  # the longest, and of those the last read

    def read(self, running: bool = False) -> RunStatus:
        """As it stands; ``running`` is what somebody knows who watches its process, else its lease is looked at."""
        record = json_of(self.path / RECORD)
        for evaluation in self._lines.new():
            self._learn(evaluation)
        state = "running" if running else self._state(record)
        winner = json_of(self.path / BEST) if state == "finished" else {}
        best = winner.get("winner") or self._best.get(self._text, {})
        size, weights = best.get("file_bytes"), record.get("weights")
        generations = read_tail(self.path / GENERATIONS)
        last = parsed(generations[-1].encode()) if generations else None
        events = read_tail(self.path / EVENTS)
        stage = record.get("stage") or {}
        return RunStatus(
            name=self.path.name,
            path=str(self.path),
            state=state,
            error=record.get("error") if state == "failed" else None,
            stage=stage.get("name"),
            stage_since=stage.get("since"),
            generation=(last or {}).get("generation", 0),
            evaluations=len(self._genomes),
            expected=record.get("expected_evaluations"),
            best_loss=best.get("loss"),
            best_kl=best.get("kl"),
            best_bytes=size,
            bits_per_weight=8 * size / weights if size and weights else None,
            budget_bytes=record.get("budget_bytes"),
            seconds=self._seconds(record, state),
            seconds_left=self._seconds_left(record, state),
            workers=record.get("workers"),
            last_line=events[-1] if events else None,
        )

    def _learn(self, evaluation: Mapping[str, Any]) -> None:
        if evaluation.get("split") != "search":
            return
        self._genomes.add(tuple(evaluation.get("genome", ())))
        text = (evaluation.get("tokens", 0), evaluation.get("draw", 0))
        if text[0] >= self._text[0]:
            self._text = text
        loss, best = evaluation.get("loss"), self._best.get(text)
        if loss is not None and (best is None or loss < best["loss"]):
            self._best[text] = dict(evaluation)

    def _state(self, record: Mapping[str, Any]) -> str:
        if is_owned(self.path):
            return "running"
        return record.get("ended") or ("finished" if (self.path / BEST).is_file() else "stopped")

    @staticmethod
    def _seconds(record: Mapping[str, Any], state: str) -> dict[str, float]:
        """Of every stage, the present one's until now."""
        seconds, stage = dict(record.get("stages", {})), record.get("stage") or {}
        if state == "running" and "since" in stage:
            seconds[stage["name"]] = round(seconds.get(stage["name"], 0.0) + max(0.0, time.time() - stage["since"]), 2)
        return seconds

    def _seconds_left(self, record: Mapping[str, Any], state: str) -> float | None:
        """Of the search, at the rate of this attempt; None for other stages and before there is a rate."""
        stage, expected = record.get("stage") or {}, record.get("expected_evaluations")
        if state != "running" or stage.get("name") != "search" or not expected or not self._genomes:
            return None
        done, passed = self._lines.count - stage.get("evaluations", 0), time.time() - stage["since"]
        if done <= 0 or passed <= 0:
            return None
        lines_a_genome = self._lines.count / len(self._genomes)
        return round(max(0, expected - len(self._genomes)) * lines_a_genome * passed / done, 1)


def runs_under(storage: Path) -> list[Path]:
    """Run directories of a storage path, by name. Raises UserError if there is no such folder."""
    if not storage.is_dir():
        raise UserError(f"expected a storage path with runs, found no folder at {storage}")
    return sorted(path.parent for path in storage.glob(f"*/{RECORD}"))


def is_owned(run: Path) -> bool:
    """Whether a living driver has the run's lease.

    Of a driver on another machine only the time of its last beat can be seen, by this machine's clock.
    """
    claims = sorted((run / FOLDER).glob("*.json"))
    try:
        claim = Claim(**json_of(claims[-1]))
        beaten = since_start() - claim.beaten
        if claim.machine != this_machine():
            beaten = time.time() - claims[-1].stat().st_mtime
        return not claim.released and not claim.gone and beaten < max(TTL_S, claim.ttl)
    except (IndexError, TypeError, OSError):
        return False


def json_of(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none that can be read."""
    try:
        return parsed(path.read_bytes()) or {}
    except OSError:
        return {}


def parsed(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_tail(path: Path) -> list[str]:
    """The last whole lines of a file, up to ``TAIL_BYTES``."""
    size = size_of(path)
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, size - TAIL_BYTES))
            text = stream.read()
    except OSError:
        return []
    whole = text[: text.rfind(b"\n") + 1]
    return [line for line in whole.decode("utf-8", "replace").splitlines() if line]


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
