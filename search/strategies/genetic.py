"""The genetic search, built on DEAP's operators.

What it may gain over its seeds lies close to them: the exact solutions are optimal but for noise and interactions. Most
offspring are therefore one to three swaps away from a good parent, at equal size (after EvoPress, arXiv 2410.14649).
Unlike EvoPress it recombines: parents improved by different swaps often pass both on. Of several offspring bred for
each slot of a generation only the most promising is evaluated (screening.py), because an evaluation costs a thousand
times more than breeding.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from deap import base, tools

from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.strategies.base import Batch, BatchStrategy
from search.strategies.screening import Screening
from search.strategies.settings import GeneticSettings
from search.strategies.surrogate import MOST
from search.types import Genome, Scored

MOST_SWAPS = 3  # swaps of one mutation, drawn from 1 to this
MOST_MUTATED = 4  # genes of one random-gene mutation, drawn from 1 to this
MOST_BIAS = 8.0  # most that a prior may favour or disfavour a gene, as a factor of the average: a prior can be wrong
MOST_BRED = 1024  # offspring bred per generation: breeding takes the driver's time, and thousands more change little
PARTNERS = 8  # candidate partners of a swap, of which the one that wastes fewest bytes is taken
CROSSOVERS: dict[str, Callable[..., Any]] = {
    "one_point": tools.cxOnePoint,
    "two_point": tools.cxTwoPoint,
    "uniform": partial(tools.cxUniform, indpb=0.5),
}


class Fitness(base.Fitness):
    """Ranks individuals for DEAP by the tokens of the rung they reached, then by their loss."""

    weights = (1.0, -1.0)  # the rung reached comes first; the loss is minimized


class Individual(list[int]):
    """An individual is a genome that DEAP's operators may change in place."""

    def __init__(self, genome: Sequence[int], scored: Scored | None = None) -> None:
        super().__init__(genome)
        self.fitness = Fitness() if scored is None else Fitness((scored.fidelity.tokens, scored.loss))


@contextmanager
def global_random(rng: random.Random) -> Iterator[random.Random]:
    """Make ``rng`` the global random generator, which DEAP draws from, and restore the global state at the end.

    Yields the global generator; ``rng`` continues where it stopped.
    """
    saved = random.getstate()
    random.setstate(rng.getstate())
    try:
        yield random.random.__self__  # type: ignore[attr-defined]
    finally:
        rng.setstate(random.getstate())
        random.setstate(saved)


class GeneticStrategy(BatchStrategy):
    """Breeds generations with elites, tournament selection, crossover and size-preserving swaps.

    Every child is repaired to the budget, filled, and new.
    """

    looks_back = MOST

    def __init__(
        self,
        repair: Repair,
        seeds: Mapping[str, Genome],
        table: SensitivityTable | None = None,
        settings: GeneticSettings | None = None,
        prior: Sequence[float] | None = None,
    ) -> None:
        """Set up the search from the genomes of ``seeds``.

        ``prior`` (G,), positive, is how much likelier than others a gene is to be raised in a swap, and how much less
        likely to be the one that pays. Raises ValueError for another shape or other values.
        """
        self.settings = settings or GeneticSettings()
        super().__init__(repair, self.settings.seed)
        self._seeds = tuple(dict.fromkeys(seeds.values()))
        self._table = table
        self._prior = checked_prior(prior, len(self.space.genes))
        self._parents: list[Individual] = []
        self._screening = Screening(table)
        self.toolbox = base.Toolbox()
        self.toolbox.register("select", tools.selTournament, tournsize=self.settings.tournament_size)
        self.toolbox.register("mate", CROSSOVERS[self.settings.crossover])
        self.toolbox.register("swap", self._swap)
        self.toolbox.register("mutate", self._mutate)

    @property
    def expected_evaluations(self) -> int:
        return self.settings.population * self.settings.generations

    def _reset(self) -> None:
        super()._reset()
        self._parents = []
        self._screening = Screening(self._table)

    @property
    def diagnostics(self) -> dict[str, Any]:
        """Rank correlation and coverage of the surrogate's predictions, and whether they chose the offspring.

        {} if the last batch was not predicted.
        """
        score = self._screening.latest
        if score is None:
            return {}
        return {
            "surrogate_correlation": score.correlation,
            "surrogate_coverage": score.coverage,
            "screened": score.screened,
        }

    def state_dict(self, since: int = 0) -> dict[str, Any]:
        return super().state_dict(since) | {"screening": self._screening.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._screening.load_state_dict(state["screening"])

    @property
    def incumbents(self) -> list[Genome]:
        """The elites, best first."""
        return [tuple(parent) for parent in self._parents[: self.settings.elites]]

    def _learn(self, batch: Batch) -> None:
        """Choose the parents of the next generation: the elites of the run, then the best of this generation.

        A batch contains the incumbents only on new text; parents without a loss on that text are then forgotten.
        """
        self._screening.learn(batch)
        newcomers = [Individual(scored.genome, scored) for scored in batch]
        known = [] if any(parent in newcomers for parent in self._parents) else self._parents
        elites = tools.selBest(known + newcomers, self.settings.elites)
        others = [individual for individual in tools.selBest(newcomers, len(newcomers)) if individual not in elites]
        self._parents = (elites + others)[: self.settings.population]

    def _propose(self) -> list[Genome]:
        if self.batches == self.settings.generations:
            return []
        batch = self._generation() if self.batches else self._founders()
        return batch + self._new_ones(self._random, self.settings.population - len(batch))

    def _founders(self) -> list[Genome]:
        """Return the seeds, and swap neighbours of them for half of the slots left; random genomes take the rest."""
        size = self.settings.population
        founders = list(dict.fromkeys(self.repair(seed, self.rng) for seed in self._seeds))[:size]
        self._mark(founders)
        neighbours = (size - len(founders) + 1) // 2 if founders else 0
        for i in range(neighbours):
            seed = founders[i % len(founders)]
            child = self._new(partial(self._finish, seed, self.toolbox.swap))
            founders += [] if child is None else [child]
        return founders

    def _generation(self) -> list[Genome]:
        """Return offspring for all slots but the immigrants', the most promising ones of a larger brood."""
        places = self.settings.population - self.settings.immigrants
        with self._drawing_globally():
            brood = self._new_ones(self._breed, places * max(1, min(self.settings.brood, MOST_BRED // max(1, places))))
        told = list(chain.from_iterable(self.told))
        chosen = brood if len(brood) <= places else self._screening.choose(brood, places, told)
        self._unmark(set(brood) - set(chosen))
        return chosen

    @contextmanager
    def _drawing_globally(self) -> Iterator[None]:
        """Make ``self.rng`` the global random generator, which DEAP's operators draw from, while the context lasts."""
        own = self.rng
        try:
            with global_random(own) as self.rng:
                yield
        finally:
            self.rng = own

    def _breed(self) -> Genome:
        """Return one offspring: parents by tournament, perhaps crossed, then changed by at least one operator.

        ``self.rng`` is the global random generator here, because DEAP's operators draw from that.
        """
        child, mate = (Individual(parent) for parent in self.toolbox.select(self._parents, 2))
        if mated := random.random() < self.settings.crossover_rate and child != mate:
            self.toolbox.mate(child, mate)
        change = self.rng.random()
        if change < self.settings.mutation_rate:
            return self._finish(child, self.toolbox.mutate)
        if change < self.settings.mutation_rate + self.settings.swap_rate or not mated:
            return self._finish(child, self.toolbox.swap)
        return self._finish(child)

    def _finish(self, child: Sequence[int], change: Callable[[Genome], Genome] | None = None) -> Genome:
        """Return ``child`` after ``change``, repaired to the budget and upgraded until nothing more fits."""
        genome = tuple(child) if change is None else change(tuple(child))
        return self._feasible(genome)

    def _swap(self, genome: Genome) -> Genome:
        """Swap one to three times: raise a random gene a step, and lower another a step to pay for it."""
        for _ in range(self.rng.randint(1, MOST_SWAPS)):
            genome = self._swap_once(genome)
        return genome

    def _swap_once(self, genome: Genome) -> Genome:
        """Swap once; return the genome unchanged if no gene can be raised."""
        moves = self.repair.moves
        steps = moves.steps(genome)
        ups = (steps == 1).nonzero()[0]
        if not len(ups):
            return genome
        up = self._draw(ups.tolist(), 1, 1)[0]
        larger = moves.apply(genome, up)
        excess = -self.repair.slack(larger)
        saved = -moves.bytes_added(genome)
        enough = ((steps == -1) & (saved >= excess) & (moves.gene != moves.gene[up])).nonzero()[0]
        if excess <= 0 or not len(enough):
            return larger  # either it fits, or one gene cannot pay for it: left to the repair
        partners = self._draw(enough.tolist(), min(PARTNERS, len(enough)), -1)
        return moves.apply(larger, min(partners, key=lambda pair: int(saved[pair])))

    def _draw(self, pairs: list[int], count: int, power: int) -> list[int]:
        """Draw ``count`` different pairs; with a prior, weighted by its ``power`` (Efraimidis and Spirakis 2006)."""
        if self._prior is None:
            return self.rng.sample(pairs, count)
        weights = self._prior[self.repair.moves.gene[pairs]] ** power
        keys = [self.rng.random() ** (1 / weight) for weight in weights]
        return [pairs[i] for i in sorted(range(len(pairs)), key=keys.__getitem__, reverse=True)[:count]]

    def _mutate(self, genome: Genome) -> Genome:
        """Set one to four random genes to random choices."""
        changed = list(genome)
        for gene in self.rng.sample(range(len(genome)), min(self.rng.randint(1, MOST_MUTATED), len(genome))):
            changed[gene] = self.rng.randrange(len(self.space.genes[gene].formats))
        return tuple(changed)


def checked_prior(prior: Sequence[float] | None, genes: int) -> np.ndarray | None:
    """Return ``prior`` (G,) scaled to a mean of 1 and clipped to MOST_BIAS in both directions; None for None.

    Raises ValueError unless there is one finite positive value per gene.
    """
    if prior is None:
        return None
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (genes,) or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"expected a prior of {genes} finite positive values, one a gene, found {len(prior)} values")
    return np.clip(values / values.mean(), 1 / MOST_BIAS, MOST_BIAS)
