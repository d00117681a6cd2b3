"""This module checks that a model's weights are those that its config.json describes, from headers alone."""

import logging

import torch

from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, ModelFolderError

log = logging.getLogger(__name__)

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
QUANTIZED_TYPES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "8-bit", "U8": "packed", "I32": "packed"}
QUANTIZED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")


def check_model(folder: ModelFolder) -> None:
    """Raise ModelFolderError unless the weights have every tensor of the model, in its shape and in floats.

    The model is built without memory for weights, from config.json; shapes and types come from the files' headers.
    Warns where embedding and head are one tensor in config.json and two in the weights, or the other way round.
    """
    model = BlockModel(folder, torch.device("cpu"))  # weights stay on the meta device
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    expected = {name: tuple(model.tensor_of(name).shape) for name in model.tensor_names}
    quantized = _quantized(folder)
    for name, shape in expected.items():
        stored = folder.shapes.get(name)
        kind = folder.types.get(name)
        if quantized and (stored is None or kind not in FLOAT_TYPES):
            raise ModelFolderError(
                f"expected weights in floats ({', '.join(FLOAT_TYPES)}), found {quantized} in {folder.path}: "
                "take the model that it was made from"
            )
        if stored is None:
            raise ModelFolderError(
                f"expected tensor {name} ({_words(shape)}), as config.json says, found none in {folder.path}"
            )
        if kind not in FLOAT_TYPES:
            raise ModelFolderError(
                f"expected weights in floats ({', '.join(FLOAT_TYPES)}), found {kind} in {name} of "
                f"{folder.file_of(name)}"
            )
        if stored != shape:
            raise ModelFolderError(
                f"expected {name} to be {_words(shape)}, as config.json says, found {_words(stored)} in "
                f"{folder.file_of(name)}"
            )
    if folder.tied != tied:
        found = "no lm_head.weight: the embedding serves as head" if folder.tied else "lm_head.weight, which is used"
        log.warning("config.json says tie_word_embeddings: %s, the weights hold %s", str(tied).lower(), found)


def _quantized(folder: ModelFolder) -> str | None:
    """Return how the weights are quantized, in words, or None if nothing says that they are."""
    settings = folder.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method:
        return f"a model quantized by {method} (quantization_config in config.json)"
    headers = folder.stored.headers
    kinds = {kind for name, (_, kind) in headers.items() if name.endswith("proj.weight")} & QUANTIZED_TYPES.keys()
    if kinds:
        kind = sorted(kinds)[0]
        return f"a model quantized before, with {QUANTIZED_TYPES[kind]} weights ({kind})"
    named = next((name for name in headers if name.endswith(QUANTIZED_SUFFIXES)), None)
    return f"a model quantized before, with the tensor {named}" if named else None


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
