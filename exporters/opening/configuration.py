"""Makes a model's configuration of a GGUF file's key-values, by transformers' table of its architecture.

That table leaves out what not all files of an architecture have, such as the scaling of rotary embeddings: what it
leaves out is added here, and a key that neither knows is refused, since the model would silently be another one.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING, load_gguf_checkpoint

from exporters.opening.rotary import READ, rope_parameters
from exporters.opening.source import GgufModel, GgufModelError, shortest

TYPES = {  # llama.cpp's name -> transformers' in its table, where the two differ
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2",
}  # fmt: skip
ADDED = {  # llama.cpp's key -> attributes, of which a configuration has one or none
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
BIASES = {  # attributes that add biases -> a tensor of the file that shows them
    "attention_bias": "blk.0.attn_q.bias",
    "mlp_bias": "blk.0.ffn_up.bias",
    "use_qkv_bias": "blk.0.attn_q.bias",
    "use_bias": "blk.0.ffn_up.bias",
}
LOCAL_THETA = "rope.freq_base_swa"
# of what transformers' reader gets: what the writer writes itself, and a scaling that the reader cannot parse
LEFT_OUT = ("general.architecture", "general.alignment", "gpt-oss.rope.scaling.")
REQUIRED = ("block_count", "context_length", "embedding_length", "attention.head_count")  # as llama.cpp has it
IMPLIED = ("vocab_size", "attention.key_length", "attention.value_length", "rope.scaling.finetuned", "attention.causal")
# whose attention scores are divided by the root of hidden / heads: llama.cpp tells them by their blocks
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}


def configuration(model: GgufModel) -> PretrainedConfig:
    """Return the configuration of the model in a file.

    Raises GgufModelError for an architecture that transformers does not read, and for a hyperparameter that it has no
    setting for.
    """
    names = tuple(model.tensors)
    keys = model.hyperparameters()
    try:
        if model.architecture in GGUF_CONFIG_ARCHS:
            metadata = {key: len(v) if key == "tokenizer.ggml.tokens" else v for key, v in model.key_values.items()}
            settings = get_gguf_config(metadata, names)
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        settings = _by_table(model)
        kind = settings.pop("model_type")
        usual = AutoConfig.for_model(kind).to_dict()
        settings |= _added(model, usual)
        config = AutoConfig.for_model(kind, **settings)
    except GgufModelError:
        raise
    except KeyError as error:
        raise GgufModelError(f"expected the hyperparameter {error.args[0]} in {model.path}, found none") from None
    except (ValueError, NotImplementedError, TypeError) as error:
        raise _refused(model, str(error)) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _refused(model, f"{kind} is no causal language model")
    table = GGUF_CONFIG_MAPPING.get(TYPES.get(model.architecture, model.architecture), {})
    for key, value in keys.items():
        known = table.get(key) is not None or key in READ or key in IMPLIED
        known = known or any(name in usual for name in ADDED.get(key, ()))
        known = known or (key == LOCAL_THETA and "sliding_attention" in (config.rope_parameters or {}))
        if not known and value:
            raise _refused(model, f"{model.architecture}.{key} = {value} is no setting of {type(config).__name__}")
    return config


def _by_table(model: GgufModel) -> dict[str, Any]:
    """Return what transformers' own reader makes of the hyperparameters.

    It decodes every key-value, which takes minutes for a vocabulary: it gets a file without the lists.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, model.architecture)
        for key, value in model.key_values.items():
            if not key.startswith(LEFT_OUT) and not (key.startswith("tokenizer.") and isinstance(value, list)):
                _add(writer, key, value)
        for name in model.tensors:
            writer.add_tensor(name, np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        settings: dict[str, Any] = load_gguf_checkpoint(str(path))["config"]
    settings.pop("_model_name_or_path", None)
    return {key: shortest(value) for key, value in settings.items()}


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def _added(model: GgufModel, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that transformers' table leaves out; ``usual`` are the defaults of the configuration."""
    keys = model.hyperparameters()
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in model.tensors}
    found["vocab_size"] = model.tensors["token_embd.weight"].shape[0]
    head_dim = keys.get("attention.key_length") or keys["embedding_length"] // keys["attention.head_count"]
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise ValueError("keys and values are not of the same length")
    for key, attributes in ADDED.items():
        for name in attributes:
            if key in keys and name in usual:
                found[name] = keys[key]
    if missing := [key for key in REQUIRED if key not in keys]:
        raise KeyError(f"{model.architecture}.{missing[0]}")
    if "head_dim" in usual:
        found["head_dim"] = head_dim
    elif head_dim * keys["attention.head_count"] != keys["embedding_length"]:
        raise ValueError(f"heads of {head_dim} weights, which {model.architecture} models of transformers have not")
    if "num_key_value_heads" in usual:
        found["num_key_value_heads"] = keys.get("attention.head_count_kv", keys["attention.head_count"])
    for name, tensor in BIASES.items():
        if name in usual:
            found[name] = tensor in model.tensors
    if "query_pre_attn_scalar" in usual:
        by_width = SCALED_BY_WIDTH.get(model.architecture) == keys["block_count"]
        found["query_pre_attn_scalar"] = (
            keys["embedding_length"] // keys["attention.head_count"] if by_width else head_dim
        )
    rope = rope_parameters(model, head_dim)
    return found | _rope_settings(rope, keys.get(LOCAL_THETA), usual.get("rope_parameters"))


def _rope_settings(rope: Mapping[str, Any], local: float | None, usual: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return rotary settings as a configuration takes them: for all blocks, or by the kind of their attention.

    ``local`` is the theta of blocks with a sliding window, ``usual`` the configuration's default.
    """
    if usual is None:
        return {}
    if "full_attention" in usual:
        kinds = {kind: dict(parameters) for kind, parameters in usual.items()}
        kinds["full_attention"] |= rope
        if local is not None:
            kinds["sliding_attention"]["rope_theta"] = local
        return {"rope_parameters": kinds}
    same = usual.get("rope_type") == rope["rope_type"]
    return {"rope_parameters": {**(usual if same else {}), **rope}}


def _refused(model: GgufModel, reason: str) -> GgufModelError:
    return GgufModelError(
        f"expected a model that transformers builds of a GGUF file, found {reason} in {model.path}: take the Hugging "
        "Face folder that it was made from"
    )
