"""This module times short probes of the kernels that a run spends its time in, on random numbers of the model's shapes.

No weights are read. Shapes: B windows, T positions of a window, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bitgenome.common.devices import all_cores, best_device, compute_type, device_name, release_memory
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.divergence import Reference
from evaluators.healing.distillation import DistillationLoss
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.head import Head
from evaluators.model.outline import text_config
from evaluators.prepare.writing import BATCH
from evaluators.probes.rates import Rates, Rounding
from evaluators.probes.rounding import decode_seconds, hessian_seconds, rounding_seconds
from evaluators.probes.timing import product_flops, seconds_of
from evaluators.settings import Activations, Compute
from quantizers.formats.table import format_for
from quantizers.settings import CompensationSettings

BLOCK_TOKENS = 1024  # positions of a probe of a block, at least one window
HEAD_TOKENS = 128
MOST_ROWS = 32768  # of the head, to which times of larger vocabularies are in proportion


@dataclass(frozen=True)
class MeasureRates:
    """Pool task that measures the rates of its worker; no other task runs at the same time."""

    model: Path
    window: int
    roundings: tuple[Rounding, ...]
    settings: CompensationSettings
    compute: Compute
    activations: Activations
    writes: bool = False  # whether the model writes text

    @property
    def label(self) -> str:
        return "measuring rates"

    def run(self, state: dict[Any, Any]) -> Rates:
        """Return the rates of this worker."""
        folder = ModelFolder(self.model)
        rates = measure_rates(folder, self.window, self.roundings, self.settings, self.compute, self.activations)
        return replace(rates, written=written_seconds(folder, best_device(), self.window)) if self.writes else rates


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
    head, head_gradient = head_seconds(folder, device)
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
    positions = windows * window

    def model_in(dtype: torch.dtype) -> BlockModel:
        model = BlockModel(folder, device, dtype)
        for name in model.parameters_of(0):
            model.place(name, model.as_computed(name, torch.full(folder.shapes[name], 0.01)))
        return model

    model = model_in(torch.float32)
    hidden = torch.randn(windows, window, model.state_width, device=device)
    with torch.inference_mode():
        plain = seconds_of(lambda: model.run_block(0, hidden), device) / positions
    back = backward_seconds(model, hidden) / positions if gradient else 0.0
    fast = plain
    if compute != torch.float32 or activations == "q8":
        model = model_in(compute)
        if activations == "q8":
            EightBitInputs(model, {name: format_for("W4", linear.in_features) for name, linear in model.linears(0)})
        with torch.inference_mode():
            fast = seconds_of(lambda: model.run_block(0, hidden), device) / positions
    return fast, plain, back


def written_seconds(folder: ModelFolder, device: torch.device, window: int) -> float:
    """Return the seconds of one decoder block for a position of each of BATCH windows, for one of them.

    The position stands in the middle of a window of ``window`` tokens.
    """
    dtype = compute_type("auto", device)
    model = BlockModel(folder, device, dtype)
    for name in model.parameters_of(0):
        model.place(name, model.as_computed(name, torch.full(folder.shapes[name], 0.01)))
    hidden = torch.randn(BATCH, 1, model.state_width, device=device)
    with torch.inference_mode():
        block = seconds_of(lambda: model.run_block(0, hidden), device)
    return (block + cache_seconds(folder, device, dtype, window // 2)) / BATCH


def cache_seconds(folder: ModelFolder, device: torch.device, dtype: torch.dtype, earlier: int) -> float:
    """Return the seconds in which a block adds a position to keys and values of ``earlier`` ones, and reads them all.

    For BATCH windows, as transformers does it: the cache is copied at every step. 0 where config.json does not have
    one number of heads for all blocks.
    """
    config = text_config(folder.path)
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None) or heads
    if not (isinstance(heads, int) and isinstance(shared, int) and shared > 0 and heads % shared == 0):
        return 0.0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    query = torch.randn(BATCH, heads, 1, width, device=device, dtype=dtype)
    stored = torch.randn(2, BATCH, shared, earlier, width, device=device, dtype=dtype)

    def work() -> None:
        keys, values = (torch.cat((part, part[..., :1, :]), dim=-2) for part in stored)
        scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    with torch.inference_mode():
        return seconds_of(work, device)


def backward_seconds(model: BlockModel, hidden: Tensor) -> float:
    """Return the seconds of the first block's forward and backward pass for ``hidden`` (B, T, D), once its own."""
    part = hidden[:1].clone().requires_grad_(True)

    def work() -> None:
        model.run_block(0, part).sum().backward()

    return seconds_of(work, hidden.device) * len(hidden)


def head_seconds(folder: ModelFolder, device: torch.device) -> tuple[float, float]:
    """Return the seconds a position of one candidate's logits and divergence, and of the gradient of its divergence."""
    vocabulary, width = folder.shapes[folder.head_tensor]
    rows = min(vocabulary, MOST_ROWS)
    head = Head(torch.full((rows, width), 0.01, device=device))
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
