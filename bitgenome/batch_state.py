"""Where the runs of a batch stand, as their directories and logs tell it."""

import json
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from bitgenome.batch_config import BatchRun
from bitgenome.searching import GENERATIONS_FILE


class Stage(StrEnum):
    WAITING = "waiting"
    PREPARING = "preparing"
    SEARCHING = "searching"
    FINISHING = "finishing"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass
class RunState:
    """One run; ``log`` is what its process says."""

    run: BatchRun
    log: Path
    stage: Stage = Stage.WAITING
    generation: int = 0
    genomes: int = 0  # evaluated in the search
    best_loss: float | None = None
    sentence: str = ""  # why it failed
    _since: tuple[float, int] | None = field(default=None, repr=False)  # when this process was first seen to search

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
        """Read what a live run has written; whether something changed."""
        before = (self.stage, self.generation, self.genomes)
        file = self.run.directory / GENERATIONS_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if lines and self.live:
            last = json.loads(lines[-1])
            self.generation, self.genomes, self.best_loss = last["generation"], last["genomes"], last["best_loss"]
            self.stage = Stage.SEARCHING if self.generation < self.generations else Stage.FINISHING
            self._since = self._since or (time.monotonic(), self.genomes)
        return before != (self.stage, self.generation, self.genomes)

    @property
    def seconds_left(self) -> float | None:
        """Of the search, at the pace of this process so far; None where nothing is known."""
        if self.stage is not Stage.SEARCHING or self._since is None:
            return None
        started, genomes = self._since
        if self.genomes == genomes:
            return None
        pace = (time.monotonic() - started) / (self.genomes - genomes)
        return pace * (self.run.plan.search_evaluations - self.genomes)

    def end(self, code: int) -> None:
        """The run's process has ended with ``code``, negative for a signal."""
        self.refresh()
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
