"""Construction of strategies by the names that a configuration uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.allocation.repair import Repair
from search.allocation.seeds import seed_genomes
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.strategies.genetic import GeneticStrategy
from search.strategies.optuna_tpe import OptunaStrategy
from search.strategies.random_search import RandomStrategy
from search.strategies.settings import GeneticSettings, OptunaSettings, RandomSettings, SolverSettings
from search.strategies.solver import SolverStrategy
from search.types import Genome, SearchSpace, Strategy

STRATEGIES: dict[str, Any] = {
    "genetic": GeneticSettings,
    "optuna": OptunaSettings,
    "exact": SolverSettings,
    "random": RandomSettings,
}  # name: class of its settings


def make_strategy(
    name: str,
    space: SearchSpace,
    budget: Budget,
    *,
    tables: Sequence[SensitivityTable] = (),
    seeds: Mapping[str, Genome] | None = None,
    settings: Any = None,
    journal: Path | None = None,
    prior: Sequence[float] | None = None,
) -> Strategy:
    """Return the strategy called ``name``: genetic, optuna, exact or random.

    - ``tables`` are sensitivity tables, the most trusted first; the first one guides repairs.
    - ``seeds`` are named genomes to start from, by default seed_genomes of the tables.
    - ``settings`` are the strategy's own settings (its defaults if None).
    - ``journal`` is a file for optuna-dashboard.
    - ``prior`` (G,), one value per gene, biases the genetic strategy's swaps.

    Raises ValueError for an unknown name, or for settings of another strategy.
    """
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: expected one of {', '.join(STRATEGIES)}")
    if settings is not None and not isinstance(settings, STRATEGIES[name]):
        raise ValueError(f"strategy {name} expects {STRATEGIES[name].__name__}, found {type(settings).__name__}")
    table = tables[0] if tables else None
    repair = Repair(space, budget, table)
    if name == "random":
        return RandomStrategy(repair, settings)
    seeds = seed_genomes(space, budget, tables) if seeds is None else seeds
    if name == "genetic":
        return GeneticStrategy(repair, seeds, table, settings, prior)
    if name == "optuna":
        return OptunaStrategy(repair, seeds, settings, journal)
    return SolverStrategy(repair, seeds, tables, settings)
