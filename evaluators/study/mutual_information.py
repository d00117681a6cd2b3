"""A method of studies that assigns bits to groups of channels by their mutual information."""

import math
import time
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from evaluators.study.layer import LayerInput, StudyLayer, TreatedLayer
from evaluators.study.methods import Method
from quantizers.simulated.allocation import THREE_LEVELS, budget_bits, check_levels, group_bits
from quantizers.simulated.channel_mixed import GridSettings, simulate
from quantizers.statistics.clustering import Clustering, group, redundancy
from quantizers.statistics.importance import channel_dimensions, combined_importance
from quantizers.statistics.mutual_information import DEFAULT_BINS, Estimate


@dataclass(frozen=True)
class ChannelGroups:
    """Holds the group labels (columns,) of an input's channels and the affinity (columns, columns) behind them."""

    labels: np.ndarray
    affinity: np.ndarray
    seconds: float  # spent on affinity and clustering


class MutualInformation(Method):
    """Clusters channels that share information into ``groups``; redundant groups get fewer bits, independent ones more.

    The desired bits rise by ``spread_bits`` from the most redundant group to the most independent one, evenly over the
    channels in between. With ``spread_bits: null``, a group whose pairs share I bits on average gets I bits per channel
    less, because the entropy of a Gaussian given another falls by what they share. With ``normalized`` information
    (from 0 to 1) it is I times the span of the levels. One more desired bit makes a group's score four times as high.
    ``importance`` multiplies the score by the group's mean five-dimensional score.
    Strategy A: the channels of a group share one scale and zero. B: they share the bits, each with its own grid.
    """

    axis = "target_avg_bits"
    needs_samples = True
    kind: Literal["mutual_information"] = "mutual_information"
    strategy: Literal["A", "B"] = Field("B", description="A: a group shares scale and zero; B: it shares the bits")
    groups: int = Field(16, ge=1, description="for each input; at most its channels")
    estimate: Estimate = Field("histogram", description="of mutual information")
    bins: int = Field(DEFAULT_BINS, ge=2, description="of histograms")
    normalized: bool = Field(True, description="information from 0 to 1")
    clustering: Clustering = Field("spectral", description="how groups are found")
    spread_bits: float | None = Field(
        4.0, ge=0, description="between the most redundant and the most independent group"
    )
    importance: bool = Field(False, description="multiply scores by the groups' importance")
    levels: tuple[int, ...] = Field(THREE_LEVELS, description="bits that a channel may take")
    target_avg_bits: float = Field(4.0, description="bits per weight of every layer")
    grid: GridSettings = Field(GridSettings(share="channel"), description="of each channel")
    compensate: bool = Field(True, description="spread each column's error over the columns after it")

    @field_validator("levels")
    @classmethod
    def rising(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        """Raise ValueError unless there are two or more levels, rising and from 1 to 8."""
        return check_levels(levels)

    @model_validator(mode="after")
    def within_reach(self) -> Self:
        """Raise ValueError for a target outside of the levels."""
        budget_bits(np.ones(1), self.target_avg_bits, self.levels)
        return self

    def check(self, columns: int) -> None:
        """Raise ValueError for more groups than ``columns``, the channels of the smallest input."""
        if self.groups > columns:
            raise ValueError(f"expected groups from 1 to {columns}, the smallest input's channels, found {self.groups}")

    def channel_groups(self, source: LayerInput) -> ChannelGroups:
        """Return the groups of an input's channels, computed once per input.

        Without activation samples all channels form one group. Raises ValueError for more groups than channels.
        """
        if "groups" not in source.memo:
            seconds, affinity = 0.0, np.zeros(source.H.shape)
            labels = np.zeros(len(source.H), dtype=np.int64)
            if source.samples is not None:
                found, seconds = source.samples.information(self.estimate, self.bins)
                affinity = (found.normalized() if self.normalized else found.information).numpy()
                started = time.perf_counter()
                labels = group(affinity, self.groups, self.clustering)
                seconds += time.perf_counter() - started
            source.memo["groups"] = ChannelGroups(labels, affinity, seconds)
        groups: ChannelGroups = source.memo["groups"]
        return groups

    def scores(self, layer: StudyLayer, groups: ChannelGroups) -> np.ndarray:
        """Return the score of each group, float64 (K,)."""
        shared = redundancy(groups.affinity, groups.labels)
        if self.spread_bits is None:
            wanted = -shared * (self.levels[-1] - self.levels[0] if self.normalized else 1 / math.log(2))
        else:
            wanted = self.spread_bits * middles(-shared, np.bincount(groups.labels))
        scores: np.ndarray = 4.0**wanted
        if self.importance:
            dimensions = channel_dimensions(layer.W, layer.input.H, layer.input.statistics, U=layer.input.factor)
            channels = combined_importance(dimensions).cpu().numpy()
            scores *= np.bincount(groups.labels, channels) / np.bincount(groups.labels)
        return scores

    def treat(self, layer: StudyLayer) -> TreatedLayer:
        """Return the weights rounded to the bits of their channels' groups."""
        fresh = "groups" not in layer.input.memo
        groups = self.channel_groups(layer.input)
        scores, sizes = self.scores(layer, groups), np.bincount(groups.labels)
        bits = torch.from_numpy(group_bits(scores, sizes, self.target_avg_bits, self.levels)[groups.labels])
        shared = torch.from_numpy(groups.labels) if self.strategy == "A" else None
        mixed = simulate(layer.W, bits, self.grid, layer.input.factor if self.compensate else None, shared)
        score: Tensor = torch.from_numpy(scores[groups.labels])
        seconds = groups.seconds if fresh else 0.0
        return TreatedLayer(mixed.weights, bits, mixed.stored_bits, score, seconds)


def middles(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the middle of each group's interval, (K,) from 0 to 1, with groups laid out in the order of ``values``.

    ``sizes`` (K,) are the groups' numbers of members; a group's interval is as wide as its share of all members.
    """
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(sizes[order])
    result = np.empty(len(values))
    result[order] = (ends - sizes[order] / 2) / ends[-1]
    return result
