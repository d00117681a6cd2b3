"""This module predicts what healing holds, whole and block by block, from the model's sizes alone.

Sizes are in bytes, in one worker beside what its process itself takes. D is the hidden size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitgenome.common.devices import best_device, worker_memory
from evaluators.engine.divergence import CACHE_BYTES, chunk_size
from evaluators.engine.evaluator import make_room
from evaluators.healing.tuner import MICRO_TOKENS
from evaluators.model.forward import BATCH_TOKENS
from evaluators.model.sizes import FLOAT_BYTES, ModelShape, StageMemory, larger
from evaluators.settings import HealingSettings
from quantizers.formats.table import SUPER_BLOCK

SCORES = 3  # matrices of scores per head that attention keeps for its gradient where it is not fused
GRADIENTS = 3  # of the largest tensor's size: of its uses as head and as embedding, and their sum
BLOCK_SCALES = 2  # at most
DRIVER_COPIES = 6  # of the multipliers of scales: values, gradients, two moments, and two on their way to workers
CHUNK_COPIES = 6  # of a chunk's logits that are alive at once in the loss


@dataclass(frozen=True)
class MeasureRoom:
    """Pool task that measures how much memory a worker may use, after it has freed what it held."""

    label = "room"

    def run(self, state: dict[Any, Any]) -> tuple[int, str]:
        """Return the bytes, and the type of device on which they are."""
        make_room(state)
        device = best_device()
        return worker_memory(device), device.type


def healing_memory(
    shape: ModelShape,
    variant: str,
    settings: HealingSettings,
    window: int,
    tokens: Mapping[str, int],
    device: torch.device,
) -> StageMemory:
    """Return the peak of healing by ``variant``, "full" or "blockwise", over windows of ``window`` tokens.

    ``tokens`` holds the number of tokens of "calibration" and of every split that is measured.
    """
    if variant == "full":
        return whole_memory(shape, settings, window, tokens, device)
    return blocks_memory(shape, settings, window, tokens, device)


def whole_memory(
    shape: ModelShape, settings: HealingSettings, window: int, tokens: Mapping[str, int], device: torch.device
) -> StageMemory:
    """Return what training with the whole model in memory takes: every matrix in full precision and as quantized."""
    names = shape.tensors
    weights = sum(shape.bytes_of(name) * (2 if len(names[name]) == 2 else 1) for name in names)
    micro = micro_tokens(settings, window)
    measured = max(count for split, count in tokens.items() if split != "calibration")
    training = {
        "weights": weights,
        "activations": micro
        * (shape.layers * saved_bytes(shape, window, device, settings.scales) + shape.activation_bytes(window)),
        "logits": chunk_bytes(shape, device),
        "gradients": gradient_bytes(shape, names, settings),
    }
    measuring = {
        "weights": weights,
        "activations": min(BATCH_TOKENS, measured) * shape.activation_bytes(window),
        "hidden states": 2 * measured * shape.state_bytes,
        "logits": chunk_bytes(shape, device) + reference_bytes(shape, measured),
    }
    host = {"block scales": DRIVER_COPIES * scale_bytes(shape, settings)}
    return larger(StageMemory.on(device, training, host), StageMemory.on(device, measuring, host))


def blocks_memory(
    shape: ModelShape, settings: HealingSettings, window: int, tokens: Mapping[str, int], device: torch.device
) -> StageMemory:
    """Return what training block by block takes: one block and a tensor of it, or two heads; and hidden states.

    The hidden states are those of the text that is trained on, twice, and of the text that is measured, three times.
    """
    used = min(tokens["calibration"], settings.steps * settings.batch_windows(window) * window)
    measured = [count for split, count in tokens.items() if split != "calibration"]
    states = (2 * used + 3 * sum(measured) + max(used, *measured)) * shape.state_bytes  # one more as a block moves on
    micro = micro_tokens(settings, window)
    inner_names = [name for name in shape.tensors if name not in (shape.head, shape.embedding)]
    largest = max(map(shape.bytes_of, inner_names))
    activations = max(
        micro * (saved_bytes(shape, window, device, settings.scales) + shape.activation_bytes(window)),
        min(BATCH_TOKENS, max(used, *measured)) * shape.activation_bytes(window),
    )
    own_head = [] if shape.head == shape.embedding else [shape.head]
    block = {
        "block": shape.block_bytes() * (2 if settings.scales else 1) + largest,
        "activations": activations,
        "gradients": gradient_bytes(shape, inner_names, settings),
    }
    heads = {
        "heads": 2 * shape.head_bytes + gradient_bytes(shape, own_head, settings),
        "logits": chunk_bytes(shape, device) + reference_bytes(shape, max(measured)),
        "hidden states of a split": 0 if device.type == "cpu" else 3 * max(measured) * shape.state_bytes,
    }
    host = {"hidden states": states, "block scales": scale_bytes(shape, settings)}
    return larger(StageMemory.on(device, block, host), StageMemory.on(device, heads, host))


def gradient_bytes(shape: ModelShape, tensors: Iterable[str], settings: HealingSettings) -> int:
    """Return the bytes of the gradients of weights that are there at once: those of the largest of ``tensors``."""
    return GRADIENTS * max(map(shape.bytes_of, tensors), default=0) if settings.scales else 0


def scale_bytes(shape: ModelShape, settings: HealingSettings) -> int:
    """Return the most bytes that the multipliers of all block scales take, whatever the formats."""
    if not settings.scales:
        return 0
    matrices = [size for size in shape.tensors.values() if len(size) == 2]
    blocks = sum(rows * columns // (32 if columns % SUPER_BLOCK else SUPER_BLOCK) for rows, columns in matrices)
    return BLOCK_SCALES * blocks * FLOAT_BYTES


def micro_tokens(settings: HealingSettings, window: int) -> int:
    """Return the tokens of one backward pass, in whole windows of ``window`` tokens."""
    return min(max(1, MICRO_TOKENS // window), settings.batch_windows(window)) * window


def saved_bytes(shape: ModelShape, window: int, device: torch.device, weights: bool = False) -> int:
    """Return the bytes per position that one block keeps for its backward pass.

    They are the MLP's three inner vectors and ten of size D (norms, rotated queries and keys, values, the output of
    attention); for the gradients of ``weights`` the inputs of linear layers as well, one inner and two more. Attention
    that is not fused, as healing uses it on accelerators, keeps its scores.
    """
    scores = SCORES * window * shape.heads if shape.eager or device.type != "cpu" else 0
    inputs = 2 * shape.hidden + shape.inner if weights else 0
    return (10 * shape.hidden + 3 * shape.inner + inputs + scores) * FLOAT_BYTES


def chunk_bytes(shape: ModelShape, device: torch.device) -> int:
    """Return the bytes of the logits that are alive at once while a loss or a divergence is computed."""
    return CHUNK_COPIES * chunk_size(shape.vocabulary, device) * FLOAT_BYTES


def reference_bytes(shape: ModelShape, positions: int) -> int:
    """Return the bytes of the reference's logits and probabilities, which are kept where they are few."""
    size = 2 * positions * shape.vocabulary * FLOAT_BYTES
    return size if size <= CACHE_BYTES else 0
