"""This module times short probes of the kernels that a run spends its time in, on random numbers of the model's shapes.

No weights are read. Shapes: B windows, T positions of a window, D hidden size, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.devices import best_device, compute_type, device_name, release_memory
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.divergence import Reference
from evaluators.healing.distillation import DistillationLoss
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.head import Head
from evaluators.settings import Activations, Compute
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.nearest import quantize
from quantizers.rounding.pruned_sparsegpt import prune_and_compensate
from quantizers.rounding.sparsegpt import batch_rows, compensate
from quantizers.settings import CompensationSettings, Sparsity
from quantizers.statistics.hessian import HessianAccumulator, inverse_factor

PROBE_SECONDS = 0.05  # a probe is repeated until it has taken that long
BLOCK_TOKENS = 1024  # positions of a probe of a block, at least one window
HEAD_TOKENS = 128
MOST_ROWS = 32768  # of the head, to which times of larger vocabularies are in proportion
MOST_COLUMNS = 512  # of a probe of rounding; times of wider ones follow from it
MOST_INPUTS = 4096  # columns of the input of a Hessian; wider ones take time by their square
CPU_ROWS = 32, 128  # of two probes of rounding on a CPU
ACCELERATOR_ROWS = 1024, 16384  # where fewer rows hardly count beside the launches of a column
CPU_FACTOR = 512  # columns of the Hessian whose factor is timed; on an accelerator MOST_INPUTS
PRODUCTS = 6  # operations of rounding for a weight, a level and a column (2 cores, 512 and 1,024 columns: 5.7)
PRODUCT_SIDE = 1024  # rows and columns of the product that stands for others


@dataclass(frozen=True)
class Rounding:
    """Names one kind of input group: its columns, the candidate formats of its tensors, and how they are pruned."""

    columns: int
    formats: tuple[str, ...]
    sparsity: Sparsity | None = None

    @property
    def key(self) -> str:
        """The kind as text."""
        pruned = f" {self.sparsity}" if self.sparsity else ""
        return f"{self.columns} {'+'.join(self.formats)}{pruned}"


class RoundingRate(NamedTuple):
    """Seconds for a column of a batch of ``rows`` rows, and for a weight, both at all levels."""

    column: float
    weight: float
    rows: int


@dataclass(frozen=True)
class Rates:
    """Holds the seconds that one unit of each kind of work takes on one worker.

    Positions are those of text: a block's times are of one decoder block, forward or forward and backward, the head's
    of one candidate's logits and divergence. ``hessian`` is by columns of the input, in seconds a position.
    ``rounding`` is by ``Rounding.key``; ``factor`` is in seconds for the cube of the columns, ``decode`` for a weight
    at one level. ``block_calibration`` and ``hessian`` are with all cores.
    """

    device: str
    threads: int
    block: float  # in the compute type of the search
    block_float32: float
    block_gradient: float  # float32
    head: float
    head_gradient: float
    block_calibration: float
    hessian: dict[str, float]
    factor: float
    rounding: dict[str, RoundingRate]
    decode: float
    host_flops: float  # operations per second of the host, all cores, float32

    def to_json(self) -> dict[str, Any]:
        """Return the rates as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Rates":
        """Return the rates whose ``to_json`` is ``record``. Raises TypeError for other keys."""
        return cls(**{**record, "rounding": {kind: RoundingRate(*rate) for kind, rate in record["rounding"].items()}})


@dataclass(frozen=True)
class MeasureRates:
    """Pool task that measures the rates of its worker; no other task runs at the same time."""

    model: Path
    window: int
    roundings: tuple[Rounding, ...]
    settings: CompensationSettings
    compute: Compute
    activations: Activations

    @property
    def label(self) -> str:
        return "measuring rates"

    def run(self, state: dict[Any, Any]) -> Rates:
        """Return the rates of this worker."""
        return measure_rates(
            ModelFolder(self.model), self.window, self.roundings, self.settings, self.compute, self.activations
        )


def measure_rates(
    folder: ModelFolder,
    window: int,
    roundings: Sequence[Rounding],
    settings: CompensationSettings,
    compute: Compute = "auto",
    activations: Activations = "float",
) -> Rates:
    """Return the rates of this process on the best device, for windows of ``window`` tokens.

    Raises ModelFolderError for a folder that cannot be run block by block.
    """
    device, threads = best_device(), torch.get_num_threads()
    block, block_float32, gradient = block_seconds(folder, window, device, compute_type(compute, device), activations)
    head, head_gradient = head_seconds(folder, window, device)
    columns = sorted({rounding.columns for rounding in roundings})
    rounding, factor = rounding_seconds(roundings, settings, device)
    decode = decode_seconds(roundings, device)
    with all_cores():
        block_calibration = block_seconds(folder, window, device, torch.float32, "float", gradient=False)[1]
        hessian = {str(width): hessian_seconds(width, device) for width in columns}
        host = product_flops(torch.device("cpu"))
    release_memory()
    return Rates(
        device=device_name(device),
        threads=threads,
        block=block,
        block_float32=block_float32,
        block_gradient=gradient,
        head=head,
        head_gradient=head_gradient,
        block_calibration=block_calibration,
        hessian=hessian,
        factor=factor,
        rounding=rounding,
        decode=decode,
        host_flops=host,
    )


@contextmanager
def all_cores() -> Iterator[None]:
    """Let PyTorch use all cores of this process's share inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cpus())
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Return the least seconds of one call of ``work``, a first one left out unless it is a long one."""
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < PROBE_SECONDS and len(taken) < 50):
        taken.append(timed(work, device))
        if taken[0] > 20 * PROBE_SECONDS:  # warming up hardly counts
            break
    return min(taken[1:] or taken)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call of ``work``, until the device's queue is empty."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def block_seconds(
    folder: ModelFolder,
    window: int,
    device: torch.device,
    compute: torch.dtype,
    activations: Activations,
    gradient: bool = True,
) -> tuple[float, float, float]:
    """Return the seconds a position of one decoder block: forward in ``compute``, in float32, forward and backward.

    Times that are not wanted are 0.
    """
    windows = max(1, BLOCK_TOKENS // window)
    hidden = torch.randn(windows, window, int(folder.config["hidden_size"]), device=device)
    positions = windows * window

    def model_in(dtype: torch.dtype) -> BlockModel:
        model = BlockModel(folder, device, dtype)
        for name in model.parameters_of(0):
            model.place(name, model.as_computed(name, torch.full(folder.shapes[name], 0.01)))
        return model

    model = model_in(torch.float32)
    with torch.inference_mode():
        plain = seconds_of(lambda: model.run_block(0, hidden), device) / positions
    back = backward_seconds(model, hidden) / positions if gradient else 0.0
    fast = plain
    if compute != torch.float32 or activations == "q8":
        model = model_in(compute)
        if activations == "q8":
            EightBitInputs(model, {name: FORMATS["Q4_K"] for name, _ in model.linears(0)})
        with torch.inference_mode():
            fast = seconds_of(lambda: model.run_block(0, hidden), device) / positions
    return fast, plain, back


def backward_seconds(model: BlockModel, hidden: Tensor) -> float:
    """Return the seconds of the first block's forward and backward pass for ``hidden`` (B, T, D), once its own."""
    part = hidden[:1].clone().requires_grad_(True)

    def work() -> None:
        model.run_block(0, part).sum().backward()

    return seconds_of(work, hidden.device) * len(hidden)


def head_seconds(folder: ModelFolder, window: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds a position of one candidate's logits and divergence, and of the gradient of its divergence."""
    vocabulary, width = folder.shapes[folder.head_tensor]
    rows = min(vocabulary, MOST_ROWS)
    head = Head(torch.full((rows, width), 0.01, device=device), None)
    hidden = torch.randn(1, HEAD_TOKENS, width, device=device)
    ids = torch.zeros(1, HEAD_TOKENS, dtype=torch.long, device=device)
    reference = Reference(hidden, head, ids)
    candidate = hidden * 1.01
    forward = seconds_of(lambda: reference.errors([candidate], head), device)
    inputs = candidate.clone().requires_grad_(True)

    def work() -> None:
        DistillationLoss()(inputs, head, hidden, head, ids).backward()

    scale = vocabulary / rows / HEAD_TOKENS
    return forward * scale, seconds_of(work, device) * scale


def hessian_seconds(columns: int, device: torch.device) -> float:
    """Return the seconds a position of adding inputs with ``columns`` columns to their Hessian."""
    width = min(columns, MOST_INPUTS)
    x = torch.randn(BLOCK_TOKENS, width, device=device)
    accumulator = HessianAccumulator(width, device)
    return seconds_of(lambda: accumulator.add(x), device) / BLOCK_TOKENS * (columns / width) ** 2


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
    """Return the seconds for a column and for a weight, at all levels of ``kind``, of a batch of rows."""
    few, many = CPU_ROWS if device.type == "cpu" else ACCELERATOR_ROWS
    formats: dict[str, Sequence[QuantFormat]] = {"probe": [FORMATS[name] for name in kind.formats]}

    def work(W: Tensor) -> None:
        if kind.sparsity:
            prune_and_compensate({"probe": W}, formats, {"probe": kind.sparsity}, H, settings)
        else:
            compensate({"probe": W}, formats, H, settings)

    W = torch.randn(many, kind.columns, device=device)
    work(W[:few])  # a first time, in which code and tables are loaded
    short, long = (timed(lambda rows=rows: work(W[:rows]), device) for rows in (few, many))  # type: ignore[misc]
    weight = max(0.0, long - short) / ((many - few) * kind.columns)
    return max(0.0, short / kind.columns - few * weight), weight


def decode_seconds(roundings: Sequence[Rounding], device: torch.device) -> float:
    """Return the mean seconds of decoding a weight, over the formats."""
    names = sorted({name for rounding in roundings for name in rounding.formats if not FORMATS[name].is_float})
    if not names:
        return 0.0
    W = torch.randn(64, 4096, device=device)
    packed = {name: quantize(FORMATS[name], W) for name in names}
    taken = [seconds_of(lambda n=name: dequantize(FORMATS[n], packed[n]), device) for name in names]  # type: ignore[misc]
    return math.fsum(taken) / len(taken) / W.numel()


def product_flops(device: torch.device) -> float:
    """Return the operations per second of a float32 product on ``device``."""
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device)
    return 2 * PRODUCT_SIDE**3 / seconds_of(lambda: a @ a, device)
