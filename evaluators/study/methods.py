"""Quantization methods that a study compares: pydantic settings that turn a layer into simulated weights.

To add a method, subclass ``Method`` with a ``kind`` and ``treat``, and list it in evaluators/study/catalogue.py.
"""

from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from evaluators.study.layer import StudyLayer, TreatedLayer
from quantizers.simulated.allocation import (
    FIVE_LEVELS,
    MOST_BITS,
    THREE_LEVELS,
    budget_bits,
    check_levels,
    quantile_bits,
    threshold_bits,
)
from quantizers.simulated.channel_mixed import GridSettings, simulate
from quantizers.simulated.layer_rules import LayerRule, target_bits
from quantizers.statistics.importance import (
    ImportanceWeights,
    channel_contribution,
    channel_dimensions,
    combined_importance,
)

Dimension = Literal["activation", "hessian", "weight", "sensitivity", "stability"]


class Method(BaseModel):
    """Settings of one quantization method; unknown keys are errors.

    ``axis`` names the setting that varies along the method's line in the plot; it is empty where none does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    axis: ClassVar[str] = ""
    needs_samples: ClassVar[bool] = False  # whether ``treat`` reads sampled activations

    kind: str
    name: str | None = Field(None, description="of its line in table and picture")

    def treat(self, layer: StudyLayer) -> TreatedLayer:
        """Return the simulated weights of a layer and their bits."""
        raise NotImplementedError

    def check(self, columns: int) -> None:
        """Raise ValueError, which says what would work, if a layer of ``columns`` input channels is too small."""

    @property
    def line(self) -> str:
        """Label of the method's line: ``name``, else the kind and every non-default setting except the axis."""
        if self.name:
            return self.name
        given = self.model_dump(mode="json", exclude={"kind", "name", self.axis}, exclude_defaults=True)
        return ", ".join([self.kind, *_words(given)])

    @property
    def label(self) -> str:
        """Label of the measurement: the line and the value of the axis."""
        return f"{self.line} @ {getattr(self, self.axis):g}" if self.axis else self.line


def _words(settings: dict[str, Any]) -> list[str]:
    flat = {
        k: v for key, value in settings.items() for k, v in (value if isinstance(value, dict) else {key: value}).items()
    }
    return [f"{key} {'/'.join(map(str, v)) if isinstance(v, list | tuple) else v}" for key, v in flat.items()]


class ChannelMethod(Method):
    """Base of methods that give each input channel its bits on a uniform grid, with or without compensation."""

    grid: GridSettings = Field(GridSettings(), description="of each channel")
    compensate: bool = Field(True, description="spread each column's error over the columns after it")

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        """Return bits (columns,) and, if any decided them, the scores (columns,)."""
        raise NotImplementedError

    def treat(self, layer: StudyLayer) -> TreatedLayer:
        """Return the weights rounded to the bits that ``allocate`` chooses."""
        chosen, score = self.allocate(layer)
        bits = torch.from_numpy(chosen)
        mixed = simulate(layer.W, bits, self.grid, layer.input.factor if self.compensate else None)
        return TreatedLayer(mixed.weights, bits, mixed.stored_bits, score)


class Rounding(ChannelMethod):
    """Rounds every channel to nearest, at the same bits."""

    axis = "bits"
    kind: Literal["rtn"] = "rtn"
    bits: int = Field(4, ge=1, le=MOST_BITS, description="of every channel")
    compensate: bool = Field(False, description="spread each column's error over the columns after it")

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        """Return ``bits`` for every channel, and no scores."""
        return np.full(layer.W.shape[1], self.bits), None


class Gptq(Rounding):
    """Quantizes every channel at the same bits, with error compensation (Frantar et al. 2022)."""

    kind: Literal["gptq"] = "gptq"  # type: ignore[assignment]
    compensate: bool = Field(True, description="spread each column's error over the columns after it")


class Threshold(ChannelMethod):
    """Chooses one of three levels by the score |W| * |activation|, divided by its mean over the channels.

    Channels above ``high`` get the most bits, those below ``low`` the fewest.
    """

    kind: Literal["threshold"] = "threshold"
    levels: tuple[int, ...] = Field(THREE_LEVELS, description="bits that a channel may take")
    low: float = Field(0.5, description="score below which a channel gets the fewest bits")
    high: float = Field(1.2, description="score above which a channel gets the most bits")

    @model_validator(mode="after")
    def valid(self) -> Self:
        """Raise ValueError unless there are three rising levels and 0 <= low <= high."""
        threshold_bits(np.ones(1), self.levels, self.low, self.high)
        return self

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        score = channel_contribution(layer.W, layer.input.statistics)
        return threshold_bits(score.cpu().numpy(), self.levels, self.low, self.high), score


class FiveDimensional(ChannelMethod):
    """Base of methods that use the five-dimensional importance score; ``without`` leaves one dimension out."""

    levels: tuple[int, ...] = Field(FIVE_LEVELS, description="bits that a channel may take")
    weights: ImportanceWeights = Field(ImportanceWeights(), description="of the five dimensions")
    without: Dimension | None = Field(None, description="dimension left out of the score")

    @field_validator("levels")
    @classmethod
    def rising(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        """Raise ValueError unless there are two or more levels, rising and from 1 to MOST_BITS."""
        return check_levels(levels)

    @model_validator(mode="after")
    def something_left(self) -> Self:
        """Raise ValueError if no dimension with a weight is left."""
        self.own_weights()
        return self

    def own_weights(self) -> ImportanceWeights:
        """Return the weights of the dimensions, without the one that is left out."""
        return self.weights.without(self.without) if self.without else self.weights

    def score(self, layer: StudyLayer) -> Tensor:
        """Return the importance of each input channel, float64 (columns,), with mean 1."""
        dimensions = channel_dimensions(layer.W, layer.input.H, layer.input.statistics, U=layer.input.factor)
        return combined_importance(dimensions, self.own_weights())


class Quantile(FiveDimensional):
    """Cuts the layer's own distribution of scores into equal parts, one for each level."""

    kind: Literal["quantile"] = "quantile"

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        score = self.score(layer)
        return quantile_bits(score.cpu().numpy(), self.levels), score


class BudgetMethod(FiveDimensional):
    """Spends an exact budget of ``target_avg_bits`` bits per weight in every layer.

    ``targets`` are rules for single layers that override it; the first rule that fits counts.
    """

    axis = "target_avg_bits"
    kind: Literal["budget"] = "budget"
    target_avg_bits: float = Field(4.0, description="bits per weight of every layer")
    targets: tuple[LayerRule, ...] = Field((), description="rules for single layers")

    @model_validator(mode="after")
    def within_reach(self) -> Self:
        """Raise ValueError for a target outside of the levels."""
        for target in (self.target_avg_bits, *(rule.bits for rule in self.targets)):
            budget_bits(np.ones(1), target, self.levels)
        return self

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        score = self.score(layer)
        target = target_bits(self.targets, layer.name, layer.block, layer.blocks, self.target_avg_bits)
        return budget_bits(score.cpu().numpy(), target, self.levels), score
