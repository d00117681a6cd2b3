"""This module runs one model over a text once, with one block of weights in memory at a time.

A search keeps weights, for many candidates; a proof needs each of them once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from evaluators.engine.batches import Batches
from evaluators.engine.memory import windows_at_once
from evaluators.engine.prefix_cache import PrefixCache
from evaluators.engine.sweep import Sweep
from evaluators.engine.weights import ModelWeights, PackedTensors
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.sizes import ModelShape, StageMemory


@contextmanager
def streamed(
    folder: ModelFolder, packed: PackedTensors, device: torch.device, windows: int, activations: str = "float"
) -> Iterator[Sweep]:
    """Yield a sweep in float32 that keeps no weight and no hidden state, ``windows`` windows of text at a time.

    ``packed`` holds the bytes of the candidate's quantized tensors; ``activations`` is as in Sweep.
    """
    weights = ModelWeights(BlockModel(folder, device), packed, capacity=0)
    sweep = Sweep(weights, Batches(windows), PrefixCache(0), activations)
    try:
        yield sweep
    finally:
        sweep.close()


def pass_memory(shape: ModelShape, window: int, positions: int, limit: int, device: torch.device) -> StageMemory:
    """Return what one pass over ``positions`` tokens takes: hidden states before and after a block, and that block.

    ``limit`` is the memory that decides how many windows of ``window`` tokens go through a block at once.
    """
    batch = windows_at_once(shape, window, positions, limit) * window
    there = {
        "block": shape.block_bytes(),
        "hidden states": 2 * positions * shape.state_bytes,
        "activations": batch * shape.activation_bytes(window),
    }
    return StageMemory.on(device, there, {"reading ahead": shape.block_bytes() * shape.stored // 4})
