"""Where the runs of a batch stand, as their directories and logs tell it."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgenome.common import layout
from bitgenome.common.files import json_object
from bitgenome.observe.run_status import RunReader

if TYPE_CHECKING:  # who only reads states needs none of what checks configurations
    from bitgenome.batch.config import BatchRun

SHARED_STAGES = ("workers", "gene groups", "calibration", "scaling", "bank", "sensitivity")  # until the search begins

ERROR, ERROR_LEVELS = "error: ", ("ERROR", "CRITICAL")  # in a log of lines, and in one of JSON


class Stage(StrEnum):
    WAITING = "waiting"
    PREPARING = "preparing"
    SEARCHING = "searching"
    FINISHING = "finishing"
    FINISHED = "finished"
    FAILED = "failed"


def stage_of(doing: str) -> Stage:
    """What a run's own stage is in a batch."""
    if doing in SHARED_STAGES:
        return Stage.PREPARING
    return Stage.SEARCHING if doing == "search" else Stage.FINISHING


@dataclass
class RunState:
    """One run; ``log`` is what its process says."""

    run: "BatchRun"
    log: Path
    stage: Stage = Stage.WAITING
    doing: str = ""  # the run's own stage
    generation: int = 0
    genomes: int = 0  # evaluated in the search
    best_loss: float | None = None
    seconds_left: float | None = None  # of the search
    sentence: str = ""  # why it failed
    figures: dict[str, Any] | None = None  # of its result, once they were read
    _begun: float = 0.0  # when its process was started
    _log_bytes: int = 0  # of earlier processes
    _reader: RunReader | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def live(self) -> bool:
        return self.stage in (Stage.PREPARING, Stage.SEARCHING, Stage.FINISHING)

    @property
    def generations(self) -> int:
        """Of the whole search."""
        search = self.run.config.search
        return 1 if search.strategy == "exact" else search.generations

    def begin(self) -> None:
        """Its process is about to be started, with a log behind that of earlier ones."""
        self.stage, self._begun = Stage.PREPARING, round(time.time(), 2)  # as precise as a run's record
        self._log_bytes = self.log.stat().st_size if self.log.is_file() else 0

    def refresh(self) -> bool:
        """Read what a live run has written; whether something worth a line changed."""
        before = (self.stage, self.doing, self.generation)
        if self._reader is None:
            if not (self.run.directory / layout.RECORD).is_file():
                return False
            self._reader = RunReader(self.run.directory)
        status = self._reader.read(running=True)
        self.generation, self.genomes, self.best_loss = status.generation, status.evaluations, status.best_loss
        self.seconds_left = status.seconds_left
        if status.stage and (status.stage_since or 0.0) >= self._begun:  # and not what an earlier process had come to
            self.doing = status.stage
            self.stage = stage_of(status.stage)
        return before != (self.stage, self.doing, self.generation)

    def end(self, code: int) -> None:
        """The run's process has ended with ``code``, negative for a signal."""
        self.doing = ""
        if code == 0 and self.run.finished:
            self.stage, self.sentence = Stage.FINISHED, ""
        else:
            self.stage, self.sentence = Stage.FAILED, last_words(self.log, code, self._log_bytes)


def last_words(log: Path, code: int, start: int = 0) -> str:
    """One sentence on why a process ended with ``code`` that began its log, of lines or JSON, at byte ``start``."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [said(line) for line in text.splitlines() if line.strip()]
    errors = [sentence for is_error, sentence in lines if is_error]
    if errors:
        return errors[-1]
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    last = f", last said: {lines[-1][1]}" if lines else ""
    return f"expected the run to finish, found it ended {how}{last}"


def said(line: str) -> tuple[bool, str]:
    """Whether a line of a log is an error, and what it says."""
    record = json_object(line.encode())
    if "message" in record:
        return record.get("levelname") in ERROR_LEVELS, str(record["message"])
    return line.startswith(ERROR), line.removeprefix(ERROR).strip()
