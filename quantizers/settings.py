"""Settings of rounding, pruning and channel scaling, apart from the tensor mathematics that they steer."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from bitgenome.common.section import Section

Importance = Literal["conditional", "hessian", "five_dimensional"]  # of an input's columns, when scales are fitted
PRUNING_GROUPS = (2, 4, 8, 16, 32)  # m of n:m: a group then lies within one scale block of every GGUF format


@dataclass(frozen=True)
class CompensationSettings:
    """How weights get onto their grids."""

    damping: float = 0.01  # of the Hessian's mean diagonal (see quantizers.statistics.hessian.inverse_factor)
    compensation: bool = True  # spread every column's error over later ones; else rounding by importance alone
    refinement_rounds: int = 2  # of coordinate descent after compensation; the third gains another 1 to 2 %


class ScalingSettings(Section):
    """Channel scaling, folded into the tensors before each input; the function stays the same.

    ``smoothquant``: max|X|^alpha / max|W|^(1 - alpha); ``awq``: alpha searched for every input.
    """

    kind: Literal["none", "smoothquant", "awq"] = "none"
    alpha: float = Field(0.5, ge=0, le=1, description="of smoothquant")
    grid: int = Field(20, ge=1, le=1000, description="values of alpha that awq tries")
    protect: float = Field(0.0, ge=0, lt=1, description="share of columns, the most salient, that are doubled")

    @property
    def active(self) -> bool:
        """Whether anything is scaled."""
        return self.kind != "none" or self.protect > 0


@dataclass(frozen=True)
class Sparsity:
    """How much of a tensor is pruned: ``fraction`` of every mask block, or of every ``group`` columns of each row."""

    fraction: float
    group: int = 0  # m of n:m; 0: unstructured

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}" if self.group else f"{self.fraction:g}"

    @property
    def zeros(self) -> int:
        """n of n:m, the zeros in every group."""
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
