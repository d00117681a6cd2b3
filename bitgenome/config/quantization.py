"""Defines the settings of the bank: rounding, pruning and channel scaling."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.section import Section
from bitgenome.config.paths import UserPath
from quantizers.formats.table import level_named
from quantizers.settings import CompensationSettings, Importance, ScalingSettings, Sparsity


class SparsityConfig(Section):
    """Settings of a sparsity: a fraction of the weights or a pattern, at most one of them.

    ``sparsity`` is the fraction of weights that become zero. ``pattern`` is "n:m": n zeros in every m neighbouring
    weights of a row.
    """

    sparsity: float | None = Field(None, description="0 (nothing) to below 1; chosen by 128 columns over all rows")
    pattern: str | None = Field(None, description='e.g. "2:4"; m is one of 2, 4, 8, 16, 32')

    @model_validator(mode="after")
    def valid(self) -> Self:
        """Raise ValueError if both settings are given, or one is out of range."""
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError(f"expected one of sparsity and pattern, found {self.sparsity:g} and {self.pattern!r}")
        self.wanted()
        return self

    def wanted(self) -> Sparsity | None:
        """Return the sparsity that is set, or None if nothing is pruned."""
        if self.pattern is not None:
            return Sparsity.of_pattern(self.pattern)
        return Sparsity.of_fraction(self.sparsity) if self.sparsity else None


class PruningRule(SparsityConfig):
    """A sparsity for the tensors in whose Hugging Face name the regular expression ``match`` is found."""

    match: str = Field(description='e.g. "layers\\.[01]\\." or "down_proj"; the first rule that matches decides')

    @model_validator(mode="after")
    def complete(self) -> Self:
        """Raise ValueError unless ``match`` is a regular expression and a sparsity is set."""
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"expected a regular expression in match, found {self.match!r} ({error})") from None
        if self.sparsity is None and self.pattern is None:
            raise ValueError(f"expected sparsity or pattern for match {self.match!r}, found neither")
        return self


class PruningConfig(SparsityConfig):
    """Settings of pruning: the sparsity of every linear layer, and rules that take precedence.

    Embedding and head are pruned only by a rule.
    """

    rules: tuple[PruningRule, ...] = Field((), description="by tensor name, before the sparsity of all")


class QuantizationConfig(Section):
    """Settings of how the bank is built."""

    objective: Literal["auto", "output", "loss"] = Field(
        "auto",
        description="what rounding makes least: each layer's output error, or what that does to the loss of the model "
        "(two-sided rounding; head and embedding by their rows; gradients on calibration text); auto: loss where the "
        "factors that takes are at most 8 GiB on disk",
    )
    damping: float = Field(CompensationSettings.damping, gt=0, description="of the Hessian's mean diagonal")
    upstream_level: str | None = Field(
        None, description="level of the blocks before the one that is calibrated (sequential); none: full precision"
    )
    compensation: bool = Field(
        CompensationSettings.compensation, description="spread each column's error over later ones (SparseGPT, GPTQ)"
    )
    refinement_rounds: int = Field(
        CompensationSettings.refinement_rounds,
        ge=0,
        le=20,
        description="of scales and integers; twice as many if pruned",
    )
    importance: Importance = Field("conditional", description="of the columns that a block's scales are fitted to")
    imatrix: UserPath | None = Field(
        None,
        description="an importance matrix of this model by llama.cpp (GGUF, or the old binary form): its mean squares "
        "weight the columns of the blocks' tensors, in place of `importance`, and alone without compensation",
    )
    keep_hessians: bool | Literal["auto"] = Field(
        "auto",
        description="after the bank is built: other levels then need no calibration; auto: where they are below 2 GiB, "
        "or scaling or a mutation prior reads them again",
    )
    pruning: PruningConfig = Field(PruningConfig(), description="in the same pass; nothing by default")
    scaling: ScalingSettings = Field(ScalingSettings(), description="of channels, before rounding; none by default")

    @field_validator("upstream_level")
    @classmethod
    def known(cls, level: str | None) -> str | None:
        """Return a level that may be given by the name of its GGUF type. Raises ValueError for an unknown level."""
        return level and level_named(level)

    @model_validator(mode="after")
    def compensated(self) -> Self:
        """Raise ValueError for the objective loss without compensation, which carries it."""
        if self.objective == "loss" and not self.compensation:
            raise ValueError("expected compensation with objective: loss, found compensation: false")
        return self

    @model_validator(mode="after")
    def of_this_model(self) -> Self:
        """Raise ValueError for an imatrix together with scaled channels, of whose inputs it does not tell."""
        if self.imatrix and self.scaling.active:
            raise ValueError(
                "expected an imatrix or scaling, found both: scaling changes the inputs it was measured on"
            )
        return self

    def absolute(self) -> Self:
        """Return these settings with an absolute path of the imatrix."""
        return self.model_copy(update={"imatrix": self.imatrix and self.imatrix.absolute()})
