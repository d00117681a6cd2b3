"""The types that llama.cpp's own mixes give each tensor, to compare a search with.

Source: ``llama_tensor_get_type`` in src/llama-quant.cpp, for models without experts.
"""

from collections.abc import Mapping

from quantizers.formats.table import FORMATS, QuantFormat, format_for

MIXES = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K"}  # mix -> the type of tensors without a rule
WIDE_GQA = 4  # query heads per key head from which Q2_K gives attn_v more bits


def llamacpp_mix(mix: str, shapes: Mapping[str, tuple[int, ...]], layers: int, gqa: int) -> dict[str, QuantFormat]:
    """Format of each GGUF tensor name in ``shapes``, the (rows, columns) of the quantizable tensors.

    ``layers`` counts blocks, ``gqa`` query heads per key head. Where a row does not divide into the type's blocks,
    llama.cpp's fallback applies. Raises ValueError for a mix that is not in ``MIXES``.
    """
    if mix not in MIXES:
        raise ValueError(f"expected one of {', '.join(MIXES)}, found {mix!r}")
    output = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    formats = {}
    for name, shape in shapes.items():
        wanted = "Q6_K" if name == output else _type(mix, name, layers, gqa)
        formats[name] = format_for(FORMATS[wanted].level, shape[-1])
    return formats


def _type(mix: str, name: str, layers: int, gqa: int) -> str:
    if not name.startswith("blk."):
        return MIXES[mix]
    block, kind = int(name.split(".")[1]), name.split(".")[2]
    more_bits = "Q6_K" if _more_bits(block, layers) else "Q4_K"
    rules = {
        "Q2_K": {"attn_v": "Q4_K" if gqa >= WIDE_GQA else "Q3_K", "attn_output": "Q3_K", "ffn_down": "Q3_K"},
        "Q3_K_M": {
            "attn_v": "Q5_K" if block < 2 else "Q4_K",
            "attn_output": "Q4_K",
            "ffn_down": "Q5_K" if block < layers // 16 else "Q4_K",
        },
        "Q4_K_M": {"attn_v": more_bits, "ffn_down": more_bits},
    }
    return rules[mix].get(kind, MIXES[mix])


def _more_bits(block: int, layers: int) -> bool:
    """llama.cpp's ``use_more_bits``: the first and the last eighth of the blocks, and every third between."""
    eighth = layers // 8
    return block < eighth or block >= 7 * layers // 8 or (block - eighth) % 3 == 2
