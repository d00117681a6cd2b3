"""Settings of the search strategies."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from bitgenome.common.section import Section


class GeneticSettings(Section):
    """Settings of the genetic strategy: every generation proposes ``population`` new genomes.

    Rates are probabilities per offspring; a child that no operator changed is swapped. ``elites`` is the number of best
    genomes of the whole run that are kept as parents. ``immigrants`` is the number of repaired random genomes in each
    generation.
    """

    population: int = Field(20, ge=1, description="new genomes of each generation")
    generations: int = Field(12, ge=1, description="rounds of new genomes")
    seed: int = Field(0, ge=0, lt=2**32, description="of all random draws")
    tournament_size: int = Field(4, ge=1, description="genomes that compete to become a parent")
    crossover: Literal["one_point", "two_point", "uniform"] = Field(
        "uniform", description="how two parents' genes are mixed"
    )
    crossover_rate: float = Field(0.5, ge=0, le=1, description="offspring that have two parents")
    mutation_rate: float = Field(0.1, ge=0, le=1, description="offspring that get one to four random genes")
    swap_rate: float = Field(0.8, ge=0, le=1, description="offspring that get one to three size-preserving swaps")
    elites: int = Field(4, ge=1, description="best genomes of the whole run, kept as parents")
    immigrants: int = Field(1, ge=0, description="repaired random genomes in each generation")
    brood: int = Field(
        16, ge=1, description="offspring bred for each one evaluated, chosen by a surrogate; at most 1,024 in all"
    )

    @model_validator(mode="after")
    def room(self) -> Self:
        """Raise ValueError unless there are fewer immigrants than the population."""
        if self.immigrants >= self.population:
            raise ValueError(f"expected immigrants below population ({self.population}), found {self.immigrants}")
        return self

    @property
    def evaluations(self) -> int:
        """Number of genomes that the whole search asks for."""
        return self.population * self.generations


DEFAULTS = GeneticSettings()


@dataclass(frozen=True)
class RandomSettings:
    """Settings of the random strategy; its batches do not depend on how many workers evaluate them."""

    evaluations: int = DEFAULTS.evaluations
    batch_size: int = DEFAULTS.population
    seed: int = DEFAULTS.seed


@dataclass(frozen=True)
class OptunaSettings(RandomSettings):
    """Settings of Optuna's TPE, which takes over from random draws after ``startup`` trials."""

    startup: int = 20


@dataclass(frozen=True)
class SolverSettings:
    """Settings of the exact strategy: how many alternatives to solve for, and how far from the tables.

    Each of the ``alternatives`` genomes solves a table perturbed by log-normal noise of ``spread``.
    """

    alternatives: int = 8
    spread: float = 0.1
    seed: int = DEFAULTS.seed
