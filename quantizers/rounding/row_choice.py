"""This module judges rows by their error under a Hessian, and takes the better of two."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.formats.packed_tensor import PackedTensor, dequantize
from quantizers.formats.table import QuantFormat
from quantizers.rounding.nearest import row_ranges


@dataclass(frozen=True)
class Compensated:
    """Holds a packed tensor, its error tr(dW H dW^T), and that error relative to tr(W H W^T)."""

    packed: PackedTensor
    error: float
    relative: float


def better_rows(
    fmt: QuantFormat, W: Tensor, plain: Tensor, compensated: Tensor | None, H: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the plain or compensated bytes uint8 (rows, row_bytes), row by row whichever has the lower error.

    The errors under H (columns, columns) come with them, float64 (rows,). W (rows, columns) are the weights that were
    aimed at; compensated None takes the plain bytes.
    """
    H = H.float()
    found = [
        _better(fmt, W[rows], plain[rows], None if compensated is None else compensated[rows], H)
        for rows in row_ranges(W)
    ]
    data, errors = (torch.cat(parts) for parts in zip(*found, strict=True))
    return data, errors


def compensated(fmt: QuantFormat, W: Tensor, data: Tensor, error: float, power: float) -> Compensated:
    """Return the bytes ``data`` of W (rows, columns) with their error; ``power`` is W's ``row_power``."""
    return Compensated(PackedTensor(fmt, data, (W.shape[0], W.shape[1])), error, error / power if power else 0.0)


def bytes_errors(fmt: QuantFormat, W: Tensor, data: Tensor, H: Tensor) -> Tensor:
    """Return the ``row_errors`` float64 (rows,) of the bytes ``data`` of W (rows, columns)."""
    H = H.float()
    return torch.cat([row_errors(W[rows] - dequantize(fmt, data[rows]), H) for rows in row_ranges(W)])


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
