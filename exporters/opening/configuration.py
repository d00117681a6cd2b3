"""Makes a model's configuration of a GGUF file's key-values, by transformers' table of its architecture.

That table leaves out what not all files of an architecture have, such as the scaling of rotary embeddings: ``settings``
adds it, and a key that neither knows is refused, since the model would silently be another one.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING, load_gguf_checkpoint

from exporters.opening.settings import added_settings, unread
from exporters.opening.source import GgufModel, GgufModelError, shortest

TYPES = {  # llama.cpp's name -> transformers' in its table, where the two differ
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2",
}  # fmt: skip
WITH_EXPERTS = {"llama": "mixtral"}  # of one name in llama.cpp, and of two in transformers
# of what transformers' reader gets: what the writer writes itself, and a scaling that the reader cannot parse
LEFT_OUT = ("general.architecture", "general.alignment", "gpt-oss.rope.scaling.")


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
        kind = WITH_EXPERTS.get(kind, kind) if keys.get("expert_count") else kind
        usual = AutoConfig.for_model(kind).to_dict()
        settings |= added_settings(model, usual)
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
    for key in unread(keys, usual):
        if table.get(key) is None:
            found = f"{model.architecture}.{key} = {keys[key]}"
            raise _refused(model, f"{found}, for which {type(config).__name__} has no setting")
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


def _refused(model: GgufModel, reason: str) -> GgufModelError:
    return GgufModelError(
        f"expected a model that transformers builds of a GGUF file, found {reason} in {model.path}: take the Hugging "
        "Face folder that it was made from"
    )
