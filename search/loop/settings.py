"""Settings of the search: its strategy, and how much text it reads."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bitgenome.common.section import Section
from search.loop.ladder import Ladder
from search.strategies.settings import DEFAULTS, GeneticSettings


class GeneGroups(Section):
    """Settings of which tensors take the same format; a shorter genome is searched faster, and less finely.

    ``by`` groups by ``kind`` across layers, by ``layer`` across kinds, or into ``count`` groups of tensors whose
    outputs share information.
    """

    by: Literal["none", "kind", "layer", "mutual_information"] = Field("none", description="what shares a format")
    count: int | None = Field(None, ge=1, description="groups by mutual information")
    samples: int = Field(2048, ge=2, description="positions of calibration text that mutual information is taken over")

    @model_validator(mode="after")
    def complete(self) -> Self:
        """Raise ValueError unless ``count`` is given exactly when grouping by mutual information."""
        if (self.by == "mutual_information") != (self.count is not None):
            raise ValueError(
                f"expected count with by: mutual_information and with nothing else, found by: {self.by} and "
                f"count: {self.count}"
            )
        return self


def listed(value: Any) -> Any:
    """Return a single value as a list of one."""
    return [value] if isinstance(value, str | Path) else value


class SearchSettings(GeneticSettings):
    """Settings of a search; every strategy but ``exact`` makes ``population * generations`` evaluations."""

    population: int = Field(DEFAULTS.population, ge=4, description="new genomes of each generation")
    strategy: Literal["genetic", "optuna", "exact", "random"] = Field("genetic", description="who proposes genomes")
    mutation_prior: Literal["none", "five_dimensional"] = Field(
        "none", description="of the genetic strategy: which genes are raised more often than lowered"
    )
    ladder: tuple[int, ...] = Field(
        (), description="rising tokens of successive halving, 0: the reconstruction table; none: all search text"
    )
    seeds: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        (),
        description="mixes to start from: a recipe (NAME=TYPE lines, as of llama-quantize --tensor-type-file), a run, "
        "or a list of them",
    )
    promotion: float = Field(0.5, gt=0, lt=1, description="genomes of a rung that go on to the next")
    refresh: int = Field(0, ge=0, description="generations between new draws of text, 0: never")
    gene_groups: GeneGroups = Field(GeneGroups(), description="tensors that move together")
    validation_candidates: int = Field(6, ge=1, description="best genomes compared on validation text")

    @model_validator(mode="after")
    def one_text(self) -> Self:
        """Raise ValueError for a ``refresh`` with Optuna, which ranks all its trials together."""
        if self.refresh and self.strategy == "optuna":
            raise ValueError(
                f"expected refresh 0 with strategy optuna, which ranks all its trials together, found {self.refresh}"
            )
        return self

    def text_ladder(self, tokens: int, window: int) -> Ladder:
        """Return the ladder in a pool of ``tokens`` tokens of text, read in windows of ``window`` tokens.

        Raises ValueError for rungs that do not fit the pool, or that leave ``refresh`` no other text to draw.
        """
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
