"""This module rounds weights to the nearest values of a GGUF type, without compensation, and packs them.

Shapes: W (rows, columns), data uint8 (rows, row_bytes).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bitgenome.common.devices import chunk_bytes
from bitgenome.common.replay import records, replayed
from quantizers.formats.codebook_packing import pack_codebook
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.grids import FP16_MAX, GRIDS, Grid, Scales, round_to_grid, safe_inverse
from quantizers.formats.packed_tensor import FLOAT_TYPES
from quantizers.formats.scalar_packing import pack
from quantizers.formats.table import SUPER_BLOCK, QuantFormat
from quantizers.rounding.codebook_loop import codebook_loop
from quantizers.rounding.row_batches import ROW_TILE, pad_rows
from quantizers.rounding.scale_search import fit

CHUNK_BYTES = 1 << 18  # of a temporary of the scale search on a CPU
FLOAT_BYTES = 4
ROUNDED_WEIGHTS = 1 << 24  # weights of whole rows rounded at once: a head of 128k rows has 5e8, and takes 20 times that
ACCELERATOR_WEIGHTS = 1 << 26  # the same on an accelerator, where every step launches kernels


def quantize(fmt: QuantFormat, W: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return bytes uint8 (rows, row_bytes) of W float (rows, columns), minimizing sum(importance * (W - decoded)^2).

    ``importance`` (columns,), not negative, is for example the mean square of each input feature; None weights all
    columns alike. Columns of importance 0 count a millionth of the mean (``normalized_importance``). Float formats
    ignore it. Raises ValueError for a row length that does not fit, non-finite weights or weights too large for F16,
    an importance of the wrong length, and non-finite or negative importance.
    """
    check_weights(fmt, W)
    if fmt.is_float:
        return W.to(FLOAT_TYPES[fmt.name]).contiguous().view(torch.uint8)
    importance = normalized_importance(importance, W.shape[1], W.device)
    parts = [_quantize_rows(fmt, W[rows], importance) for rows in row_ranges(W)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_ranges(W: Tensor) -> Iterator[slice]:
    """Yield ranges of the rows of W (rows, columns), of some ROUNDED_WEIGHTS weights each, in order.

    What rounding takes beside W then does not grow with its rows. Rows are independent, so the bytes do not depend on
    the ranges.
    """
    weights = ROUNDED_WEIGHTS if W.device.type == "cpu" else ACCELERATOR_WEIGHTS
    step = max(ROW_TILE, weights // W.shape[1] // ROW_TILE * ROW_TILE)
    return (slice(first, first + step) for first in range(0, max(1, len(W)), step))


def _quantize_rows(fmt: QuantFormat, W: Tensor, importance: Tensor) -> Tensor:
    """Return bytes uint8 (rows, row_bytes) of W (rows, columns) under a normalized importance (columns,)."""
    columns_first = W.T.float()
    if fmt.name in CODEBOOK_GRIDS:
        codebook = CODEBOOK_GRIDS[fmt.name]
        fitted, codewords = codebook_loop(codebook, pad_rows(columns_first), importance)
        return pack_codebook(codebook, fitted, codewords)[: len(W)]
    grid = GRIDS[fmt.name]
    scales, integers = [], []
    step = SUPER_BLOCK if records(W.device) else chunk_columns(W)  # small copies, where launches cost nothing
    for part, weight in zip(columns_first.split(step), importance.split(step), strict=True):
        rounded, *members = replayed(_round_chunk, (grid,), (part, weight))
        scales.append(Scales(*members).map(Tensor.clone))
        integers.append(rounded.clone())
    return pack(grid, Scales.concatenate(scales, 0), torch.cat(integers))


def _round_chunk(grid: Grid, part: Tensor, weight: Tensor) -> list[Tensor]:
    """Return integers int8 (columns, N) for weights (columns, N) of importance (columns,), and members of scales."""
    scales = fit_rows(grid, part, weight)
    return [nearest_integers(grid, scales, part), *scales.members]


def fit_rows(grid: Grid, columns_first: Tensor, importance: Tensor) -> Scales:
    """Return scales fitted to weights (columns, N) under importance (columns,), chunk by chunk of rows."""
    weight = grid.blocks(importance[:, None])
    weights = chunk_bytes(columns_first.device, CHUNK_BYTES) // FLOAT_BYTES
    rows = max(ROW_TILE, weights // len(columns_first) // ROW_TILE * ROW_TILE)
    parts = [fit(grid, grid.blocks(part.contiguous()), weight) for part in pad_rows(columns_first).split(rows, 1)]
    return Scales.concatenate(parts, 3).map(lambda member: member[..., : columns_first.shape[1]])


def chunk_columns(W: Tensor) -> int:
    """Return how many columns of W (rows, columns) are rounded at a time, whole super-blocks: one on a CPU."""
    weights = chunk_bytes(W.device, 0) // FLOAT_BYTES
    return max(SUPER_BLOCK, weights // max(1, len(W)) // SUPER_BLOCK * SUPER_BLOCK)


def nearest_integers(grid: Grid, scales: Scales, columns_first: Tensor) -> Tensor:
    """Return the integers int8 (columns, N) whose decoded values are nearest to the weights (columns, N)."""
    x = grid.blocks(columns_first.contiguous())
    return round_to_grid(grid, x, scales.offset, safe_inverse(scales.step)).to(torch.int8).view_as(columns_first)


def check_weights(fmt: QuantFormat, W: Tensor, columns: int | None = None) -> None:
    """Raise ValueError unless W is a finite matrix, of ``columns`` if given, that ``fmt`` can store.

    Rows must divide into blocks, and magnitudes must not exceed the range of F16 if that is the format.
    """
    if W.ndim != 2 or columns not in {None, W.shape[1]}:
        raise ValueError(f"expected weights (rows, {columns or 'columns'}), got shape {tuple(W.shape)}")
    fmt.row_bytes(W.shape[1])
    parts = [W[rows] for rows in row_ranges(W)]
    if not all(part.isfinite().all() for part in parts):
        raise ValueError(f"weights hold {int((~W.isfinite()).sum())} non-finite values of {W.numel()}")
    if fmt.name == "F16" and (largest := max(float(part.abs().amax()) for part in parts)) > FP16_MAX:
        raise ValueError(f"weights reach {largest:g}, more than F16 can hold ({FP16_MAX:g})")


def normalized_importance(importance: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """Return importance float32 (columns,) divided by its mean and at least 1e-6, so that every column counts.

    None and all zeros give ones. Raises ValueError for a wrong length and for non-finite or negative values.
    """
    if importance is None:
        return torch.ones(columns, device=device)
    if importance.shape != (columns,):
        raise ValueError(f"expected importance of shape ({columns},), got {tuple(importance.shape)}")
    if not importance.isfinite().all() or (importance < 0).any():
        raise ValueError("importance must be finite and not negative")
    mean = importance.double().mean()
    if mean == 0:
        return torch.ones(columns, device=device)
    return (importance.double() / mean).clamp(min=1e-6).float().to(device)
