"""This module rounds activations to the 8-bit blocks in which llama.cpp computes quantized matrix products.

Weight types with blocks of 256 columns multiply Q8_K inputs, types with blocks of 32 columns Q8_0 or Q8_1
(``vec_dot_type`` of ``type_traits_cpu`` in ggml-cpu.c). Shapes: x (..., columns), where columns is a multiple of the
weights' block size.
"""

import torch
from torch import Tensor

from quantizers.formats.table import SUPER_BLOCK, QuantFormat

LARGEST = 127
BLOCK = 32


def input_type(fmt: QuantFormat) -> str:
    """Return the ggml type of inputs that weights of ``fmt`` multiply: Q8_K, Q8_0 (also for Q8_1), F16 or F32."""
    if fmt.is_float:
        return fmt.name
    return "Q8_K" if fmt.block_size == SUPER_BLOCK else "Q8_0"


def quantized_input(kind: str, x: Tensor) -> Tensor:
    """Return float32 x (..., columns) rounded to ``kind``, a result of ``input_type``, and decoded to float32."""
    match kind:
        case "Q8_K":
            return q8_k(x)
        case "Q8_0":
            return q8_0(x)
        case "F16":
            return x.half().float()
        case _:
            return x


def q8_k(x: Tensor) -> Tensor:
    """Return x (..., columns) rounded to Q8_K and decoded, float32.

    As ``quantize_row_q8_K_ref``: each 256 columns have a float32 scale, by which the value of largest magnitude
    becomes -127.
    """
    blocks = x.float().unflatten(-1, (-1, SUPER_BLOCK))
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(peak == 0, 0.0, -LARGEST / peak)
    return (blocks * inverse).round_().clamp_(max=LARGEST).mul_(torch.where(peak == 0, 0.0, 1 / inverse)).flatten(-2)


def q8_0(x: Tensor) -> Tensor:
    """Return x (..., columns) rounded to Q8_0 and decoded, float32.

    As ``quantize_row_q8_0_ref``: each 32 columns are rounded with the exact scale and decoded with the scale in fp16.
    Q8_1 has the same integers and scale, and a sum for the offsets of Q4_1 and Q5_1, which stays exact here.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / LARGEST
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (blocks * inverse).round_().mul_(scale.half().float()).flatten(-2)
