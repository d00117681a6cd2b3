"""evaluations.jsonl: every evaluation of a run, one line each, appended and never rewritten."""

import json
import os
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from search.errors import UserError
from search.files import cut_torn_tail, disk_errors, sync_folder
from search.types import Evaluation, Fidelity, Genome, rank

MOST_BEST = 16  # evaluations of a fidelity that are kept in order


class EvaluationLog:
    """The archive of evaluations, in memory by (genome, fidelity) and on disk in the order they came.

    ``before_write`` is called in front of every line, and keeps it from being written by raising.

    Opening repairs a torn last line (what a killed process or a power cut leaves) by cutting it off, and raises
    ValueError for any other line that is no evaluation. ``answered`` counts genomes that needed no evaluation because
    they were here: whoever looks up before evaluating adds to it.
    """

    def __init__(self, path: Path | str, before_write: Callable[[], None] = lambda: None) -> None:
        self.path = Path(path)
        self.answered = 0
        self._before_write = before_write
        self._evaluations: dict[Fidelity, dict[Genome, Evaluation]] = defaultdict(dict)
        self._order: list[Evaluation] = []
        self._best: dict[Fidelity, list[Evaluation]] = defaultdict(list)
        self._genomes: dict[str, set[Genome]] = defaultdict(set)  # by split
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(self.path)
        self._load()
        self._stream = self.path.open("ab", buffering=0)  # a line that found no room is not tried again
        sync_folder(self.path.parent)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Evaluation]:
        """Evaluations, oldest first."""
        return iter(self._order)

    def get(self, genome: Genome, fidelity: Fidelity) -> Evaluation | None:
        return self._evaluations[fidelity].get(genome)

    def at(self, fidelity: Fidelity) -> list[Evaluation]:
        """Every evaluation of ``fidelity``, oldest first."""
        return list(self._evaluations[fidelity].values())

    def best(self, fidelity: Fidelity, count: int) -> list[Evaluation]:
        """The ``count`` best of ``fidelity``, at most MOST_BEST, best first."""
        return self._best[fidelity][: min(count, MOST_BEST)]

    def genomes(self, split: str) -> int:
        """How many genomes have been evaluated on ``split``."""
        return len(self._genomes[split])

    def append(self, evaluation: Evaluation) -> None:
        """Write one line, which survives the death of this process; ``sync`` makes it survive a power cut.

        Raises ValueError if the genome already has a line at this fidelity.
        """
        if self.get(evaluation.genome, evaluation.fidelity) is not None:
            raise ValueError(f"genome {evaluation.genome} is already in {self.path} at {evaluation.fidelity}")
        self._before_write()
        line = memoryview(json.dumps(evaluation.to_json(), allow_nan=False).encode() + b"\n")
        with disk_errors(self.path):
            while line:
                line = line[self._stream.write(line) :]  # a full disk may take a part of it
        self._take(evaluation)

    def sync(self) -> None:
        """fsync what was appended, once a batch."""
        with disk_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def _load(self) -> None:
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            evaluation = _parse(line)
            if evaluation is None:
                raise UserError(f"line {number} of {self.path} is not an evaluation: {line[:80]!r}")
            fidelity = evaluation.fidelity
            if self.get(evaluation.genome, fidelity) is not None:
                raise UserError(f"line {number} of {self.path} repeats genome {evaluation.genome} at {fidelity}")
            self._take(evaluation)

    def _take(self, evaluation: Evaluation) -> None:
        self._evaluations[evaluation.fidelity][evaluation.genome] = evaluation
        self._order.append(evaluation)
        self._genomes[evaluation.split].add(evaluation.genome)
        best = self._best[evaluation.fidelity]
        if len(best) < MOST_BEST or rank(evaluation) < rank(best[-1]):
            insort(best, evaluation, key=rank)
            del best[MOST_BEST:]


def _parse(line: bytes) -> Evaluation | None:
    try:
        return Evaluation.from_json(json.loads(line))
    except (ValueError, TypeError, KeyError):
        return None
