"""Simulated quantization with a bit width for each input channel, which no GGUF type can hold.

Grids are affine and uniform: a weight is step * (q - zero) with q in 0 .. 2^bits - 1 and a range that holds 0. What
shares a range:

    channel   every weight of an input channel (a column), as the published enhancement of SparseGPT does
    group     the weights of ``group_size`` neighbouring columns of one row, as GPTQ does; steps differ by bits alone
    labels    every weight of all columns with the same label

Columns are rounded in order. With U each column's error is spread over the columns after it (Frantar & Alistarh 2022,
algorithm 1), and ranges are fitted to the compensated weights where they begin; those by labels to the original ones.

Shapes: W (rows, columns); bits (columns,) whole numbers from 1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PANEL = 64  # columns between updates of all later ones
SHRINKS = tuple(1 - 0.05 * i for i in range(13))  # parts of the full range tried by ``mse``: 1 to 0.4
RANGE_BITS = 32  # two half floats, scale and zero, stored for each range


@dataclass(frozen=True)
class GridSettings:
    """``fit`` is the full range, or the part of it of least squared error. Raises ValueError for no group size."""

    share: Literal["channel", "group"] = "group"
    group_size: int = 64
    fit: Literal["minmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"expected a group size of at least 1 column, found {self.group_size}")


@dataclass(frozen=True)
class ChannelMixed:
    """Simulated weights float32 (rows, columns), the channels' bits (columns,), and the ranges that are stored."""

    weights: Tensor
    bits: Tensor
    ranges: int

    @property
    def average_bits(self) -> float:
        """Of the integers alone."""
        return float(self.bits.double().mean())

    @property
    def stored_bits(self) -> float:
        """Bits a weight with scales and zeros, as if packed without loss."""
        return self.average_bits + RANGE_BITS * self.ranges / self.weights.numel()


def simulate(
    W: Tensor, bits: Tensor, grid: GridSettings, U: Tensor | None = None, labels: Tensor | None = None
) -> ChannelMixed:
    """W rounded onto its channels' grids; with U (columns, columns) compensated, with ``labels`` (columns,) shared.

    Raises ValueError for shapes that do not fit, weights that are not finite and bits below 1.
    """
    columns = W.shape[1]
    if bits.shape != (columns,) or (bits < 1).any():
        raise ValueError(f"expected {columns} bit widths of at least 1, one a column, found {tuple(bits.shape)}")
    if not W.isfinite().all():
        raise ValueError(f"weights hold {int((~W.isfinite()).sum())} non-finite values of {W.numel()}")
    top = (2.0 ** bits.to(W.device) - 1).float()
    ranges = _Ranges(W.float(), top, grid, labels)
    return ChannelMixed(_column_loop(W.float(), top, ranges, U), bits, ranges.count)


def _column_loop(W: Tensor, top: Tensor, ranges: "_Ranges", U: Tensor | None) -> Tensor:
    """Decoded weights (rows, columns)."""
    left = W.T.contiguous()  # (columns, rows)
    decoded = torch.empty_like(left)
    U = None if U is None else U.float()
    for start in range(0, len(left), PANEL):
        end = min(start + PANEL, len(left))
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            low, high = ranges.at(j, left)
            decoded[j] = round_affine(left[j], low, high, top[j])
            if U is not None:
                errors[j - start] = (left[j] - decoded[j]) / U[j, j]
                left[j + 1 : end].addcmul_(U[j, j + 1 : end, None], errors[j - start], value=-1)
        if U is not None:
            left[end:] -= U[start:end, end:].T @ errors
    return decoded.T.contiguous()


class _Ranges:
    """The range of every column, fitted where it begins."""

    def __init__(self, W: Tensor, top: Tensor, grid: GridSettings, labels: Tensor | None):
        self.grid, self.top = grid, top
        self.by_label: dict[int, tuple[Tensor, Tensor]] = {}
        self.labels = None if labels is None else labels.tolist()
        self.current: tuple[Tensor, Tensor] | None = None
        rows, columns = W.shape
        if self.labels is not None:
            members = {label: [j for j, own in enumerate(self.labels) if own == label] for label in set(self.labels)}
            self.by_label = {k: fit_range(W.T[own], top[own], grid.fit, per_row=False) for k, own in members.items()}
            self.count = len(members)
        else:
            self.count = columns if grid.share == "channel" else rows * -(-columns // grid.group_size)

    def at(self, j: int, left: Tensor) -> tuple[Tensor, Tensor]:
        """Low and high (rows or 1,) for column j of ``left`` (columns, rows), the weights still to be rounded."""
        if self.labels is not None:
            return self.by_label[self.labels[j]]
        size = 1 if self.grid.share == "channel" else self.grid.group_size
        if self.current is None or j % size == 0:
            part = slice(j, j + size)
            self.current = fit_range(left[part], self.top[part], self.grid.fit, per_row=self.grid.share == "group")
        return self.current


def fit_range(x: Tensor, top: Tensor, fit: str, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """Low <= 0 <= high, each (rows,) or (1,), for x (columns, rows) with largest integers ``top`` (columns,)."""
    dims = (0,) if per_row else (0, 1)
    low, high = x.amin(dims).clamp(max=0).view(-1), x.amax(dims).clamp(min=0).view(-1)
    if fit == "minmax":
        return low, high
    shrinks = torch.tensor(SHRINKS, device=x.device)[:, None]  # (P, 1)
    lows, highs = shrinks * low, shrinks * high  # (P, rows or 1)
    error = (round_affine(x, lows[:, None], highs[:, None], top[:, None]) - x).square_()
    best = error.sum([d + 1 for d in dims]).view(len(SHRINKS), -1).argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def round_affine(x: Tensor, low: Tensor, high: Tensor, top: Tensor) -> Tensor:
    """The nearest of the ``top`` + 1 values between low and high, of which 0 is one; all broadcast."""
    step = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / step).round()
    return ((x / step).round().add_(zero).clamp_(min=0).minimum(top) - zero) * step
