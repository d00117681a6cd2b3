"""Builds the key-values from which llama.cpp sets up a model's graph (names: constants.py of the gguf package)."""

import logging

from gguf import GGML_QUANT_VERSION, LlamaFileType

from exporters.metadata.architectures import architecture_of, dimensions_of
from exporters.metadata.key_values import KeyValues
from exporters.metadata.rope import rope_of, scaling_keys
from exporters.metadata.source import ModelSource

log = logging.getLogger(__name__)


def model_metadata(source: ModelSource) -> KeyValues:
    """Return the hyperparameters of ``source``, without ``general.architecture``, which GGUFWriter adds.

    The file type is GUESSED, ggml's value for a mix of types. Raises UnsupportedArchitectureError for a model that
    llama.cpp would compute differently.
    """
    architecture, sizes, rope = architecture_of(source), dimensions_of(source), rope_of(source.config)
    prefix = architecture.name
    keys = KeyValues()
    keys.string("general.type", "model")
    keys.string("general.name", source.name)
    keys.uint32("general.file_type", int(LlamaFileType.GUESSED))
    keys.uint32("general.quantization_version", GGML_QUANT_VERSION)
    for name, value in {
        "block_count": sizes.layers,
        "context_length": sizes.context,
        "embedding_length": sizes.hidden,
        "feed_forward_length": sizes.feed_forward,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "rope.dimension_count": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
    }.items():
        keys.uint32(f"{prefix}.{name}", value)
    keys.float32(f"{prefix}.attention.layer_norm_rms_epsilon", sizes.norm_epsilon)
    keys.float32(f"{prefix}.rope.freq_base", rope.theta)
    for name, setting in scaling_keys(rope, sizes.context).items():
        if isinstance(setting, str):
            keys.string(f"{prefix}.{name}", setting)
        elif isinstance(setting, int):
            keys.uint32(f"{prefix}.{name}", setting)
        else:
            keys.float32(f"{prefix}.{name}", setting)
    _sliding_window(source, prefix, sizes.context, keys)
    return keys


def _sliding_window(source: ModelSource, prefix: str, context: int, keys: KeyValues) -> None:
    """Record a sliding window, and warn if it is shorter than the context: these llama.cpp graphs ignore it."""
    window = source.config.get("sliding_window")
    if not window or source.config.get("use_sliding_window") is False:
        return
    keys.uint32(f"{prefix}.attention.sliding_window", int(window))
    if window < context:
        log.warning(
            "the model attends to %d tokens back, llama.cpp's %s graph to all: texts longer than %d tokens differ",
            window, prefix, window,
        )  # fmt: skip
