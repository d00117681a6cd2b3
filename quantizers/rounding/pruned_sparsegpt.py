"""This module prunes and quantizes in one pass of SparseGPT (Frantar & Alistarh 2023, section 3.5), for every format.

Masks are chosen on compensated weights as the column loop proceeds. Pruned weights become 0, the others are rounded to
the grid, and the errors of both are spread over the columns after them. Block formats use their grid with an exact zero
(``zero_grids``). Float formats are only pruned: the compensated weights are not rounded to a grid.

Legend as in ``sparsegpt``: W transposed (columns, R), U upper with U^T U = H_damped^-1.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantizers.formats.grids import Scales
from quantizers.formats.table import FORMATS, LEVEL_FORMATS, QuantFormat
from quantizers.rounding.codes import Codes
from quantizers.rounding.column_loop import Segment, column_loop
from quantizers.rounding.coordinate_descent import Start, descend, descend_kept
from quantizers.rounding.nearest import check_weights, quantize, row_ranges
from quantizers.rounding.pruning_masks import ColumnMasks, prune_columns
from quantizers.rounding.row_batches import pad_rows
from quantizers.rounding.row_choice import Compensated, better_rows, compensated, row_power
from quantizers.rounding.sparsegpt import conditional_importance
from quantizers.rounding.zero_grids import ZERO_GRIDS, pack_with_zero, quantize_with_zero
from quantizers.settings import CompensationSettings, Sparsity
from quantizers.statistics.hessian import check_hessian, damped, inverse_factor

DEFAULTS = CompensationSettings()
PRUNED_WEIGHTS = 1 << 26  # weights in all their formats that go through one column loop
SWEEPS_PER_ROUND = 2  # kept weights make up for all errors: the third and fourth sweep still gain 7 %


def prune_and_compensate(
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Sequence[QuantFormat]],
    sparsity: Mapping[str, Sparsity],
    H: Tensor,
    settings: CompensationSettings = DEFAULTS,
) -> dict[str, dict[str, Compensated]]:
    """Prune each tensor by its ``sparsity`` and compensate; return results by tensor name and format name.

    Arguments are as for ``compensate``. Every block format has its own mask, float formats share one. Each row is the
    better, by its tr(dW H dW^T), of the compensated row and plain rounding of the original weights under the same mask.
    Weights of dead columns (H_jj = 0) are pruned first. A round of refinement is two sweeps here. Without compensation,
    the weights of least w^2 H_jj are pruned (Wanda, Sun et al. 2023) and the others are rounded. Raises ValueError as
    ``compensate``, and for a format or a row length that cannot hold the sparsity.
    """
    check_hessian(H, len(H))
    for name, W in weights.items():
        for fmt in formats[name]:
            check_weights(fmt, W, len(H))
            check_prunable(fmt, sparsity[name], len(H))
    if settings.compensation:
        U, taken = inverse_factor(H, settings.damping)
        rounds = SWEEPS_PER_ROUND * settings.refinement_rounds
    else:
        U, taken, rounds = damped(H, settings.damping).diagonal().rsqrt().diag(), settings.damping, 0
    importance, U = conditional_importance(U, H), U.float()
    regular = damped(H, taken, torch.empty_like(H, dtype=torch.float32))
    pruned = _prune_blocks(weights, formats, sparsity, U, importance, regular, rounds)
    for name, W in weights.items():
        if any(fmt.is_float for fmt in formats[name]):
            floats = [fmt for fmt in formats[name] if fmt.is_float]
            dense, kept = _prune_dense(W.float(), sparsity[name], U, importance, regular, rounds)
            pruned |= {(name, fmt.name): (quantize(fmt, dense), kept) for fmt in floats}
    results: dict[str, dict[str, Compensated]] = {name: {} for name in weights}
    for name, W in weights.items():
        power = row_power(W.float(), H)
        for fmt in formats[name]:
            data, kept = pruned[name, fmt.name]
            parts = [encode_pruned(fmt, W[rows].float() * kept[rows], H.diagonal()) for rows in row_ranges(W)]
            plain = torch.cat(parts)
            best, errors = better_rows(fmt, W.float(), plain, data, H)
            results[name][fmt.name] = compensated(fmt, W.float(), best, float(errors.sum()), power)
    return results


def check_prunable(fmt: QuantFormat, sparsity: Sparsity, columns: int) -> None:
    """Raise ValueError unless rows of ``columns`` weights in ``fmt`` can store the zeros that ``sparsity`` asks for."""
    if not fmt.is_float and fmt.name not in ZERO_GRIDS:
        valid = [level for level, name in LEVEL_FORMATS.items() if name in ZERO_GRIDS or FORMATS[name].is_float]
        raise ValueError(f"expected levels with an exact zero for pruning ({', '.join(valid)}), found {fmt.name}")
    if sparsity.group and columns % sparsity.group:
        raise ValueError(f"expected a pattern n:m whose m divides rows of {columns} weights, found {sparsity}")


def encode_pruned(fmt: QuantFormat, W: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return bytes uint8 (rows, row_bytes) of W (rows, columns) by plain rounding that keeps its zeros.

    ``importance`` (columns,) is as for ``quantize``. Raises KeyError for a block format without an exact zero.
    """
    return quantize(fmt, W) if fmt.is_float else quantize_with_zero(fmt, W, importance)


def _prune_blocks(
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Sequence[QuantFormat]],
    sparsity: Mapping[str, Sparsity],
    U: Tensor,
    importance: Tensor,
    H: Tensor,
    rounds: int,
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return bytes and ``kept`` bool (rows, columns) by (tensor, format), for all block formats."""
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for batch in _batches(weights, formats, sparsity):
        stack = pad_rows(torch.cat([weights[name][rows].float() for name, _, rows in batch]).T)
        segments, start = [], 0
        for name, fmt, rows in batch:
            segments.append(Segment(ZERO_GRIDS[fmt], slice(start, start := start + len(weights[name][rows]))))
        rules = [(segment.rows, sparsity[name]) for segment, (name, _, _) in zip(segments, batch, strict=True)]
        masks = ColumnMasks(stack, importance, rules)
        integers = column_loop(stack, U, importance, segments, masks)
        for segment, (name, fmt, rows) in zip(segments, batch, strict=True):
            W = weights[name][rows].float()
            kept = masks.kept[:, segment.rows]
            data = _finish(segment, W.T, integers[:, segment.rows], kept, H, rounds)
            found.setdefault((name, fmt), []).append((data, kept.T))
    return {key: (torch.cat([d for d, _ in parts]), torch.cat([k for _, k in parts])) for key, parts in found.items()}


def _finish(segment: Segment, W: Tensor, q: Tensor, kept: Tensor, H: Tensor, rounds: int) -> Tensor:
    """Return the bytes uint8 (N, row_bytes) of integers q after ``rounds`` of descent; W, q, kept are (columns, N)."""
    begin = Codes(Scales.concatenate(segment.scales, 0), q).padded()
    found = descend(Start(segment.grid, pad_rows(W), begin), H, rounds, pad_rows(kept))
    return pack_with_zero(segment.grid, found.scales, found.integers)[: W.shape[1]]


def _batches(
    weights: Mapping[str, Tensor], formats: Mapping[str, Sequence[QuantFormat]], sparsity: Mapping[str, Sparsity]
) -> Iterator[list[tuple[str, str, slice]]]:
    """Yield batches (tensor, block format, rows), of about PRUNED_WEIGHTS weights, for one column loop each.

    An n:m pattern is chosen row by row; a fraction over all rows of a tensor, which therefore stay together.
    """
    batch: list[tuple[str, str, slice]] = []
    size = 0
    for name, W in weights.items():
        for fmt in (fmt for fmt in formats[name] if not fmt.is_float):
            for rows in row_ranges(W) if sparsity[name].group else (slice(0, len(W)),):
                weights_of_rows = W[rows].numel()
                if batch and size + weights_of_rows > PRUNED_WEIGHTS:
                    yield batch
                    batch, size = [], 0
                batch.append((name, fmt.name, rows))
                size += weights_of_rows
    if batch:
        yield batch


def _prune_dense(
    W: Tensor, sparsity: Sparsity, U: Tensor, importance: Tensor, H: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Return compensated float weights and ``kept`` bool, (rows, columns) each; all float formats share this mask."""
    dense = W.T.clone()
    kept = prune_columns(dense, U, importance, sparsity)
    descend_kept(W.T, H, dense, kept, rounds)
    return dense.T, kept.T
