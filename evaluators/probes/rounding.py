"""This module times Hessians, their factors, rounding and decoding, on random numbers.

No weights are read.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bitgenome.common.replay import CALLS_BEFORE, records
from evaluators.probes.rates import Rounding, RoundingRate
from evaluators.probes.timing import product_flops, seconds_of
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.pruned_sparsegpt import prune_and_compensate
from quantizers.rounding.row_batches import batch_rows
from quantizers.rounding.sparsegpt import compensate
from quantizers.settings import CompensationSettings
from quantizers.statistics.hessian import HessianAccumulator, inverse_factor

HESSIAN_TOKENS = 1024
MOST_COLUMNS = 256  # of a probe of rounding; times of wider ones follow from it
MOST_INPUTS = 4096  # columns of the input of a Hessian; wider ones take time by their square
DECODED_ROWS, DECODED_COLUMNS = 64, 4096
CPU_ROWS = 32, 384  # of two probes of rounding on a CPU
STEPPED_CPU_ROWS = 128, 512  # where rows go in steps
ACCELERATOR_ROWS = 1024, 16384  # where fewer rows hardly count beside the launches of a column
CPU_FACTOR = 512  # columns of the Hessian whose factor is timed; on an accelerator MOST_INPUTS
TRIES = 3  # of both probes, while a busy machine lets few rows seem to take longer than many
PRODUCTS = 20  # operations of rounding for a weight, a level and a column (from 256, 1,024 and 2,048 columns on a CPU)


def hessian_seconds(columns: int, device: torch.device) -> float:
    """Return the seconds a position of adding inputs with ``columns`` columns to their Hessian."""
    width = min(columns, MOST_INPUTS)
    x = torch.randn(HESSIAN_TOKENS, width, device=device)
    accumulator = HessianAccumulator(width, device)
    return seconds_of(lambda: accumulator.add(x), device) / HESSIAN_TOKENS * (columns / width) ** 2


def random_hessian(columns: int, device: torch.device) -> Tensor:
    """Return a Hessian (columns, columns) whose diagonal rules."""
    x = torch.randn(64, columns, device=device)
    return x.T @ x / 64 + torch.eye(columns, device=device)


def rounding_seconds(
    roundings: Sequence[Rounding], settings: CompensationSettings, device: torch.device
) -> tuple[dict[str, RoundingRate], float]:
    """Return the rates by kind of rounding, and the seconds of a factor by cubed columns.

    A column costs the same for every batch of rows, a weight in proportion to the rows. Both come from two batches of
    at most MOST_COLUMNS columns; every further column adds PRODUCTS operations to a weight at one level.
    """
    widest = min(max((r.columns for r in roundings), default=1), CPU_FACTOR if device.type == "cpu" else MOST_INPUTS)
    H = random_hessian(widest, device)
    factor = seconds_of(lambda: inverse_factor(H, settings.damping), device) / widest**3
    flops = product_flops(device)
    times: dict[Rounding, tuple[float, float]] = {}
    result: dict[str, RoundingRate] = {}
    for kind in roundings:
        narrow = replace(kind, columns=min(kind.columns, MOST_COLUMNS))
        if narrow not in times:
            times[narrow] = column_and_weight(narrow, random_hessian(narrow.columns, device), settings, device)
        column, weight = times[narrow]
        weight += PRODUCTS * len(kind.formats) * (kind.columns - narrow.columns) / flops
        result[kind.key] = RoundingRate(column, weight, batch_rows(kind.columns, len(kind.formats), device))
    return result, factor


def column_and_weight(
    kind: Rounding, H: Tensor, settings: CompensationSettings, device: torch.device
) -> tuple[float, float]:
    """Return the seconds for a column and for a weight, at all levels of ``kind``, of a batch of rows.

    Where rows go in steps, a column's are those of all steps. Where few rows take as long as many, all of it is theirs.
    """
    on_cpu = STEPPED_CPU_ROWS if kind.two_sided else CPU_ROWS
    few, many = on_cpu if device.type == "cpu" else ACCELERATOR_ROWS
    many = many * MOST_COLUMNS // kind.columns  # as many weights of narrow ones, or they are lost in the clock's noise
    formats: dict[str, Sequence[QuantFormat]] = {"probe": [FORMATS[name] for name in kind.formats]}

    def work(W: Tensor) -> None:
        if kind.sparsity:
            prune_and_compensate({"probe": W}, formats, {"probe": kind.sparsity}, H, settings)
        else:
            sides = {"probe": random_hessian(len(W), device)[None]} if kind.two_sided else None
            compensate({"probe": W}, formats, H, settings, outputs=sides)

    W = torch.randn(many, kind.columns, device=device)
    if records(device):
        for rows in (few, many) * CALLS_BEFORE:
            work(W[:rows])
    short = long = math.inf
    for _ in range(TRIES):
        short, long = (min(s, seconds_of(partial(work, W[:n]), device)) for s, n in ((short, few), (long, many)))
        if short < long:
            break
    weight = (long - short) / ((many - few) * kind.columns) if short < long else long / (many * kind.columns)
    return max(0.0, short / kind.columns - few * weight), weight


def decode_seconds(roundings: Sequence[Rounding], device: torch.device) -> float:
    """Return the mean seconds of decoding a weight, over the formats, from random bytes."""
    names = sorted({name for rounding in roundings for name in rounding.formats if not FORMATS[name].is_float})
    taken = []
    for name in names:
        fmt = FORMATS[name]
        packed = torch.randint(256, (DECODED_ROWS, fmt.row_bytes(DECODED_COLUMNS)), dtype=torch.uint8, device=device)
        taken.append(seconds_of(partial(dequantize, fmt, packed), device))
    return math.fsum(taken) / max(1, len(taken)) / (DECODED_ROWS * DECODED_COLUMNS)
