"""This module rounds weights to the nearest values of a GGUF type, without compensation, and packs them.

Shapes: W (rows, columns), data uint8 (rows, row_bytes).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bitgenome.common.devices import chunk_bytes
from bitgenome.common.replay import records, replayed, side_by_side
from quantizers.formats.codebook_packing import pack_codebook
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.grids import FP16_MAX, GRIDS, Grid, Scales, round_to_grid, safe_inverse
from quantizers.formats.packed_tensor import FLOAT_TYPES
from quantizers.formats.scalar_packing import pack
from quantizers.formats.table import FORMATS, SUPER_BLOCK, QuantFormat
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
    if not fmt.is_float:
        importance = normalized_importance(importance, W.shape[1], W.device)
    ((_, data),) = quantize_all({fmt.name: W}, importance)
    return data


def quantize_all(wanted: Mapping[str, Tensor], importance: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Yield format names and bytes as ``quantize`` returns them, of weights (rows, columns) of one shape by format.

    They are not checked; ``importance`` (columns,) is normalized, and may be None where all formats are floats. An
    accelerator rounds to scalar formats side by side, a CPU to one after another.
    """
    blocks = [name for name in wanted if not FORMATS[name].is_float]
    for name in wanted.keys() - blocks:
        yield name, wanted[name].to(FLOAT_TYPES[name]).contiguous().view(torch.uint8)
    together = [name for name in blocks if name not in CODEBOOK_GRIDS and wanted[name].device.type != "cpu"]
    for names in filter(None, (together, *([name] for name in blocks if name not in together))):
        assert importance is not None
        made = [
            _quantize_rows({name: wanted[name][rows] for name in names}, importance)
            for rows in row_ranges(wanted[names[0]])
        ]
        for name in names:
            parts = [part.pop(name) for part in made]
            yield name, parts[0] if len(parts) == 1 else torch.cat(parts)


def row_ranges(W: Tensor) -> Iterator[slice]:
    """Yield ranges of the rows of W (rows, columns), of some ROUNDED_WEIGHTS weights each, in order.

    What rounding takes beside W then does not grow with its rows. Rows are independent, so the bytes do not depend on
    the ranges.
    """
    step = rows_at_once(W)
    return (slice(first, first + step) for first in range(0, max(1, len(W)), step))


def rows_at_once(W: Tensor) -> int:
    """Return of how many rows of W (rows, columns) copies are made at once."""
    weights = ROUNDED_WEIGHTS if W.device.type == "cpu" else ACCELERATOR_WEIGHTS
    return max(ROW_TILE, weights // W.shape[1] // ROW_TILE * ROW_TILE)


def _quantize_rows(wanted: Mapping[str, Tensor], importance: Tensor) -> dict[str, Tensor]:
    """Return bytes uint8 (rows, row_bytes) of W (rows, columns) by format name, of scalar formats or of one codebook.

    ``importance`` (columns,) is normalized.
    """
    columns_first = {name: W.T.float() for name, W in wanted.items()}
    (first, W), *_ = columns_first.items()
    if first in CODEBOOK_GRIDS:
        codebook = CODEBOOK_GRIDS[first]
        fitted, codewords = codebook_loop(codebook, pad_rows(W), importance)
        return {first: pack_codebook(codebook, fitted, codewords)[: W.shape[1]]}
    grids = tuple(GRIDS[name] for name in wanted)
    scales: list[list[Scales]] = [[] for _ in grids]
    integers: list[list[Tensor]] = [[] for _ in grids]
    step = SUPER_BLOCK if records(W.device) else chunk_columns(W.T)  # small copies, where launches cost nothing
    for start in range(0, len(W), step):
        columns = slice(start, start + step)
        chunks = [part[columns] for part in columns_first.values()]
        made = replayed(_round_chunks, (grids,), (importance[columns], *chunks))
        for i in range(len(grids)):
            rounded, *members = (tensor.clone() for tensor in made[5 * i : 5 * i + 5])
            integers[i].append(rounded)
            scales[i].append(Scales(*members))
    return {
        grid.format.name: pack(grid, Scales.concatenate(s, 0), torch.cat(q))
        for grid, s, q in zip(grids, scales, integers, strict=True)
    }


def _round_chunks(grids: Sequence[Grid], weight: Tensor, *parts: Tensor) -> list[Tensor]:
    """Return for each of ``grids`` integers int8 (columns, N) and the members of scales.

    ``parts`` are weights (columns, N) for each of ``grids``, of importance ``weight`` (columns,).
    """
    made = side_by_side([partial(_round_chunk, grid, part, weight) for grid, part in zip(grids, parts, strict=True)])
    return [tensor for found in made for tensor in found]


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
