"""This module quantizes onto GGUF's grids with SparseGPT/GPTQ compensation (Frantar & Alistarh 2022, 2023).

Columns are rounded in order, and each column's error is spread over the columns after it so that the output changes
least. At the start of each scale block, its scales are fitted to the compensated weights and frozen. Rows are
independent, so all tensors that read the same input, in all their formats, are stacked as rows under one factorization
of H. All scalar formats share one column loop.

Legend: H (columns, columns), U upper with U^T U = H_damped^-1, W transposed (columns, R) with R rows of all tensors
and formats.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from quantizers.formats.codebook_packing import pack_codebook
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.grids import GRIDS
from quantizers.formats.packed_tensor import PackedTensor, dequantize
from quantizers.formats.table import QuantFormat
from quantizers.rounding.codebook_loop import VectorBlock, codebook_loop
from quantizers.rounding.column_loop import Segment, column_loop
from quantizers.rounding.coordinate_descent import descend
from quantizers.rounding.nearest import ROW_TILE, check_weights, normalized_importance, pad_rows, quantize, row_ranges
from quantizers.settings import CompensationSettings
from quantizers.statistics.hessian import check_hessian, damped, inverse_factor

DEFAULTS = CompensationSettings()
BATCH_ROWS = 1024  # of all tensors together, each in all its formats; they fit a CPU's cache
# Of the stack of a batch on an accelerator, where every column launches kernels, however many rows there are. The loop
# holds some three times as much: a layer of 8 billion weights' models is one or two batches.
STACK_BYTES = 2 << 30


@dataclass(frozen=True)
class Compensated:
    """Holds a packed tensor, its error tr(dW H dW^T), and that error relative to tr(W H W^T)."""

    packed: PackedTensor
    error: float
    relative: float


def compensate(
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Sequence[QuantFormat]],
    H: Tensor,
    settings: CompensationSettings = DEFAULTS,
    importance: Tensor | None = None,
    plain: Tensor | None = None,
) -> dict[str, dict[str, Compensated]]:
    """Quantize each tensor to its formats with compensation; return bytes and errors by tensor name and format name.

    ``weights`` are float (rows, columns) and read the same input, whose Hessian is H (columns, columns); ``formats``
    lists the formats wanted of each. ``importance`` (columns,) weights the fit of scales in the column loop, by default
    ``conditional_importance``. Each row is the better, by its tr(dW H dW^T), of the compensated row and plain rounding
    with importance ``plain`` (columns,), by default diag(H), so none is worse than ``quantize``. Columns with H_jj = 0
    are rounded plainly; float formats are only converted.

    Raises ValueError for shapes that do not fit, non-finite values and a Hessian that is not positive semidefinite.
    """
    columns = len(H)
    check_hessian(H, columns)
    for name, W in weights.items():
        for fmt in formats[name]:
            check_weights(fmt, W, columns)
    plain = H.diagonal() if plain is None else plain
    compensated = (
        compensate_stack(weights, formats, H, settings.damping, settings.refinement_rounds, importance)
        if settings.compensation
        else {}
    )
    found: dict[str, dict[str, Compensated]] = {}
    for name, W in weights.items():
        W, levels = W.float(), {}  # noqa: PLW2901
        power = row_power(W, H)
        for fmt in formats[name]:
            data = compensated.get((name, fmt.name))
            levels[fmt.name] = better_rows(fmt, W, quantize(fmt, W, plain), data, H, power)
        found[name] = levels
    return found


def conditional_importance(U: Tensor, H: Tensor) -> Tensor:
    """Return 1 / U_jj^2, float32 (columns,) of mean 1: the cost of an error in column j, compensated by later columns.

    For fitting scales it lowers tr(dW H dW^T) by about 1 % compared with diag(H) (measured on a trained model, all
    formats). U and H are (columns, columns); dead columns (H_jj = 0) count only the minimum of
    ``normalized_importance``.
    """
    cost = U.diagonal().square().reciprocal()
    return normalized_importance(torch.where(H.diagonal() == 0, 0.0, cost), len(H), H.device)


def compensate_stack(
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Sequence[QuantFormat]],
    H: Tensor,
    damping: float,
    rounds: int,
    importance: Tensor | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Return compensated bytes uint8 (rows, row_bytes) by (tensor, format), for all block formats.

    Arguments are as for ``compensate``; ``damping`` is relative to the mean diagonal of H, ``rounds`` are of coordinate
    descent. Raises ValueError for an H that is not positive semidefinite and for an importance that does not fit.
    """
    wanted = sorted({f.name for choices in formats.values() for f in choices if not f.is_float})
    if not wanted:
        return {}
    U, taken = inverse_factor(H, damping)
    if importance is None:
        importance = conditional_importance(U, H)
    else:
        importance = normalized_importance(importance, len(H), H.device)
    U = U.float()  # before the next matrix is made: in a wide layer each takes gigabytes
    factored = Factored(damped(H, taken, torch.empty_like(H, dtype=torch.float32)), U, importance)
    pieces: dict[tuple[str, str], list[Tensor]] = {}
    limit = batch_rows(len(H), len(wanted), H.device)
    if H.device.type != "cpu":
        limit = even_batches(sum(map(len, weights.values())), limit)
    for batch in row_batches({name: len(W) for name, W in weights.items()}, limit):
        part = {name: weights[name][rows] for name, rows in batch.items()}
        members = {fmt: [name for name in part if fmt in {f.name for f in formats[name]}] for fmt in wanted}
        for fmt, data in chain(
            _scalar_formats(part, members, factored, rounds), _codebook_formats(part, members, factored, rounds)
        ):
            rows = [len(part[name]) for name in members[fmt]]
            for name, piece in zip(members[fmt], data.split(rows), strict=True):
                pieces.setdefault((name, fmt), []).append(piece)
    return {key: torch.cat(parts) for key, parts in pieces.items()}


@dataclass(frozen=True)
class Factored:
    """Holds a Hessian (columns, columns) with what compensation needs of it."""

    H: Tensor  # damped, float32
    U: Tensor  # float32, upper, U^T U = H^-1
    importance: Tensor  # (columns,), weights the fit of scales


def batch_rows(columns: int, formats: int, device: torch.device) -> int:
    """Return how many rows of ``columns`` weights go together, each in so many ``formats``."""
    if device.type == "cpu":
        return BATCH_ROWS
    return max(BATCH_ROWS, STACK_BYTES // (torch.float32.itemsize * columns * formats))


def even_batches(total: int, limit: int) -> int:
    """Return the rows of as few batches as ``limit`` allows, all alike: kernels are recorded for each size anew."""
    return -(-total // -(-total // limit) // ROW_TILE) * ROW_TILE


def row_batches(rows: Mapping[str, int], limit: int) -> Iterator[dict[str, slice]]:
    """Yield batches of at most ``limit`` rows: slices of rows by tensor name, given the tensors' numbers of rows.

    Batches stay in cache, and memory beyond weights and Hessian does not grow with the tensors. Rows are independent,
    so the bytes do not depend on the batches.
    """
    batch: dict[str, slice] = {}
    room = limit
    for name, total in rows.items():
        start = 0
        while start < total:
            stop = min(total, start + room)
            batch[name] = slice(start, stop)
            room -= stop - start
            start = stop
            if room == 0:
                yield batch
                batch, room = {}, limit
    if batch:
        yield batch


Members = Mapping[str, Sequence[str]]  # format name -> names of the tensors that want it


def _stack(weights: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Return the rows of the named tensors stacked in order and transposed, float32 (columns, N)."""
    return torch.cat([weights[name].float() for name in names]).T


def _scalar_formats(
    weights: Mapping[str, Tensor], members: Members, factored: Factored, rounds: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield each scalar format with the bytes of its members' rows; all formats share one column loop."""
    members = {fmt: names for fmt, names in members.items() if fmt in GRIDS and names}
    if not members:
        return
    stack = _stack(weights, chain.from_iterable(members.values()))
    segments = list(_segments(weights, members))
    integers = column_loop(pad_rows(stack), factored.U, factored.importance, segments)
    for segment, fmt in zip(segments, members, strict=True):
        yield fmt, segment.finish(stack[:, segment.rows], integers[:, segment.rows], factored.H, rounds)


def _codebook_formats(
    weights: Mapping[str, Tensor], members: Members, factored: Factored, rounds: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield each codebook format with the bytes of its members' rows; each format has its own column loop."""
    for fmt, names in members.items():
        if fmt not in CODEBOOK_GRIDS or not names:
            continue
        grid = CODEBOOK_GRIDS[fmt]
        W = pad_rows(_stack(weights, names))
        start = codebook_loop(grid, W.clone(), factored.importance, factored.U)
        rows = sum(len(weights[name]) for name in names)
        yield fmt, pack_codebook(grid, *descend(grid, W, factored.H, start, rounds, block_type=VectorBlock))[:rows]


def _segments(weights: Mapping[str, Tensor], members: Members) -> Iterator[Segment]:
    start = 0
    for fmt, names in members.items():
        stop = start + sum(len(weights[name]) for name in names)
        yield Segment(GRIDS[fmt], slice(start, stop))
        start = stop


def better_rows(
    fmt: QuantFormat, W: Tensor, plain: Tensor, compensated: Tensor | None, H: Tensor, power: float
) -> Compensated:
    """Return, row by row, the plain or compensated bytes uint8 (rows, row_bytes), whichever has the lower error.

    W (rows, columns) are the original weights and ``power`` their ``row_power``, H is (columns, columns); compensated
    None takes the plain bytes.
    """
    H = H.float()
    found = [
        _better(fmt, W[rows], plain[rows], None if compensated is None else compensated[rows], H)
        for rows in row_ranges(W)
    ]
    data, errors = (torch.cat(parts) for parts in zip(*found, strict=True))
    error = float(errors.sum())
    return Compensated(PackedTensor(fmt, data, (W.shape[0], W.shape[1])), error, error / power if power else 0.0)


def row_power(W: Tensor, H: Tensor) -> float:
    """Return the error of zeroing W (rows, columns), tr(W H W^T)."""
    return float(torch.cat([row_errors(W[rows], H) for rows in row_ranges(W)]).sum())


def _better(fmt: QuantFormat, W: Tensor, plain: Tensor, compensated: Tensor | None, H: Tensor) -> tuple[Tensor, Tensor]:
    """Return the better bytes uint8 (rows, row_bytes) and their errors, float64 (rows,)."""
    data = plain
    errors = row_errors(W - dequantize(fmt, data), H)
    if compensated is not None:
        compensated_errors = row_errors(W - dequantize(fmt, compensated), H)
        better = compensated_errors < errors
        data = torch.where(better[:, None], compensated, data)
        errors = torch.where(better, compensated_errors, errors)
    return data, errors


def row_errors(dW: Tensor, H: Tensor) -> Tensor:
    """Return diag(dW H dW^T), float64 (rows,), for dW (rows, columns) and H (columns, columns)."""
    return ((dW @ H.float()) * dW).sum(1, dtype=torch.float64)
