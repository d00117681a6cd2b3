"""This module simulates quantization with a bit width for each input channel, which no GGUF type can store.

Grids are affine and uniform: a weight is step * (q - zero) with q in 0 .. 2^bits - 1 and a range that includes 0. The
weights that share a range are one of:

    channel   all weights of an input channel (a column), as in the published enhancement of SparseGPT
    group     the weights of ``group_size`` neighbouring columns of one row, as in GPTQ; steps differ only by bits
    labels    all weights of all columns with the same label

Columns are rounded in order. With U, each column's error is spread over the columns after it (Frantar & Alistarh 2022,
algorithm 1). A range is fitted to the compensated weights when the loop reaches its first column; ranges by label are
fitted to the original weights.

Shapes: W (rows, columns); bits (columns,), whole numbers from 1; U (columns, columns), upper triangular, with
U^T U = H_damped^-1.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PANEL = 64  # columns between updates of all later columns
SHRINKS = tuple(1 - 0.05 * i for i in range(13))  # fractions of the full range that ``mse`` tries: 1 to 0.4
RANGE_BITS = 32  # stored for each range: scale and zero, each in fp16


@dataclass(frozen=True)
class GridSettings:
    """Settings of the uniform grids: which weights share a range, and how it is fitted.

    ``fit`` minmax takes the full range, mse the fraction of it with the least squared error. ``group_size`` is in
    columns; raises ValueError if it is below 1.
    """

    share: Literal["channel", "group"] = "group"
    group_size: int = 64
    fit: Literal["minmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"expected a group size of at least 1 column, found {self.group_size}")


@dataclass(frozen=True)
class ChannelMixed:
    """Holds simulated weights float32 (rows, columns), the channels' bits (columns,), and the number of ranges."""

    weights: Tensor
    bits: Tensor
    ranges: int

    @property
    def average_bits(self) -> float:
        """Average bits per weight of the integers alone."""
        return float(self.bits.double().mean())

    @property
    def stored_bits(self) -> float:
        """Bits per weight with scales and zeros, if all were packed without padding."""
        return self.average_bits + RANGE_BITS * self.ranges / self.weights.numel()


def simulate(
    W: Tensor, bits: Tensor, grid: GridSettings, U: Tensor | None = None, labels: Tensor | None = None
) -> ChannelMixed:
    """Return W rounded onto its channels' grids.

    With U (columns, columns) errors are compensated. With ``labels`` (columns,), integers, columns of equal label share
    a range. Raises ValueError for shapes that do not fit, weights that are not finite and bits below 1.
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
    """Return the decoded weights (rows, columns); ``top`` (columns,) are the largest integers."""
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
    """Provides the range of every column, fitted when the column loop reaches the first column that uses it."""

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
        """Return low and high, (rows,) or (1,), for column j of ``left`` (columns, rows), the compensated weights."""
        if self.labels is not None:
            return self.by_label[self.labels[j]]
        size = 1 if self.grid.share == "channel" else self.grid.group_size
        if self.current is None or j % size == 0:
            part = slice(j, j + size)
            self.current = fit_range(left[part], self.top[part], self.grid.fit, per_row=self.grid.share == "group")
        return self.current


def fit_range(x: Tensor, top: Tensor, fit: str, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """Return the range of x (columns, rows), low <= 0 <= high: (rows,) each if ``per_row``, else (1,).

    ``top`` (columns,) are the largest integers; ``fit`` is minmax or mse, as in ``GridSettings``.
    """
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
    """Return x rounded to the nearest of ``top`` + 1 values from low to high, one of them 0; arguments broadcast."""
    step = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / step).round()
    return ((x / step).round().add_(zero).clamp_(min=0).minimum(top) - zero) * step
