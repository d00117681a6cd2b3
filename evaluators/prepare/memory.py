"""This module predicts what calibration and the bank hold, from the model's sizes alone.

Sizes are in bytes, in one worker beside what its process itself takes. Legend: C columns of an input, R rows of all
tensors that read it.
"""

from collections.abc import Collection, Mapping, Sequence
from math import prod

import torch

from bitgenome.common.devices import compute_type
from bitgenome.common.replay import MOST_BYTES, records
from evaluators.model.sizes import DOUBLE_BYTES, FLOAT_BYTES, ModelShape, StageMemory, block_of, larger
from evaluators.prepare.calibration import CHUNK_TOKENS
from evaluators.prepare.writing import BATCH
from quantizers.formats.table import SUPER_BLOCK, QuantFormat
from quantizers.rounding.nearest import ACCELERATOR_WEIGHTS, ROUNDED_WEIGHTS
from quantizers.rounding.row_batches import batch_rows
from quantizers.rounding.row_order import factor_entries
from quantizers.statistics.row_groups import row_entries

FIXED_BYTES = 40 << 20  # of matrix libraries, and what allocators keep between two blocks
MOMENT_BYTES = 16  # of a feature of a position: magnitude and square, and float64 copies where they are summed
PLAIN_COPIES = 8  # of the weights that are rounded at once: reordered, integers, decoded, errors times the Hessian
BATCH_COPIES = 5  # of a batch of rows in one format: weights, errors, integers, scales, and what descent computes
RECORDED_BYTES = 40  # of a weight of a super-block in one format: copies of what recorded kernels read and write
LOGIT_BYTES = 40  # of a logit where tokens are drawn: masked copies, their softmax, and its sums in float64
CACHE_COPIES = 2  # of all keys and values; measured: 308 MiB for the embedded model, of which libraries are some 50
KEYS_AND_VALUES = ("k_proj.weight", "v_proj.weight")
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # matrices of a block that read one tensor


def input_groups(shape: ModelShape) -> list[tuple[str, ...]]:
    """Return the names of the matrices that read one input, group by group: of all blocks, of head and embedding."""
    groups: dict[str, list[str]] = {}
    for name, size in shape.tensors.items():
        if len(size) != 2:
            continue
        *path, kind, _ = name.split(".")
        shared = next((kinds[0] for kinds in SAME_INPUT if kind in kinds), kind)
        groups.setdefault(".".join([*path, shared]), []).append(name)
    return [tuple(names) for names in groups.values()]


def calibration_memory(shape: ModelShape, tokens: int, window: int, device: torch.device) -> StageMemory:
    """Return what calibrating on ``tokens`` tokens takes: one block, the Hessians of its inputs, and hidden states.

    A Hessian is summed in float64 and stored in float32, beside the product of the chunk that is added to it.
    """
    positions = max(window, tokens // window * window)
    chunk = min(positions, max(1, CHUNK_TOKENS // window) * window)
    inputs = [shape.tensors[names[0]][1] for names in input_groups(shape) if block_of(names[0]) == 0]
    there = {
        "block": shape.block_bytes(),
        "Hessians": sum(C * C for C in inputs) * (DOUBLE_BYTES + FLOAT_BYTES)
        + max(inputs, default=0) ** 2 * FLOAT_BYTES,
        "activations": chunk * shape.activation_bytes(window),
        "moments": chunk * max(inputs, default=0) * MOMENT_BYTES,
        "allocators": FIXED_BYTES,
    }
    return StageMemory.on(device, there, {"hidden states": (positions + chunk) * shape.state_bytes})


def writing_memory(shape: ModelShape, window: int, device: torch.device) -> StageMemory:
    """Return what it takes that the model writes text: all of it, keys and values of a batch, and its logits.

    The cache of a block is copied for every token, and what is freed is too small for the next copy. Where a model has
    no projections of keys and values by name, they are taken as wide as its hidden states.
    """
    itemsize = compute_type("auto", device).itemsize
    found = sum(shape.tensors[name][0] for name in shape.tensors if name.endswith(KEYS_AND_VALUES))
    cache = BATCH * window * (found or 2 * shape.layers * shape.hidden) * itemsize
    there = {
        "weights": sum(map(shape.weights, shape.tensors)) * itemsize,
        "keys and values": CACHE_COPIES * cache,
        "logits": BATCH * shape.vocabulary * LOGIT_BYTES,
        "allocators": FIXED_BYTES,
    }
    loading = {} if device.type == "cpu" else {"weights, to be moved": there["weights"]}
    return StageMemory.on(device, there, loading)


def bank_memory(
    shape: ModelShape,
    formats: Mapping[str, Sequence[QuantFormat]],
    device: torch.device,
    *,
    compensation: bool = True,
    factored: Collection[str] = (),
) -> StageMemory:
    """Return what quantizing the largest input group takes; ``formats`` are by Hugging Face name.

    Tensors of ``factored`` are rounded by the loss: on both sides, or under Hessians of their rows outside blocks.
    """
    groups = [names for names in input_groups(shape) if any(name in formats for name in names)]
    found = StageMemory()
    alike: dict[tuple[int, int], int] = {}  # recorded once for each number of rows and formats
    for names in groups:
        searched = [name for name in names if name in formats]
        found = larger(found, group_memory(shape, searched, formats, device, compensation, factored))
        rows, levels = batch_of(shape, searched, formats, device)
        alike[rows, levels] = rows * levels * SUPER_BLOCK * RECORDED_BYTES
    if records(device):
        return StageMemory({**found.device, "recorded kernels": min(MOST_BYTES, sum(alike.values()))}, found.host)
    return found


def batch_of(
    shape: ModelShape, names: Sequence[str], formats: Mapping[str, Sequence[QuantFormat]], device: torch.device
) -> tuple[int, int]:
    """Return the rows of a batch of the tensors ``names``, and the formats of each."""
    levels = max(len(formats[name]) for name in names)
    rows = sum(shape.tensors[name][0] for name in names)
    return min(rows, batch_rows(shape.tensors[names[0]][1], levels, device)), levels


def group_memory(
    shape: ModelShape,
    names: Sequence[str],
    formats: Mapping[str, Sequence[QuantFormat]],
    device: torch.device,
    compensation: bool,
    factored: Collection[str],
) -> StageMemory:
    """Return what quantizing the tensors ``names``, which read one input, takes.

    Besides their weights, packed bytes and Hessian these are its float64 factor; then that in float32, with a batch of
    rows in all formats or, rounded plainly, of one tensor. Without compensation there is only the last.
    """
    C = shape.tensors[names[0]][1]
    rows, levels = batch_of(shape, names, formats, device)
    packed = sum(fmt.tensor_bytes(shape.tensors[name]) for name in names for fmt in formats[name])
    batch = rows * levels * C * FLOAT_BYTES * BATCH_COPIES
    at_once = ROUNDED_WEIGHTS if device.type == "cpu" else ACCELERATOR_WEIGHTS
    plain = min(at_once, max(shape.weights(name) for name in names)) * FLOAT_BYTES * PLAIN_COPIES
    compensated = max(C * C * (DOUBLE_BYTES + FLOAT_BYTES), C * C * 2 * FLOAT_BYTES + max(batch, plain))
    sides = [name for name in names if name in factored and block_of(name) is not None]
    by_rows = [shape.tensors[name] for name in names if name in factored and block_of(name) is None]
    both = {
        "targets of rows": sum(shape.weights(name) * len(formats[name]) for name in sides) * FLOAT_BYTES,
        "output factors": sum(factor_entries(shape.tensors[name][0]) for name in sides) * 2 * FLOAT_BYTES,
    }
    there = (both if sides else {}) | {
        "weights": sum(shape.weights(name) for name in names) * FLOAT_BYTES,
        "Hessian": C * C * FLOAT_BYTES,
        "packed": packed,
        "factor and rows": compensated if compensation else plain,
    }
    host = {"packed, to be written": packed}
    if by_rows:
        host["Hessians of rows"] = sum(row_entries(*size) for size in by_rows) * 2 * FLOAT_BYTES
        there["rows of a group"] = 2 * min(at_once, max(map(prod, by_rows))) * FLOAT_BYTES
    if device.type != "cpu":
        host["Hessian as read"] = C * C * FLOAT_BYTES
    return StageMemory.on(device, there, host)
