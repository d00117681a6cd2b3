"""Quantization methods that a study compares: small settings that turn a layer into simulated weights.

Another method is another subclass of ``Method`` with a ``kind`` and ``treat``, listed in evaluators/study/catalogue.py.
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
    """Settings of one method. Unknown keys are errors; ``axis`` is the setting that moves along a line of a picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    axis: ClassVar[str] = ""
    needs_samples: ClassVar[bool] = False  # of activations

    kind: str
    name: str | None = Field(None, description="of its line in table and picture")

    def treat(self, layer: StudyLayer) -> TreatedLayer:
        """Simulated weights of a layer."""
        raise NotImplementedError

    def check(self, columns: int) -> None:
        """Raises ValueError if the method cannot serve a layer of as few columns, saying what would."""

    @property
    def line(self) -> str:
        """``name``, else the kind and every setting but the axis that is not its default."""
        if self.name:
            return self.name
        given = self.model_dump(mode="json", exclude={"kind", "name", self.axis}, exclude_defaults=True)
        return ", ".join([self.kind, *_words(given)])

    @property
    def label(self) -> str:
        """The line, and the axis' own value."""
        return f"{self.line} @ {getattr(self, self.axis):g}" if self.axis else self.line


def _words(settings: dict[str, Any]) -> list[str]:
    flat = {
        k: v for key, value in settings.items() for k, v in (value if isinstance(value, dict) else {key: value}).items()
    }
    return [f"{key} {'/'.join(map(str, v)) if isinstance(v, list | tuple) else v}" for key, v in flat.items()]


class ChannelMethod(Method):
    """Bits for each input channel on uniform grids, with or without compensation."""

    grid: GridSettings = GridSettings()
    compensate: bool = Field(True, description="spread each column's error over the columns after it")

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        """Bits (columns,) and the scores (columns,) that decided them, if any did."""
        raise NotImplementedError

    def treat(self, layer: StudyLayer) -> TreatedLayer:
        chosen, score = self.allocate(layer)
        bits = torch.from_numpy(chosen)
        mixed = simulate(layer.W, bits, self.grid, layer.input.factor if self.compensate else None)
        return TreatedLayer(mixed.weights, bits, mixed.stored_bits, score)


class Rounding(ChannelMethod):
    """Every channel at the same bits, rounded to nearest."""

    axis = "bits"
    kind: Literal["rtn"] = "rtn"
    bits: int = Field(4, ge=1, le=MOST_BITS)
    compensate: bool = False

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        return np.full(layer.W.shape[1], self.bits), None


class Gptq(Rounding):
    """Every channel at the same bits, compensated (Frantar et al. 2022)."""

    kind: Literal["gptq"] = "gptq"  # type: ignore[assignment]
    compensate: bool = True


class Threshold(ChannelMethod):
    """Three levels by |W| * |activation| over its mean: above ``high`` the largest, below ``low`` the smallest."""

    kind: Literal["threshold"] = "threshold"
    levels: tuple[int, ...] = THREE_LEVELS
    low: float = 0.5
    high: float = 1.2

    @model_validator(mode="after")
    def valid(self) -> Self:
        threshold_bits(np.ones(1), self.levels, self.low, self.high)
        return self

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        score = channel_contribution(layer.W, layer.input.statistics)
        return threshold_bits(score.cpu().numpy(), self.levels, self.low, self.high), score


class FiveDimensional(ChannelMethod):
    """What the methods of the five-dimensional score share; ``without`` leaves one dimension out."""

    levels: tuple[int, ...] = FIVE_LEVELS
    weights: ImportanceWeights = ImportanceWeights()
    without: Dimension | None = None

    @field_validator("levels")
    @classmethod
    def rising(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        return check_levels(levels)

    @model_validator(mode="after")
    def something_left(self) -> Self:
        self.own_weights()
        return self

    def own_weights(self) -> ImportanceWeights:
        return self.weights.without(self.without) if self.without else self.weights

    def score(self, layer: StudyLayer) -> Tensor:
        """Importance float64 (columns,) of mean 1."""
        dimensions = channel_dimensions(layer.W, layer.input.H, layer.input.statistics, U=layer.input.factor)
        return combined_importance(dimensions, self.own_weights())


class Quantile(FiveDimensional):
    """Levels in equal parts of the layer's own distribution of scores."""

    kind: Literal["quantile"] = "quantile"

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        score = self.score(layer)
        return quantile_bits(score.cpu().numpy(), self.levels), score


class BudgetMethod(FiveDimensional):
    """An exact average in every layer; ``targets`` are rules for some of them, the first that fits."""

    axis = "target_avg_bits"
    kind: Literal["budget"] = "budget"
    target_avg_bits: float = 4.0
    targets: tuple[LayerRule, ...] = ()

    @model_validator(mode="after")
    def within_reach(self) -> Self:
        for target in (self.target_avg_bits, *(rule.bits for rule in self.targets)):
            budget_bits(np.ones(1), target, self.levels)
        return self

    def allocate(self, layer: StudyLayer) -> tuple[np.ndarray, Tensor | None]:
        score = self.score(layer)
        target = target_bits(self.targets, layer.name, layer.block, layer.blocks, self.target_avg_bits)
        return budget_bits(score.cpu().numpy(), target, self.levels), score
