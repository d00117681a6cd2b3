"""This module collects moments of each feature of a linear layer's input, in addition to the Hessian."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputStatistics:
    """Holds moments of each input feature, float32 (columns,).

    For a tied embedding they are the moments of the head's input, whereas its Hessian also counts the lookup.
    """

    mean: Tensor
    mean_abs: Tensor
    abs_max: Tensor
    mean_square: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of each feature, float32 (columns,), not negative."""
        return (self.mean_square - self.mean.square()).clamp(min=0)

    def divided(self, s: Tensor) -> "InputStatistics":
        """Return the moments of the inputs divided by positive ``s`` (columns,)."""
        return InputStatistics(self.mean / s, self.mean_abs / s, self.abs_max / s, self.mean_square / s.square())

    @classmethod
    def of_lookup(cls, columns: int, device: torch.device) -> "InputStatistics":
        """Return moments for a lookup table, whose columns count alike: as if each feature were 1 or -1 at random."""
        ones = torch.ones(columns, device=device)
        return cls(torch.zeros_like(ones), ones, ones.clone(), ones.clone())

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments (columns,) by field name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class StatisticsAccumulator:
    """Accumulates moments of inputs (..., columns), sums in float64."""

    def __init__(self, columns: int, device: torch.device | None = None):
        self.count = 0
        self._sum, self._sum_abs, self._sum_square = torch.zeros(3, columns, dtype=torch.float64, device=device)
        self._abs_max = torch.zeros(columns, device=device)

    def add(self, x: Tensor) -> None:
        """Add the vectors of x (..., columns) to the moments."""
        vectors = x.detach().reshape(-1, x.shape[-1]).float()
        magnitudes = vectors.abs()
        self._sum += vectors.sum(0, dtype=torch.float64)
        self._sum_abs += magnitudes.sum(0, dtype=torch.float64)
        self._sum_square += vectors.square().sum(0, dtype=torch.float64)
        self._abs_max = torch.maximum(self._abs_max, magnitudes.amax(0))
        self.count += len(vectors)

    def statistics(self) -> InputStatistics:
        """Return the moments of all inputs so far. Raises ValueError before the first input."""
        if self.count == 0:
            raise ValueError("the statistics have seen no input")
        mean, mean_abs, mean_square = (
            (total / self.count).float() for total in (self._sum, self._sum_abs, self._sum_square)
        )
        return InputStatistics(mean, mean_abs, self._abs_max.clone(), mean_square)
