"""This module holds what the rows of a format store, before it is packed: scales and integers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.formats.grids import Scales
from quantizers.rounding.nearest import pad_rows


@dataclass(frozen=True)
class Codes:
    """Holds scales and integers int8 (columns, N) of N rows."""

    scales: Scales
    integers: Tensor

    def rows(self, start: int, stop: int) -> "Codes":
        """Return the codes of the rows from ``start`` to before ``stop``."""
        scales = self.scales.map(lambda member: member[..., start:stop])
        return Codes(scales, self.integers[:, start:stop])

    def padded(self) -> tuple[Scales, Tensor]:
        """Return scales and integers with rows of zeros up to a whole tile."""
        return self.scales.map(pad_rows), pad_rows(self.integers)

    @classmethod
    def joined(cls, parts: Sequence["Codes"]) -> "Codes":
        """Return the rows of all ``parts`` in order."""
        return cls(Scales.concatenate([part.scales for part in parts], 3), torch.cat([p.integers for p in parts], 1))
