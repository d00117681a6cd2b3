"""The settings of a model that transformers' tables of GGUF files leave out, and the keys that are not read at all."""

from collections.abc import Iterator, Mapping
from typing import Any

from exporters.opening.rotary import READ, rope_parameters
from exporters.opening.source import GgufModel

WINDOW, WINDOWED = "attention.sliding_window", "attention.sliding_window_pattern"  # the latter of each block
LOCAL_THETA = "rope.freq_base_swa"  # of blocks with a window
ADDED = {  # llama.cpp's key -> attributes, of which a configuration has one or none
    "attention.key_length": ("global_head_dim",),
    "attention.layer_norm_epsilon": ("norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
VOCABULARIES = {"vocab_size": "token_embd.weight", "vocab_size_per_layer_input": "per_layer_token_embd.weight"}
BIASES = {  # attributes that add biases -> a tensor of the file that shows them
    "attention_bias": "blk.0.attn_q.bias",
    "mlp_bias": "blk.0.ffn_up.bias",
    "use_qkv_bias": "blk.0.attn_q.bias",
    "use_bias": "blk.0.ffn_up.bias",
}
REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")  # as llama.cpp has it
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # blocks of models whose scores are divided by sqrt(hidden / heads)
SETTLED = (  # by other keys and by tensors, and where they would not fit them, by a refusal
    "vocab_size", "attention.key_length", "attention.key_length_swa", "attention.value_length",
    "attention.value_length_swa", "rope.dimension_count_swa", "rope.scaling.finetuned", "attention.causal",
    "use_parallel_residual",
)  # fmt: skip
META_LAYOUT = "Meta AI original pth"  # of the rows of q and k, which are brought back


def added_settings(model: GgufModel, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that transformers' table leaves out; ``usual`` are the defaults of the configuration.

    Raises KeyError for a key that a file must have, and ValueError for values that transformers has no form for.
    """
    keys = model.hyperparameters()
    if missing := [key for key in REQUIRED if key not in keys]:
        raise KeyError(f"{model.architecture}.{missing[0]}")
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in model.tensors}
    for name, tensor in VOCABULARIES.items():
        if tensor in model.tensors:
            found[name] = model.tensors[tensor].shape[0]
    for key, attributes in ADDED.items():
        found |= {name: keys[key] for name in attributes if key in keys}
    found |= {name: tensor in model.tensors for name, tensor in BIASES.items()}
    found["sliding_window"] = keys.get(WINDOW) or None
    if isinstance(pattern := keys.get(WINDOWED), list):
        found["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    found |= head_settings(model, usual)
    return {name: value for name, value in found.items() if name in usual or name == "tie_word_embeddings"}


def head_settings(model: GgufModel, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of attention heads, rotary embeddings included.

    Raises ValueError for heads that transformers has no form for.
    """
    keys, parameters = model.hyperparameters(), usual.get("rope_parameters")
    heads, by_width = keys["attention.head_count"], keys["embedding_length"] // keys["attention.head_count"]
    head_dim = keys.get("attention.key_length") or by_width
    local_dim = keys.get("attention.key_length_swa", head_dim)
    for key, expected in (
        ("attention.value_length", head_dim),
        ("attention.value_length_swa", local_dim),
        ("rope.dimension_count_swa", local_dim),
    ):
        if keys.get(key, expected) != expected:
            raise ValueError(f"{model.architecture}.{key} = {keys[key]} where keys are of {expected}")
    if "head_dim" not in usual and head_dim * heads != keys["embedding_length"]:
        raise ValueError(f"heads of {head_dim} weights, which {model.architecture} models of transformers have not")
    scaled = by_width if SCALED_BY_WIDTH.get(model.architecture) == keys["block_count"] else head_dim
    kind = (parameters or {}).get("full_attention", parameters or {}).get("rope_type", "default")
    rope = rope_parameters(model, head_dim, kind)
    return {
        "head_dim": local_dim,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "query_pre_attn_scalar": scaled,
        "rope_parameters": _by_attention(rope, keys.get(LOCAL_THETA), parameters) if parameters else dict(rope),
    }


def unread(keys: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that no setting above comes from, and that say something."""
    for key, value in keys.items():
        known = key in READ or key in SETTLED or any(name in usual for name in ADDED.get(key, ()))
        known = known or (key == "expert_feed_forward_length" and value == keys.get("feed_forward_length"))
        known = known or (key == WINDOW and "sliding_window" in usual)
        known = known or (key == WINDOWED and isinstance(value, list) and "layer_types" in usual)
        known = known or (key == LOCAL_THETA and "sliding_attention" in (usual.get("rope_parameters") or {}))
        known = known or (key == "tensor_data_layout" and value == META_LAYOUT)
        if not known and value:
            yield key


def _by_attention(rope: Mapping[str, Any], local: float | None, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings as a configuration takes them: for all blocks, or by the kind of their attention.

    ``local`` is the theta of blocks with a sliding window, ``usual`` the configuration's default.
    """
    if "full_attention" in usual:
        kinds = {kind: dict(parameters) for kind, parameters in usual.items()}
        kinds["full_attention"] |= rope
        if local is not None:
            kinds["sliding_attention"]["rope_theta"] = local
        return kinds
    same = usual.get("rope_type") == rope["rope_type"]
    return {**(usual if same else {}), **rope}
