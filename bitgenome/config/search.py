"""Settings of the search, and how much text it reads."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bitgenome.config.file import Section
from search.loop.ladder import Ladder


class GeneGroupsConfig(Section):
    """Tensors that take the same format: ``kind`` across layers, ``layer`` across kinds, or ``count`` groups of tensors
    whose outputs share information. A shorter genome is searched faster, and less finely.
    """

    by: Literal["none", "kind", "layer", "mutual_information"] = "none"
    count: int | None = Field(None, ge=1, description="groups by mutual information")
    samples: int = Field(2048, ge=2, description="positions of calibration text that mutual information is taken over")

    @model_validator(mode="after")
    def complete(self) -> Self:
        if (self.by == "mutual_information") != (self.count is not None):
            raise ValueError(
                f"expected count with by: mutual_information and with nothing else, found by: {self.by} and "
                f"count: {self.count}"
            )
        return self


class SearchConfig(Section):
    """``population * generations`` is the number of evaluations of every strategy but ``exact``."""

    strategy: Literal["genetic", "optuna", "exact", "random"] = "genetic"
    population: int = Field(20, ge=4)
    generations: int = Field(12, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    tournament_size: int = Field(4, ge=1)
    crossover: Literal["one_point", "two_point", "uniform"] = "uniform"
    crossover_rate: float = Field(0.5, ge=0, le=1)
    mutation_rate: float = Field(0.1, ge=0, le=1, description="offspring that get one to four random genes")
    swap_rate: float = Field(0.8, ge=0, le=1, description="offspring that get one to three size-preserving swaps")
    mutation_prior: Literal["none", "five_dimensional"] = Field(
        "none", description="of the genetic strategy: which genes are raised more often than lowered"
    )
    elites: int = Field(4, ge=1)
    immigrants: int = Field(1, ge=0)
    brood: int = Field(
        16, ge=1, description="offspring bred for each one evaluated, chosen by a surrogate; at most 1,024 in all"
    )
    ladder: tuple[int, ...] = Field(
        (), description="rising tokens of successive halving, 0: the reconstruction table; none: all search text"
    )
    promotion: float = Field(0.5, gt=0, lt=1, description="genomes of a rung that go on to the next")
    refresh: int = Field(0, ge=0, description="generations between new draws of text, 0: never")
    gene_groups: GeneGroupsConfig = Field(GeneGroupsConfig(), description="tensors that move together")
    validation_candidates: int = Field(6, ge=1, description="best genomes compared on validation text")

    @model_validator(mode="after")
    def room(self) -> Self:
        if self.immigrants >= self.population:
            raise ValueError(f"expected immigrants below population ({self.population}), found {self.immigrants}")
        if self.refresh and self.strategy == "optuna":
            raise ValueError(
                f"expected refresh 0 with strategy optuna, which ranks all its trials together, found {self.refresh}"
            )
        return self

    def text_ladder(self, tokens: int, window: int) -> Ladder:
        """The rungs in a pool of ``tokens`` tokens of text. Raises ValueError for rungs that do not fit it."""
        rungs = self.ladder or (tokens,)
        if self.ladder and (rungs[-1] > tokens or any(0 < rung < window for rung in rungs)):
            raise ValueError(
                f"expected search.ladder of 0 or from text.window ({window}) to text.tokens.search ({tokens}) tokens, "
                f"found {list(rungs)}"
            )
        if self.refresh and rungs[-1] // window >= tokens // window:
            raise ValueError(
                f"expected search.ladder to end below text.tokens.search ({tokens}), so that search.refresh has other "
                f"text to draw, found {list(rungs)}"
            )
        return Ladder(rungs, self.promotion, self.refresh, self.seed)
