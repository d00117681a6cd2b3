"""Chains of renamings and operations for mixtures of experts that transformers has configurations of, and no chain.

Shapes: E experts, I inner, D outer size. llama.cpp stacks gate (E, I, D), up (E, I, D) and down (E, D, I).
"""

from collections.abc import Callable

import torch
from transformers import PretrainedConfig
from transformers.core_model_loading import Interleave, Transpose, WeightConverter, WeightRenaming, WeightTransform
from transformers.integrations.gguf.gguf_conversion_mapping import (
    DENSE_DECODER_RENAMINGS,
    ConcatenateRows,
    PermuteRows,
)

NORMS = {r"^output_norm\.": "model.norm.", r"\.attn_norm\.": ".input_layernorm."}
GATE_UP = [r"\.ffn_gate_exps\.", r"\.ffn_up_exps\."]


def gpt_oss(config: PretrainedConfig) -> list[WeightTransform]:
    """Return the chain of gpt-oss: its experts are transposed, with rows of gate and up taking turns."""
    turns = [ConcatenateRows(dim=1), Interleave(dim=1, inverse=True)]
    return [
        *DENSE_DECODER_RENAMINGS,
        *_renamings({
            **NORMS,
            r"\.post_attention_norm\.": ".post_attention_layernorm.",
            r"\.attn_sinks\.weight": ".self_attn.sinks",
            r"\.ffn_gate_inp\.": ".mlp.router.",
            r"\.ffn_down_exps\.bias": ".mlp.experts.down_proj_bias",
        }),
        WeightConverter(r"\.ffn_down_exps\.weight", ".mlp.experts.down_proj", [Transpose(1, 2)]),
        WeightConverter([f"{name}bias" for name in GATE_UP], ".mlp.experts.gate_up_proj_bias", turns),
        WeightConverter([f"{name}weight" for name in GATE_UP], ".mlp.experts.gate_up_proj", [*turns, Transpose(1, 2)]),
    ]  # fmt: skip


def mixtral(config: PretrainedConfig) -> list[WeightTransform]:
    """Return the chain of Mixtral, which is a llama with experts in llama.cpp: rows of q and k are permuted."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    permuted = {
        r"\.self_attn\.q_proj\.weight": config.num_attention_heads,
        r"\.self_attn\.k_proj\.weight": config.num_key_value_heads,
    }
    return [
        *DENSE_DECODER_RENAMINGS,
        *_renamings({
            **NORMS,
            r"\.ffn_norm\.": ".post_attention_layernorm.",
            r"\.ffn_gate_inp\.": ".mlp.gate.",
            r"\.ffn_down_exps\.weight": ".mlp.experts.down_proj",
        }),
        *(
            WeightConverter(name, name.replace("\\", ""), [PermuteRows(half_split_rows(heads, head_dim))])
            for name, heads in permuted.items()
        ),
        WeightConverter([f"{name}weight" for name in GATE_UP], ".mlp.experts.gate_up_proj", [ConcatenateRows(dim=1)]),
    ]  # fmt: skip


def half_split_rows(heads: int, head_dim: int) -> torch.Tensor:
    """Return row indices, int64 (heads * head_dim,), from llama.cpp's interleaved rotary order to transformers'."""
    return torch.arange(heads * head_dim, device="cpu").reshape(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def _renamings(names: dict[str, str]) -> list[WeightTransform]:
    return [WeightRenaming(source, target) for source, target in names.items()]


CHAINS: dict[str, Callable[[PretrainedConfig], list[WeightTransform]]] = {"gpt_oss": gpt_oss, "mixtral": mixtral}
