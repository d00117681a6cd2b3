"""This module computes the five-dimensional importance of whole tensors, which serves as a prior of the search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitgenome.common.devices import best_device
from evaluators.model.folder import ModelFolder
from evaluators.prepare.input_group import InputGroup
from quantizers.statistics.importance import DIMENSIONS, ImportanceWeights, channel_dimensions, combined_importance
from quantizers.statistics.moments import InputStatistics
from search.types import SearchSpace


@dataclass(frozen=True)
class MeasureImportance:
    """Pool task that measures the five dimensions of importance for the tensors of one input group.

    ``damping`` is relative to the mean diagonal of the Hessian.
    """

    model: Path
    group: Path  # file of the InputGroup
    damping: float

    @property
    def label(self) -> str:
        return f"importance[{self.group.stem}]"

    def run(self, state: dict[Any, Any]) -> dict[str, dict[str, float]]:
        """Return, by tensor and dimension, the mean over the tensor's channels."""
        folder, group, device = ModelFolder(self.model), InputGroup.load(self.group), best_device()
        H = group.hessian.to(device)
        statistics = InputStatistics(**{name: t.to(device) for name, t in group.statistics.tensors().items()})
        found = {}
        for name in group.tensors:
            W = folder.read(name).to(device, torch.float32)
            dimensions = channel_dimensions(W, H, statistics, self.damping)
            found[name] = {dimension: float(values.mean()) for dimension, values in dimensions.items()}
        return found


def gene_importance(
    space: SearchSpace, dimensions: Mapping[str, Mapping[str, float]], weights: ImportanceWeights | None = None
) -> tuple[float, ...]:
    """Return a score for each gene: the mean of its tensors' combined importance, weighted by their numbers of weights.

    ``dimensions`` holds the five dimensions by tensor, as ``MeasureImportance`` returns them; each is divided by its
    mean over all tensors. Sensitivity is taken per row, so that a tensor does not count more for having more rows.
    ``weights`` are those of the five dimensions.
    """
    names = list(dimensions)
    rows = {t: shape[0] for gene in space.genes for t, shape in zip(gene.tensors, gene.shapes, strict=True)}
    columns = {key: torch.tensor([dimensions[name][key] for name in names], dtype=torch.float64) for key in DIMENSIONS}
    columns["sensitivity"] /= torch.tensor([rows[name] for name in names], dtype=torch.float64)
    scores = dict(zip(names, combined_importance(columns, weights).tolist(), strict=True))
    return tuple(_mean([scores[t] for t in gene.tensors], [s[0] * s[1] for s in gene.shapes]) for gene in space.genes)


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
