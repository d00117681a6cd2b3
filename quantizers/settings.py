"""This module defines the settings of rounding, pruning and channel scaling; it does no tensor arithmetic."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from bitgenome.common.section import Section

Importance = Literal["conditional", "hessian", "five_dimensional"]  # column weights to fit scales with
PRUNING_GROUPS = (2, 4, 8, 16, 32)  # m of n:m; each divides the block size of every block format


@dataclass(frozen=True)
class CompensationSettings:
    """Settings of rounding weights onto the grid of a GGUF format, with or without error compensation."""

    damping: float = 0.01  # relative to the Hessian's mean diagonal (quantizers.statistics.hessian.inverse_factor)
    compensation: bool = True  # spread each column's error over later columns; else importance-weighted rounding
    refinement_rounds: int = 2  # of coordinate descent after compensation; a third round gains another 1 to 2 %


class ScalingSettings(Section):
    """Settings of channel scaling, which rescales weights so that they round better.

    Inverse scales are folded into the tensors that produce each input, so the model's function stays the same. Kind
    ``smoothquant`` scales by max|X|^alpha / max|W|^(1 - alpha); ``awq`` searches alpha for every input.
    """

    kind: Literal["none", "smoothquant", "awq"] = Field("none", description="which scales")
    alpha: float = Field(0.5, ge=0, le=1, description="of smoothquant")
    grid: int = Field(20, ge=1, le=1000, description="values of alpha that awq tries")
    protect: float = Field(0.0, ge=0, lt=1, description="share of columns, the most salient, that are doubled")

    @property
    def active(self) -> bool:
        """Whether anything is scaled."""
        return self.kind != "none" or self.protect > 0


@dataclass(frozen=True)
class Sparsity:
    """States how much of a tensor is pruned, unstructured or n:m.

    ``fraction`` is the share of zeros: in every mask block if unstructured, else in every ``group`` columns of a row.
    """

    fraction: float
    group: int = 0  # m of n:m; 0: unstructured

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}" if self.group else f"{self.fraction:g}"

    @property
    def zeros(self) -> int:
        """Number of zeros in every group, the n of n:m; 0 if unstructured."""
        return round(self.fraction * self.group)

    @classmethod
    def of_fraction(cls, fraction: float) -> "Sparsity":
        """Return an unstructured sparsity. Raises ValueError unless 0 <= ``fraction`` < 1."""
        if not 0 <= fraction < 1:
            raise ValueError(f"expected a sparsity of at least 0 and below 1, found {fraction:g}")
        return cls(fraction)

    @classmethod
    def of_pattern(cls, pattern: str) -> "Sparsity":
        """Return the sparsity of ``"n:m"``: n zeros in every m neighbouring weights of a row.

        Raises ValueError for another pattern.
        """
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        groups = ", ".join(map(str, PRUNING_GROUPS))
        if match is None:
            raise ValueError(f'expected a pattern "n:m" such as "2:4", n zeros in every m weights, found {pattern!r}')
        n, m = int(match[1]), int(match[2])
        if m not in PRUNING_GROUPS:
            raise ValueError(f"expected m of a pattern n:m among {groups}, found {pattern!r}")
        if not 0 < n < m:
            raise ValueError(f"expected n of a pattern n:m from 1 to m - 1, found {pattern!r}")
        return cls(n / m, m)
