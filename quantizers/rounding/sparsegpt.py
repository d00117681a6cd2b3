"""This module quantizes onto GGUF's grids with SparseGPT/GPTQ compensation (Frantar & Alistarh 2022, 2023).

Columns are rounded in order, and each column's error is spread over the columns after it so that the output changes
least. At the start of each scale block, its scales are fitted to the compensated weights and frozen. Rows are
independent, so all tensors that read the same input, in all their formats, are stacked as rows under one factorization
of H. All scalar formats share one column loop.

Legend: H (columns, columns), U upper with U^T U = H_damped^-1, W transposed (columns, R) with R rows of all tensors
and formats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.grids import GRIDS, Scales
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.codebook_loop import VectorBlock, codebook_loop
from quantizers.rounding.codes import Codes
from quantizers.rounding.column_loop import Segment, column_loop
from quantizers.rounding.coordinate_descent import Start, descend_all
from quantizers.rounding.levels import Levels
from quantizers.rounding.nearest import check_weights, normalized_importance, quantize_all
from quantizers.rounding.row_batches import batch_rows, even_batches, pad_rows, row_batches
from quantizers.rounding.row_choice import Compensated, better_rows
from quantizers.rounding.row_order import ROW_SWEEPS, RowOrder
from quantizers.settings import CompensationSettings
from quantizers.statistics.hessian import check_hessian, damped, inverse_factor

DEFAULTS = CompensationSettings()


def compensate(
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Sequence[QuantFormat]],
    H: Tensor,
    settings: CompensationSettings = DEFAULTS,
    importance: Tensor | None = None,
    plain: Tensor | None = None,
    outputs: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Compensated]]:
    """Quantize each tensor to its formats with compensation; return bytes and errors by tensor name and format name.

    ``weights`` are float (rows, columns) and read the same input, whose Hessian is H (columns, columns); ``formats``
    lists the formats wanted of each. ``importance`` (columns,) weights the fit of scales in the column loop, by default
    ``conditional_importance``. Each row is the better, by its tr(dW H dW^T), of the compensated row and plain rounding
    with importance ``plain`` (columns,), by default diag(H), so none is worse than ``quantize``. Columns with H_jj = 0
    are rounded plainly; float formats are only converted.

    ``outputs`` holds the output factors S (blocks, r, r) of tensors that are rounded on both sides, for the least
    tr(S dW H dW^T): see quantizers.rounding.row_order. Rows then aim at what makes up for the rows before them, and the
    better of two rows is the one closer to that.

    Raises ValueError for shapes that do not fit, non-finite values and a Hessian that is not positive semidefinite.
    """
    columns = len(H)
    check_hessian(H, columns)
    for name, W in weights.items():
        for fmt in formats[name]:
            check_weights(fmt, W, columns)
    blocks = any(not fmt.is_float for choices in formats.values() for fmt in choices)
    if blocks:
        plain = normalized_importance(H.diagonal() if plain is None else plain, columns, H.device)
    factored = factor(H, settings.damping, importance) if settings.compensation and blocks else None
    sides = outputs if outputs and factored else {}
    found = {name: Levels(W, formats[name], RowOrder(len(W), sides.get(name))) for name, W in weights.items()}
    steps = max((levels.order.steps for levels in found.values()), default=0)
    for sweep in range(1 if steps == 1 else 1 + ROW_SWEEPS):
        for step in range(steps):
            parts = [(name, levels.targets(sweep, step)) for name, levels in found.items()]
            targets = {(name, fmt): target for name, part in parts for fmt, target in part.items()}
            if steps > 1 and not all(target.isfinite().all() for target in targets.values()):
                raise ValueError("rows aim at non-finite values: check the output factors")
            rows = {key: target for key, target in targets.items() if not FORMATS[key[1]].is_float}
            begin = {(name, fmt): found[name].codes(fmt, step) for name, fmt in rows} if sweep else None
            data = compensate_rows(rows, factored, settings.refinement_rounds, begin, steps > 1) if factored else {}
            for name, part in parts:
                there = ((wanted, found[name].data(wanted, step)) for wanted in part)
                for wanted, other in there if sweep else quantize_all(part, plain):
                    made, codes = data.pop((name, wanted), (None, None))
                    better = better_rows(FORMATS[wanted], part[wanted], other, made, H)
                    found[name].take(wanted, step, *better, codes)
    return {name: levels.result(H) for name, levels in found.items()}


def conditional_importance(U: Tensor, H: Tensor) -> Tensor:
    """Return 1 / U_jj^2, float32 (columns,) of mean 1: the cost of an error in column j, compensated by later columns.

    For fitting scales it lowers tr(dW H dW^T) by about 1 % compared with diag(H) (measured on a trained model, all
    formats). U and H are (columns, columns); dead columns (H_jj = 0) count only the minimum of
    ``normalized_importance``.
    """
    cost = U.diagonal().square().reciprocal()
    return normalized_importance(torch.where(H.diagonal() == 0, 0.0, cost), len(H), H.device)


def factor(H: Tensor, damping: float, importance: Tensor | None = None) -> "Factored":
    """Return what compensation needs of H (columns, columns); ``damping`` is relative to its mean diagonal.

    Raises ValueError for an H that is not positive semidefinite and for an importance that does not fit.
    """
    U, taken = inverse_factor(H, damping)
    if importance is None:
        importance = conditional_importance(U, H)
    else:
        importance = normalized_importance(importance, len(H), H.device)
    U = U.float()  # before the next matrix is made: in a wide layer each takes gigabytes
    return Factored(damped(H, taken, torch.empty_like(H, dtype=torch.float32)), U, importance)


def compensate_rows(
    targets: "Targets",
    factored: "Factored",
    rounds: int,
    begin: Mapping[tuple[str, str], Codes] | None = None,
    keep: bool = False,
) -> dict[tuple[str, str], tuple[Tensor, Codes | None]]:
    """Return compensated bytes uint8 (rows, row_bytes) by (tensor, block format), for rows of every tensor.

    ``targets`` are float32 (rows, columns), as many rows of a tensor in all its formats; ``rounds`` are of coordinate
    descent, which starts from the codes ``begin`` if they are given. With ``keep`` the codes come with the bytes.
    """
    rows, device = {name: len(target) for (name, _), target in targets.items()}, factored.H.device
    wanted = sorted({fmt for _, fmt in targets})
    pieces: dict[tuple[str, str], list[tuple[Tensor, Codes | None]]] = {}
    limit = batch_rows(len(factored.H), len(wanted), device)
    if device.type != "cpu":
        limit = even_batches(sum(rows.values()), limit)
    for batch in row_batches(rows, limit):
        part = {key: targets[key][batch[key[0]]] for key in targets if key[0] in batch}
        start = begin and {key: begin[key].rows(batch[key[0]].start, batch[key[0]].stop) for key in part}
        members = {fmt: [name for name in batch if (name, fmt) in part] for fmt in wanted}
        starts = chain(*(begun(part, members, factored, start) for begun in (_scalar_starts, _codebook_starts)))
        for grid, codes in descend_all(starts, factored.H, rounds):
            fmt, data, first = grid.format.name, codes.packed(grid), 0
            for name in members[fmt]:
                stop = first + len(part[name, fmt])
                kept = codes.rows(first, stop) if keep else None
                pieces.setdefault((name, fmt), []).append((data[first:stop], kept))
                first = stop
    return {key: _joined(parts) for key, parts in pieces.items()}


def _joined(parts: Sequence[tuple[Tensor, Codes | None]]) -> tuple[Tensor, Codes | None]:
    codes = [codes for _, codes in parts if codes is not None]
    return torch.cat([data for data, _ in parts]), Codes.joined(codes) if codes else None


@dataclass(frozen=True)
class Factored:
    """Holds a Hessian (columns, columns) with what compensation needs of it."""

    H: Tensor  # damped, float32
    U: Tensor  # float32, upper, U^T U = H^-1
    importance: Tensor  # (columns,), weights the fit of scales


Members = Mapping[str, Sequence[str]]  # format name -> names of the tensors that want it


Targets = Mapping[tuple[str, str], Tensor]  # (tensor, format) -> rows


def _stack(targets: Targets, members: Members) -> Tensor:
    """Return the rows of all ``members`` stacked in order and transposed, float32 (columns, N)."""
    return torch.cat([targets[name, fmt] for fmt, names in members.items() for name in names]).T


def _scalar_starts(
    targets: Targets, members: Members, factored: Factored, begin: Mapping[tuple[str, str], Codes] | None
) -> Iterator[Start]:
    """Yield each scalar format with the codes of its members' rows; all formats share one column loop."""
    members = {fmt: names for fmt, names in members.items() if fmt in GRIDS and names}
    if not members:
        return
    stack = _stack(targets, members)
    segments = list(_segments(targets, members))
    integers = None if begin else column_loop(pad_rows(stack), factored.U, factored.importance, segments)
    for segment, (fmt, names) in zip(segments, members.items(), strict=True):
        if begin:
            codes = Codes.joined([begin[name, fmt] for name in names])
        else:
            assert integers is not None
            codes = Codes(Scales.concatenate(segment.scales, 0), integers[:, segment.rows])
        yield Start(segment.grid, pad_rows(stack[:, segment.rows]), codes.padded())


def _codebook_starts(
    targets: Targets, members: Members, factored: Factored, begin: Mapping[tuple[str, str], Codes] | None
) -> Iterator[Start]:
    """Yield each codebook format with the codes of its members' rows; each has its own column loop."""
    for fmt, names in members.items():
        if fmt not in CODEBOOK_GRIDS or not names:
            continue
        grid = CODEBOOK_GRIDS[fmt]
        W = pad_rows(_stack(targets, {fmt: names}))
        if begin:
            codes = Codes.joined([begin[name, fmt] for name in names]).padded()
        else:
            codes = Codes(*codebook_loop(grid, W.clone(), factored.importance, factored.U))
        yield Start(grid, W, codes, VectorBlock)


def _segments(targets: Targets, members: Members) -> Iterator[Segment]:
    start = 0
    for fmt, names in members.items():
        stop = start + sum(len(targets[name, fmt]) for name in names)
        yield Segment(GRIDS[fmt], slice(start, stop))
        start = stop
