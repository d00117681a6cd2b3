"""The ladder of a search: rungs of ever more text, all of it drawn anew as generations pass.

This is successive halving (Jamieson and Talwalkar, arXiv 1502.07943; EvoPress, arXiv 2410.14649, uses it for genomes):
all new genomes read little text, the better share of them reads more, and only those on the last rung can become
parents. Unlike both, a genome that the text so far cannot distinguish from the last one promoted is promoted too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import numpy as np

from search.loop.paired import paired_difference
from search.types import Evaluation, Fidelity, Genome, rank

DOUBTFUL_SHARE = 0.25  # most genomes promoted because of doubt, as a share of those promoted by rank


@dataclass(frozen=True)
class Ladder:
    """A ladder says how much text each rung reads, and what share of the genomes goes on to the next rung.

    ``rungs`` are in tokens, rising; a rung of 0 tokens reads no text and ranks by the table of reconstruction errors.
    ``promotion`` is the share that goes on. Every ``refresh`` generations (0: never) all rungs take another random
    order of the split's windows, drawn with ``seed``: two seeds read different text. Raises ValueError for rungs that
    do not rise, and for a promotion that is not between 0 and 1.
    """

    rungs: tuple[int, ...]
    promotion: float = 0.5
    refresh: int = 0
    seed: int = 0
    split: str = "search"

    def __post_init__(self) -> None:
        rises = all(low < high for low, high in zip((-1, *self.rungs), self.rungs, strict=False))
        if not rises or max(self.rungs, default=0) == 0:
            raise ValueError(f"expected rungs of tokens that rise from at least 0, found {list(self.rungs)}")
        if not 0 < self.promotion < 1:
            raise ValueError(f"expected a promotion between 0 and 1, found {self.promotion}")

    def fidelities(self, generation: int) -> tuple[Fidelity, ...]:
        """Return one fidelity per rung, all of one draw, so that each rung reads a prefix of the next one's text."""
        draw = self._draw(generation)
        return tuple(Fidelity(self.split, tokens, draw if tokens else 0) for tokens in self.rungs)

    def turns_to_new_text(self, generation: int) -> bool:
        """Return whether ``generation`` reads another draw than the generation before it."""
        return generation > 0 and self._draw(generation) != self._draw(generation - 1)

    def turns(self, generations: int) -> int:
        """Return how many of the first ``generations`` turn to new text."""
        return max(0, generations - 1) // self.refresh if self.refresh else 0

    def counts(self, genomes: int) -> list[int]:
        """Return the evaluations at each rung for ``genomes`` new genomes, without those promoted because of doubt."""
        found = [genomes]
        for _ in self.rungs[1:]:
            found.append(ceil(self.promotion * found[-1]))
        return found

    def _draw(self, generation: int) -> int:
        """Return the number of the draw that ``generation`` reads; 0 is the split's own order."""
        if not self.refresh:
            return 0
        words = np.random.SeedSequence([self.seed, generation // self.refresh]).generate_state(1)
        return 1 + int(words[0])


def promoted(found: Sequence[Evaluation], share: float) -> list[Genome]:
    """Return the genomes that go on to the next rung, at least one, in the order of ``found``.

    ``found`` are evaluations of one fidelity. The best ``share`` goes on, and after it those whose KL exceeds that of
    the last of these by no more than its paired margin, best first, up to a quarter as many again. A genome whose loss
    is not finite does not go on, unless none has a finite loss.
    """
    ranked = sorted(found, key=rank)
    ranked = [evaluation for evaluation in ranked if isfinite(evaluation.loss)] or ranked[:1]
    count = ceil(share * len(found))
    best, rest = ranked[:count], ranked[count:]
    doubtful = [evaluation for evaluation in rest if _in_doubt(evaluation, best[-1])]
    chosen = {evaluation.genome for evaluation in best + doubtful[: ceil(DOUBTFUL_SHARE * count)]}
    return [evaluation.genome for evaluation in found if evaluation.genome in chosen]


def _in_doubt(evaluation: Evaluation, threshold: Evaluation) -> bool:
    """Return whether ``evaluation`` may be better than ``threshold``, as far as its text can tell; no without text."""
    if not evaluation.tokens:
        return False
    difference = paired_difference(evaluation, threshold)
    return difference.mean <= difference.margin()
