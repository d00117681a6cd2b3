"""This module divides rows into batches that go through a column loop together, and pads them to whole tiles."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

ROW_TILE = 32  # rows are padded to whole tiles: sums then run in one order, so no row's bytes depend on other rows
BATCH_ROWS = 1024  # of all tensors together, each in all its formats; they fit a CPU's cache
# Of the stack of a batch on an accelerator, where every column launches kernels, however many rows there are. The loop
# holds some three times as much: a layer of 8 billion weights' models is one or two batches.
STACK_BYTES = 2 << 30


def batch_rows(columns: int, formats: int, device: torch.device) -> int:
    """Return how many rows of ``columns`` weights go together, each in so many ``formats``."""
    if device.type == "cpu":
        return BATCH_ROWS
    return max(BATCH_ROWS, STACK_BYTES // (torch.float32.itemsize * columns * formats))


def even_batches(total: int, limit: int) -> int:
    """Return the rows of as few batches as ``limit`` allows, all alike: kernels are recorded for each size anew."""
    return -(-total // -(-total // limit) // ROW_TILE) * ROW_TILE


def recorded_rows(rows: int, device: torch.device) -> int:
    """Return to how many rows some ``rows`` are best padded: kernels are recorded for each number of rows anew."""
    return rows if device.type == "cpu" else max(ROW_TILE, 1 << (rows - 1).bit_length())


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


def pad_rows(columns_first: Tensor) -> Tensor:
    """Return the tensor (..., N) padded with zero rows to a multiple of ROW_TILE, contiguous."""
    return functional.pad(columns_first, (0, -columns_first.shape[-1] % ROW_TILE)).contiguous()
