"""Moments of a linear layer's input beside its Hessian, feature by feature."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Of each input feature, float32 (columns,); the mean square is the Hessian's diagonal."""

    mean: Tensor
    mean_abs: Tensor
    abs_max: Tensor

    @classmethod
    def of_lookup(cls, columns: int, device: torch.device) -> "InputStatistics":
        """Those of an embedding, whose columns are read all alike: as if every feature were 1 or -1 at random."""
        ones = torch.ones(columns, device=device)
        return cls(torch.zeros_like(ones), ones, ones.clone())

    def tensors(self) -> dict[str, Tensor]:
        """By field name."""
        return {"mean": self.mean, "mean_abs": self.mean_abs, "abs_max": self.abs_max}


class StatisticsAccumulator:
    """Running moments of inputs (..., columns), in float64."""

    def __init__(self, columns: int, device: torch.device | None = None):
        self.count = 0
        self._sum, self._sum_abs = torch.zeros(2, columns, dtype=torch.float64, device=device)
        self._abs_max = torch.zeros(columns, device=device)

    def add(self, x: Tensor) -> None:
        vectors = x.detach().reshape(-1, x.shape[-1]).float()
        magnitudes = vectors.abs()
        self._sum += vectors.sum(0, dtype=torch.float64)
        self._sum_abs += magnitudes.sum(0, dtype=torch.float64)
        self._abs_max = torch.maximum(self._abs_max, magnitudes.amax(0))
        self.count += len(vectors)

    def statistics(self) -> InputStatistics:
        """Raises ValueError before the first input."""
        if self.count == 0:
            raise ValueError("the statistics have seen no input")
        return InputStatistics(
            (self._sum / self.count).float(), (self._sum_abs / self.count).float(), self._abs_max.clone()
        )
