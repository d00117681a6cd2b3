"""Where the runs of a batch stand, as their directories and logs tell it."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from bitgenome.batch_config import BatchRun
from bitgenome.run_status import RECORD, RunReader

SHARED_STAGES = ("workers", "gene groups", "calibration", "scaling", "bank", "sensitivity")  # until the search begins


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

    run: BatchRun
    log: Path
    stage: Stage = Stage.WAITING
    doing: str = ""  # the run's own stage
    generation: int = 0
    genomes: int = 0  # evaluated in the search
    best_loss: float | None = None
    seconds_left: float | None = None  # of the search
    sentence: str = ""  # why it failed
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

    def refresh(self) -> bool:
        """Read what a live run has written; whether something worth a line changed."""
        before = (self.stage, self.doing, self.generation)
        if self._reader is None:
            if not (self.run.directory / RECORD).is_file():
                return False
            self._reader = RunReader(self.run.directory)
        status = self._reader.read()
        self.generation, self.genomes, self.best_loss = status.generation, status.evaluations, status.best_loss
        self.seconds_left = status.seconds_left
        if status.state == "running" and status.stage:  # and not what an earlier process had come to
            self.doing = status.stage
            self.stage = stage_of(status.stage)
        return before != (self.stage, self.doing, self.generation)

    def end(self, code: int) -> None:
        """The run's process has ended with ``code``, negative for a signal."""
        self.doing = ""
        if code == 0 and self.run.finished:
            self.stage, self.sentence = Stage.FINISHED, ""
        else:
            self.stage, self.sentence = Stage.FAILED, last_words(self.log, code)


def last_words(log: Path, code: int) -> str:
    """One sentence on why a process with this log ended with ``code``."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    said = f", last said: {lines[-1].strip()}" if lines else ""
    return f"expected the run to finish, found it ended {how}{said}"
