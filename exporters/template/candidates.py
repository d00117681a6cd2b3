"""Says which tensors of a model may stand behind a tensor of a template: by gguf's names first, then by block."""

import re
from collections import defaultdict
from collections.abc import Iterable

from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

GRAPHS = {name: graph for graph, name in MODEL_ARCH_NAMES.items()}  # by llama.cpp's architecture name
NUMBER = re.compile(r"\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.\d+\.")
WRAPPERS = re.compile(r"^(model\.)?language_model\.(model\.)?")  # of the text part of a multimodal model
# Tensors that llama.cpp's quantizer leaves in floats (tensor_allows_quantization in llama-quant.cpp).
KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp|altup|laurel|per_layer_model_proj|position_embd|token_types|ssm_conv1d|shortconv\.conv"
    r"|time_mix_(first|w0|w1|w2|v0|v1|v2|a0|a1|a2|g1|g2|decay_w1|decay_w2|lerp_fused)|attn_rel_b|ssm_(a|d|dt)\b"
)


def may_be_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether llama.cpp quantizes a tensor of this GGUF name and shape (..., rows, columns)."""
    return name.endswith(".weight") and len(shape) > 1 and shape[-2] > 1 and not KEPT.search(name)


def block_of(name: str) -> int | None:
    """Return the number of the block that a tensor belongs to, by either of its names; None for those of no block."""
    found = NUMBER.search(name)
    return int(found[1]) if found else None


def named(names: Iterable[str], architecture: str, blocks: int) -> dict[str, list[str]]:
    """Return the Hugging Face ``names`` by the GGUF name that gguf's table of the architecture gives them.

    Those that share one, such as experts that are stored one by one, are in the order of their numbers.
    """
    table, found = get_tensor_name_map(GRAPHS[architecture], blocks), defaultdict(list)
    for name in sorted(names, key=natural):
        plain = EXPERT.sub(".experts.", name)
        for variant in (plain, WRAPPERS.sub("model.", plain)):
            if gguf_name := table.get_name(variant, try_suffixes=(".weight", ".bias")):
                found[with_suffix(gguf_name, plain)].append(name)
                break
    return dict(found)


def with_suffix(gguf_name: str, name: str) -> str:
    """Return a GGUF name with the ending that a stacked parameter's own name, without one, leaves out."""
    return gguf_name if name.endswith((".weight", ".bias")) else f"{gguf_name}.weight"


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
