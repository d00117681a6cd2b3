"""This module predicts what the gradients of all weights hold, from the model's sizes alone; sizes are in bytes."""

import torch

from evaluators.gradient.output_factors import FACTOR_TOKENS
from evaluators.gradient.sensitivity import PART_TOKENS
from evaluators.healing.memory import saved_bytes
from evaluators.healing.tuner import MICRO_TOKENS
from evaluators.model.sizes import DOUBLE_BYTES, FLOAT_BYTES, ModelShape, StageMemory, block_of, larger
from quantizers.rounding.row_order import factor_entries
from quantizers.statistics.row_groups import row_entries

DELTAS = 2  # of a tensor: decoded, and its difference from full precision


def gradient_memory(shape: ModelShape, tokens: int, window: int, device: torch.device) -> StageMemory:
    """Return what one pool task of gradient sensitivities takes, of ``tokens`` tokens of text in all.

    Embedding and head stay; of the blocks one is there, with inputs and scores of its matrices. The scores of the head
    are as wide as the vocabulary.
    """
    positions = min(max(window, tokens), max(1, PART_TOKENS // window) * window)
    micro = min(positions, max(1, MICRO_TOKENS // window) * window)
    ends = shape.head_bytes + (shape.bytes_of(shape.embedding) if shape.embedding != shape.head else 0)
    inner = [name for name in shape.tensors if name not in (shape.head, shape.embedding)]
    held = {"embedding and head": ends, "inputs of blocks": (shape.layers + 1) * positions * shape.state_bytes}
    block = {
        "block": shape.block_bytes() + DELTAS * max(shape.bytes_of(name) for name in inner),
        "inputs and scores": 2 * positions * (10 * shape.hidden + 3 * shape.inner) * FLOAT_BYTES,
        "activations": micro * (saved_bytes(shape, window, device) + shape.activation_bytes(window)),
    }
    head = {"scores of the head": 2 * positions * shape.vocabulary * FLOAT_BYTES, "head": DELTAS * shape.head_bytes}
    return larger(StageMemory.on(device, held | block, {}), StageMemory.on(device, held | head, {}))


def factor_memory(shape: ModelShape, tokens: int, window: int, device: torch.device) -> StageMemory:
    """Return what measuring the output factors takes: states of all its text, and two sums in float64 for one block.

    The text is FACTOR_TOKENS of the ``tokens`` of calibration.
    """
    found = gradient_memory(shape, min(tokens, FACTOR_TOKENS), window, device)
    states = max(window, min(tokens, FACTOR_TOKENS)) * shape.state_bytes
    entries = [
        factor_entries(size[0]) for name, size in shape.tensors.items() if len(size) == 2 and block_of(name) == 0
    ]
    sums = {"output factors": 2 * sum(entries) * DOUBLE_BYTES + max(entries, default=0) * 2 * DOUBLE_BYTES}
    outside = [row_entries(*size) for name, size in shape.tensors.items() if len(size) == 2 and block_of(name) is None]
    rows = sum(outside) * FLOAT_BYTES
    host = {"states and scores": 3 * states, "Hessians of rows, to be written": rows}
    more = StageMemory.on(device, sums | {"Hessians of rows": rows}, host)
    return StageMemory({**found.device, **more.device}, {**found.host, **more.host})
