"""Follows the runs of a batch by their directories and logs."""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgenome.common import layout
from bitgenome.common.files import json_object
from bitgenome.observe.run_status import RunReader

if TYPE_CHECKING:  # reading states does not need what checks configurations
    from bitgenome.batch.config import BatchRun

SHARED_STAGES = ("workers", "text", "gene groups", "calibration", "scaling", "bank", "sensitivity")  # before the search

ERROR, ERROR_LEVELS = "error: ", ("ERROR", "CRITICAL")  # marks of an error in a log of lines, and in a log of JSON


class Stage(StrEnum):
    """Stages of a run, as its batch sees them."""

    WAITING = "waiting"
    PREPARING = "preparing"
    SEARCHING = "searching"
    FINISHING = "finishing"
    FINISHED = "finished"
    FAILED = "failed"


def stage_of(doing: str) -> Stage:
    """Return the batch's stage for a run's own stage."""
    if doing in SHARED_STAGES:
        return Stage.PREPARING
    return Stage.SEARCHING if doing == "search" else Stage.FINISHING


@dataclass
class RunState:
    """The state of one run; ``log`` is the file that its process writes to."""

    run: "BatchRun"
    log: Path
    stage: Stage = Stage.WAITING
    doing: str = ""  # the run's own stage
    generation: int = 0
    genomes: int = 0  # evaluated in the search
    best_loss: float | None = None
    seconds_left: float | None = None  # of the search
    sentence: str = ""  # why it failed
    figures: dict[str, Any] | None = None  # of its result, once they are read
    _begun: float = 0.0  # when its process was started
    _log_bytes: int = 0  # length of the log of earlier processes
    _reader: RunReader | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.name

    @property
    def live(self) -> bool:
        """Whether the run's process is running."""
        return self.stage in (Stage.PREPARING, Stage.SEARCHING, Stage.FINISHING)

    @property
    def generations(self) -> int:
        """Number of generations of the whole search."""
        search = self.run.config.search
        return 1 if search.strategy == "exact" else search.generations

    def begin(self) -> None:
        """Take note that the run's process is about to start; its log is appended to that of earlier ones."""
        self.stage, self._begun = Stage.PREPARING, round(time.time(), 2)  # as precise as a run's record
        self._log_bytes = self.log.stat().st_size if self.log.is_file() else 0

    def refresh(self) -> bool:
        """Read what a live run has written, and return whether something worth a line has changed."""
        before = (self.stage, self.doing, self.generation)
        if self._reader is None:
            if not (self.run.directory / layout.RECORD).is_file():
                return False
            self._reader = RunReader(self.run.directory)
        status = self._reader.read(running=True)
        self.generation, self.genomes, self.best_loss = status.generation, status.evaluations, status.best_loss
        self.seconds_left = status.seconds_left
        if status.stage and (status.stage_since or 0.0) >= self._begun:  # not the stage of an earlier process
            self.doing = status.stage
            self.stage = stage_of(status.stage)
        return before != (self.stage, self.doing, self.generation)

    def end(self, code: int) -> None:
        """Take note that the run's process has ended with ``code``, negative for a signal."""
        self.doing = ""
        if code == 0 and self.run.finished:
            self.stage, self.sentence = Stage.FINISHED, ""
        else:
            self.stage, self.sentence = Stage.FAILED, last_words(self.log, code, self._log_bytes)


def last_words(log: Path, code: int, start: int = 0) -> str:
    """Return one sentence on why a process ended with ``code``.

    The process's log, of lines or JSON, starts at byte ``start`` of ``log``.
    """
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [said(line) for line in text.splitlines() if line.strip()]
    errors = [sentence for is_error, sentence in lines if is_error]
    if errors:
        return errors[-1]
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    last = f", last said: {lines[-1][1]}" if lines else ""
    return f"expected the run to finish, found it ended {how}{last}"


def said(line: str) -> tuple[bool, str]:
    """Return whether a line of a log is an error, and its message."""
    record = json_object(line.encode())
    if "message" in record:
        return record.get("levelname") in ERROR_LEVELS, str(record["message"])
    return line.startswith(ERROR), line.removeprefix(ERROR).strip()
