"""The archive of a run, evaluations.jsonl: one line per evaluation, appended and never rewritten.

Only the offset of each evaluation and the best ones are kept in memory: a search of 100,000 evaluations needs hardly
more than one of a hundred.
"""

import json
import os
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from bitgenome.common.errors import UserError
from bitgenome.common.files import cut_torn_tail, disk_errors, sync_folder
from search.types import Evaluation, Fidelity, Genome, fingerprint, rank

MOST_BEST = 16  # best evaluations of each fidelity that are kept in memory, in order


class EvaluationLog:
    """An evaluation log keeps evaluations on disk in the order they came, and finds them by (genome, fidelity).

    ``before_write`` is called before every line, and prevents the write by raising.

    Opening repairs a torn last line (as a killed process or a power cut leaves it) by cutting it off, and raises
    ValueError for any other line that is no evaluation. ``answered`` counts genomes that needed no evaluation because
    they were in the log; callers that look up before evaluating add to it.
    """

    def __init__(self, path: Path | str, before_write: Callable[[], None] = lambda: None) -> None:
        self.path = Path(path)
        self.answered = 0
        self._before_write = before_write
        self._places: dict[Fidelity, dict[bytes, int]] = defaultdict(dict)  # byte offset in the file, by fingerprint
        self._best: dict[Fidelity, list[Evaluation]] = defaultdict(list)
        self._genomes: dict[str, set[bytes]] = defaultdict(set)  # fingerprints by split
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(self.path)
        self._stream = self.path.open("ab", buffering=0)  # a line that a full disk refused is not retried
        self._reader = self.path.open("rb")
        self._load()
        sync_folder(self.path.parent)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def __iter__(self) -> Iterator[Evaluation]:
        """Yield the evaluations, oldest first, read from the file."""
        for _, line in self._lines():
            yield Evaluation.from_json(json.loads(line))

    def __contains__(self, found: tuple[Genome, Fidelity]) -> bool:
        genome, fidelity = found
        return fidelity in self._places and fingerprint(genome) in self._places[fidelity]

    def get(self, genome: Genome, fidelity: Fidelity) -> Evaluation | None:
        """Return the evaluation of ``genome`` at ``fidelity``, read from the file; None if there is none."""
        if (genome, fidelity) not in self:
            return None
        self._reader.seek(self._places[fidelity][fingerprint(genome)])
        return Evaluation.from_json(json.loads(self._reader.readline()))

    @property
    def fidelities(self) -> list[Fidelity]:
        """Fidelities in the log, in the order of their first evaluations."""
        return list(self._places)

    def at(self, fidelity: Fidelity) -> Iterator[Evaluation]:
        """Yield all evaluations of ``fidelity``, oldest first, read from the file."""
        return (evaluation for evaluation in self if evaluation.fidelity == fidelity)

    def best(self, fidelity: Fidelity, count: int) -> list[Evaluation]:
        """Return the ``count`` best evaluations of ``fidelity``, at most MOST_BEST, best first."""
        return self._best[fidelity][: min(count, MOST_BEST)]

    def genomes(self, split: str) -> int:
        """Return how many genomes have been evaluated on ``split``."""
        return len(self._genomes[split])

    def append(self, evaluation: Evaluation) -> None:
        """Write one line, which survives the death of this process; ``sync`` makes it survive a power cut.

        Raises ValueError if the genome already has a line at this fidelity, StorageError if the disk cannot take it.
        """
        if (evaluation.genome, evaluation.fidelity) in self:
            raise ValueError(f"genome {evaluation.genome} is already in {self.path} at {evaluation.fidelity}")
        self._before_write()
        line = memoryview(json.dumps(evaluation.to_json(), allow_nan=False).encode() + b"\n")
        with disk_errors(self.path):
            place = self._stream.seek(0, os.SEEK_END)
            while line:
                line = line[self._stream.write(line) :]  # a full disk may take a part of it
        self._take(evaluation, place)

    def sync(self) -> None:
        """Flush appended lines to the disk with fsync; called once per batch. Raises StorageError if that fails."""
        with disk_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        self._reader.close()

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines of the file, each with the offset of its first byte."""
        place = 0
        with self.path.open("rb") as stream:
            for line in stream:
                yield place, line
                place += len(line)

    def _load(self) -> None:
        for number, (place, line) in enumerate(self._lines(), start=1):
            evaluation = _parse(line)
            if evaluation is None:
                raise UserError(
                    f"expected an evaluation in line {number} of {self.path}, found {line[:80]!r}: remove that line, "
                    "and resume the run, which evaluates again what is missing"
                )
            fidelity = evaluation.fidelity
            if (evaluation.genome, fidelity) in self:
                raise UserError(f"line {number} of {self.path} repeats genome {evaluation.genome} at {fidelity}")
            self._take(evaluation, place)

    def _take(self, evaluation: Evaluation, place: int) -> None:
        key = fingerprint(evaluation.genome)
        self._places[evaluation.fidelity][key] = place
        self._genomes[evaluation.split].add(key)
        best = self._best[evaluation.fidelity]
        if len(best) < MOST_BEST or rank(evaluation) < rank(best[-1]):
            insort(best, evaluation, key=rank)
            del best[MOST_BEST:]


def _parse(line: bytes) -> Evaluation | None:
    try:
        found = Evaluation.from_json(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    numbers = (found.loss, found.kl, found.reconstruction, *found.window_kl)
    whole = (*found.genome, found.file_bytes, found.tokens, found.draw)
    sound = isinstance(found.split, str) and all(type(value) is int for value in whole)
    return found if sound and all(isinstance(value, float | int) for value in numbers) else None
