"""The base class of strategies: the ask/tell protocol, novelty and JSON state.

A strategy adds only what to try next.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from search.allocation.repair import Repair
from search.strategies.rng import rng_from_json, rng_to_json
from search.strategies.surrogate import usable
from search.types import Evaluation, Fidelity, Genome, Scored, fingerprint

Batch = list[Scored]  # in the order of ask, then the incumbents if the text is new

NOVELTY_TRIES = 40  # candidates drawn before the space counts as having no new genome


class BatchStrategy(ABC):
    """A batch strategy asks for one batch, waits for all its results, and never proposes a genome twice.

    The first ``ask`` makes the batch, and later ones repeat it until ``tell``; so does a strategy restored from
    state_dict.
    """

    looks_back = 0  # number of latest evaluations with a loss on text that proposals need

    def __init__(self, repair: Repair, seed: int) -> None:
        self.repair = repair
        self.space = repair.space
        self.rng = random.Random(seed)
        self.told: list[Batch] = []  # the latest batches; of earlier ones only the counts below remain
        self.batches = self.evaluations = 0  # counts of all that were told
        self._batch: list[Genome] | None = None
        self._seen: set[bytes] = set()  # fingerprints of all genomes told or in the batch

    @property
    @abstractmethod
    def expected_evaluations(self) -> int:
        """Number of genomes that the whole run will ask for; fewer if the space runs out of new ones."""

    @abstractmethod
    def _propose(self) -> list[Genome]:
        """Return the next batch of new feasible genomes; [] to finish."""

    @abstractmethod
    def _learn(self, batch: Batch) -> None:
        """Take in the losses of a batch; when a state is loaded this is called again for every batch."""

    def ask(self) -> list[Genome]:
        """Return feasible genomes to evaluate next; [] when finished. Returns the same ones again until ``tell``."""
        if self._batch is None:
            self._batch = self._propose()
        return list(self._batch)

    @property
    def incumbents(self) -> list[Genome]:
        """Genomes told before that new ones have to beat; [] for a strategy that compares none."""
        return []

    def tell(self, evaluations: Sequence[Evaluation], rescored: Sequence[Evaluation] = ()) -> None:
        """Take in the results for the last ``ask``, in its order; on new text also those of the incumbents, in theirs.

        Raises ValueError if nothing was asked, if these are other genomes, or if they did not all read one text.
        """
        if not self._batch:
            raise ValueError("tell without a batch: ask first, and tell every batch once")
        found = [evaluation.genome for evaluation in evaluations]
        if found != self._batch:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, self._batch, strict=False)))
            raise ValueError(
                f"tell expects the {len(self._batch)} genomes of the last ask in their order, "
                f"found {len(found)}, of which the first {same} are as asked"
            )
        everything = [*evaluations, *rescored]
        self._check_text([e.fidelity for e in everything if e.tokens], [e.genome for e in rescored])
        self._take([Scored.of(evaluation) for evaluation in everything])

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Figures on the last batch told; {} for a strategy that predicts nothing."""
        return {}

    def state_dict(self, since: int = 0) -> dict[str, Any]:
        """Return the JSON-serializable state, random state included.

        Of the batches told it holds only those from ``since`` on. Raises ValueError if one of those was forgotten.
        """
        forgotten = self.batches - len(self.told)
        if since < forgotten:
            raise ValueError(f"batches from {since} on are asked for, of which those before {forgotten} are forgotten")
        return {
            "strategy": type(self).__name__,
            "rng": rng_to_json(self.rng),
            "told_before": since,
            "told": [[scored.to_json() for scored in batch] for batch in self.told[since - forgotten :]],
            "batch": None if self._batch is None else [list(genome) for genome in self._batch],
        }

    def forget(self, batches: int) -> None:
        """Drop the first ``batches`` told, which are on file, except the last one and those that proposals look at."""
        kept = looked_at = 0
        while kept < len(self.told) and (kept == 0 or looked_at < self.looks_back):
            kept += 1
            looked_at += len(usable(self.told[-kept]))
        kept = max(kept, self.batches - batches)
        self.told = self.told[max(0, len(self.told) - kept) :]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where a complete ``state_dict`` was taken. Raises ValueError for one of another strategy."""
        self._check_name(state)
        self._reset()
        for batch in self._batches_of(state):
            self._take(batch)
        self.rng = rng_from_json(state["rng"])
        self._batch = None if state["batch"] is None else [tuple(genome) for genome in state["batch"]]
        self._mark(self._batch or ())

    def _reset(self) -> None:
        """Forget everything told, but keep the random state."""
        self.told = []
        self.batches = self.evaluations = 0
        self._batch = None
        self._seen = set()

    def _take(self, batch: Batch) -> None:
        """Record a batch of results and learn from it."""
        self.told.append(batch)
        self.batches += 1
        self.evaluations += len(batch)
        self._mark(scored.genome for scored in batch)
        self._batch = None
        self._learn(batch)

    def _check_name(self, state: Mapping[str, Any]) -> None:
        if state["strategy"] != type(self).__name__:
            raise ValueError(f"state of {state['strategy']} cannot be loaded into {type(self).__name__}")

    @staticmethod
    def _batches_of(state: Mapping[str, Any]) -> list[Batch]:
        return [[Scored.from_json(record) for record in batch] for batch in state["told"]]

    def _check_text(self, found: Sequence[Fidelity], rescored: Sequence[Genome]) -> None:
        """Raise ValueError unless all results read one text and ``rescored`` are the incumbents if that text is new."""
        texts = {(fidelity.split, fidelity.draw) for fidelity in found}
        if len(texts) != 1:
            raise ValueError(f"losses of different text are never ranked together: expected one text, found {texts}")
        known = [(s.fidelity.split, s.fidelity.draw) for s in (self.told[-1] if self.told else []) if s.fidelity.tokens]
        expected = self.incumbents if known and texts != set(known) else []
        if list(rescored) != expected:
            raise ValueError(
                f"expected the {len(expected)} incumbents on the batch's text, if it is new, found {len(rescored)}"
            )

    def _feasible(self, genome: Genome) -> Genome:
        """Return ``genome`` repaired to the budget, then upgraded until nothing more fits."""
        return self.repair.fill(self.repair(genome, self.rng), self.rng)

    def _is_new(self, genome: Genome) -> bool:
        """Return whether ``genome`` was never proposed before, and mark it as proposed."""
        if (key := fingerprint(genome)) in self._seen:
            return False
        self._seen.add(key)
        return True

    def _mark(self, genomes: Iterable[Genome]) -> None:
        """Mark ``genomes`` as proposed."""
        self._seen.update(map(fingerprint, genomes))

    def _unmark(self, genomes: Iterable[Genome]) -> None:
        """Allow ``genomes`` to be proposed again."""
        self._seen.difference_update(map(fingerprint, genomes))

    def _new(self, make: Callable[[], Genome], tries: int = NOVELTY_TRIES) -> Genome | None:
        """Return the first genome of ``make`` that was never proposed; None after ``tries`` calls."""
        return next((genome for genome in (make() for _ in range(tries)) if self._is_new(genome)), None)

    def _new_ones(self, make: Callable[[], Genome], count: int) -> list[Genome]:
        """Return ``count`` genomes of ``make`` that were never proposed; fewer once it seems to have no more."""
        found: list[Genome] = []
        while len(found) < count and (genome := self._new(make)) is not None:
            found.append(genome)
        return found

    def _random(self) -> Genome:
        """Return a feasible genome close to one whose genes are drawn independently."""
        return self._feasible(tuple(self.rng.randrange(len(gene.formats)) for gene in self.space.genes))
