"""This module builds the model of a folder without its weights, by transformers' own classes."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from evaluators.model.errors import ModelFolderError
from evaluators.model.experts import take_apart


def build_model(path: Path, apart: bool = True) -> PreTrainedModel:
    """Return the model of the folder ``path`` on the meta device, of linear layers that hooks see.

    Not ``apart``, its parameters are as transformers has them: experts are stacked, and GPT-2's weights transposed.

    Attention is PyTorch's fused one (sdpa) where transformers has it for the model, else ``eager``: it has no soft cap,
    as Gemma 2 needs, and no sinks, as gpt-oss does. Raises ModelFolderError for a model that transformers cannot build.
    """
    try:
        config = _config(path)
        for part in (config, config.get_text_config()):
            part.pad_token_id = None  # no text here is padded, and the embedding may be cut to the rows in use
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=_attention(config), trust_remote_code=False
            )
            if apart:
                take_apart(model)
                _straighten(model)
    except Exception as error:  # whatever transformers makes of a config.json that does not fit
        found = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelFolderError(f"expected a model that transformers can build from {path}, found {found}") from None
    model.eval().requires_grad_(False)
    return model


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of weights (columns, rows) of a model that is not taken apart: those of GPT-2's layers."""
    return frozenset(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D))


def _straighten(model: nn.Module) -> None:
    """Replace every layer of ``model`` that holds its weight transposed by a linear layer."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                parent.register_module(name, nn.Linear(child.nx, child.nf))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model that has the blocks."""
    found = model.get_decoder()
    if found is model:  # transformers 5.23 does not find Llama 4's
        found = next(part for part in model.children() if isinstance(part, PreTrainedModel))
    return found


def attention_of(path: Path) -> str:
    """Return transformers' attention implementation (``sdpa`` or ``eager``) for the model of the folder ``path``.

    Raises ModelFolderError for a model type that transformers does not have.
    """
    try:
        return _attention(_config(path))
    except (OSError, ValueError, KeyError) as error:
        raise _unknown(path, error) from None


def text_config(path: Path) -> PreTrainedConfig:
    """Return the configuration of the folder ``path``, of the text part of a multimodal model.

    Raises ModelFolderError for a model type that transformers does not have.
    """
    try:
        return _config(path).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise _unknown(path, error) from None


def _unknown(path: Path, error: Exception) -> ModelFolderError:
    found = " ".join(str(error).split())
    return ModelFolderError(f"expected a causal language model of transformers in {path}, found {found}")


def _config(path: Path) -> PreTrainedConfig:
    """Return the configuration of what runs: of the text part, where transformers has no class for text with all."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config if type(config) in AutoModelForCausalLM._model_mapping else config.get_text_config()


def _attention(config: PreTrainedConfig) -> str:
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    kind = kind[0] if isinstance(kind, (list, tuple)) else kind
    return "sdpa" if kind._supports_sdpa else "eager"
