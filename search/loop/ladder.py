"""The text of a search: rungs of ever more of it, and all of it drawn anew as generations pass.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943; EvoPress, arXiv 2410.14649, uses it for genomes): all new
genomes read little text, the better share of them more, and only who stands on the last rung can become a parent.
Unlike both, a genome that the text so far cannot tell from the last one promoted is promoted too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import numpy as np

from search.loop.paired import paired_difference
from search.types import Evaluation, Fidelity, Genome, rank

DOUBTFUL_SHARE = 0.25  # of those promoted by rank: the most that are promoted for doubt


@dataclass(frozen=True)
class Ladder:
    """``rungs`` in tokens, rising; a rung of 0 tokens ranks by the table of reconstruction errors and reads no text.

    ``promotion`` is the share that goes on to the next rung. Every ``refresh`` generations (0: never) the text of all
    rungs is another random order of the split's windows, by ``seed``: two seeds read different text.
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
        """One for each rung, all of one draw, so that each reads a part of what the next one does."""
        draw = self._draw(generation)
        return tuple(Fidelity(self.split, tokens, draw if tokens else 0) for tokens in self.rungs)

    def turns_to_new_text(self, generation: int) -> bool:
        return generation > 0 and self._draw(generation) != self._draw(generation - 1)

    def counts(self, genomes: int) -> list[int]:
        """Evaluations at each rung of so many genomes, without those promoted for doubt."""
        found = [genomes]
        for _ in self.rungs[1:]:
            found.append(ceil(self.promotion * found[-1]))
        return found

    def _draw(self, generation: int) -> int:
        if not self.refresh:
            return 0
        words = np.random.SeedSequence([self.seed, generation // self.refresh]).generate_state(1)
        return 1 + int(words[0])


def promoted(found: Sequence[Evaluation], share: float) -> list[Genome]:
    """Who goes on to the next rung, in the order of ``found``, evaluations of one fidelity: at least one.

    The best ``share``, and after it those whose KL exceeds that of the last of these by no more than its paired margin,
    best first, up to a quarter as many again. A loss that is not finite stays where it is, unless all are.
    """
    ranked = sorted(found, key=rank)
    ranked = [evaluation for evaluation in ranked if isfinite(evaluation.loss)] or ranked[:1]
    count = ceil(share * len(found))
    best, rest = ranked[:count], ranked[count:]
    doubtful = [evaluation for evaluation in rest if _in_doubt(evaluation, best[-1])]
    chosen = {evaluation.genome for evaluation in best + doubtful[: ceil(DOUBTFUL_SHARE * count)]}
    return [evaluation.genome for evaluation in found if evaluation.genome in chosen]


def _in_doubt(evaluation: Evaluation, threshold: Evaluation) -> bool:
    """Whether ``evaluation`` may be better than ``threshold``, as far as its text can tell. Without text: no."""
    if not evaluation.tokens:
        return False
    difference = paired_difference(evaluation, threshold)
    return difference.mean <= difference.margin()
