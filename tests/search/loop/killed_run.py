"""A search that a test kills: python -m tests.search.loop.killed_run FOLDER STRATEGY LADDER BYTES.

The process ends without any clean-up after writing BYTES bytes of evaluations.jsonl, in the middle of a line if so.
"""

import os
import sys
from pathlib import Path

from search.allocation.seeds import reference_genomes, seed_genomes
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.ladder import Ladder
from search.loop.search import run_search, with_table_rung
from search.loop.winner import Winner, choose_winner
from search.strategies.factory import make_strategy
from search.strategies.settings import GeneticSettings, OptunaSettings, RandomSettings
from tests.search.synthetic import VALIDATION, Landscape, middle_budget, random_table, transformer_space

SETTINGS = {
    "genetic": GeneticSettings(population=8, generations=4, elites=3, brood=3),
    "optuna": OptunaSettings(evaluations=24, batch_size=8, startup=8),
    "random": RandomSettings(evaluations=24, batch_size=8),
    "exact": None,
}
LADDERS = {
    "one rung": Ladder((1024,)),
    "rungs": Ladder((0, 512, 1024)),
    "rungs of new text": Ladder((0, 512, 1024), refresh=2),
}


class DyingStream:
    """A file that takes ``left`` more bytes, then ends the process."""

    def __init__(self, stream, left: int) -> None:  # type: ignore[no-untyped-def]
        self._stream, self._left = stream, left

    def write(self, data: bytes) -> int:
        written: int = self._stream.write(data[: self._left])
        self._left -= len(data)
        if self._left < 0:
            self._stream.flush()
            os._exit(9)
        return written

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._stream, name)


def run(
    folder: Path, strategy: str, ladder: str = "one rung", bytes_left: int | None = None
) -> tuple[EvaluationLog, Winner, Landscape]:
    """One whole search with its choice of a winner, resumed from whatever lies in ``folder``."""
    space = transformer_space(2)
    budget, table = middle_budget(space), random_table(space, 0)
    landscape = Landscape(space, table, 1.0, noise=0.02)
    evaluate = with_table_rung(landscape, space, table)
    seeds = seed_genomes(space, budget, [table])
    made = make_strategy(strategy, space, budget, tables=[table], seeds=seeds, settings=SETTINGS[strategy])
    log = EvaluationLog(folder / "evaluations.jsonl")
    if bytes_left is not None:
        log._stream = DyingStream(log._stream, bytes_left)  # type: ignore[assignment]
    rungs = LADDERS[ladder]
    run_search(made, evaluate, log, rungs, checkpoint=Checkpoint(folder / "checkpoint.json", "digest"))
    references = reference_genomes(space, budget, seeds)
    winner = choose_winner(log, evaluate, ladder=rungs, validation=VALIDATION, references=references)
    return log, winner, landscape


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
