"""Builds the key-values from which llama.cpp sets up a model's graph (names: constants.py of the gguf package)."""

from gguf import GGML_QUANT_VERSION, LlamaFileType

from exporters.metadata.architectures import UnsupportedArchitectureError, architecture_of, dimensions_of
from exporters.metadata.key_values import KeyValues
from exporters.metadata.rope import rope_of, scaling_keys
from exporters.metadata.source import ModelSource

WINDOWED = ("mistral", "qwen2", "qwen3")  # families whose blocks may have a sliding window
DEFAULT_WINDOW = 4096  # transformers' default for them
DEFAULT_FULL_LAYERS = 28  # transformers' default of max_window_layers


def mixed_types() -> KeyValues:
    """Return the key-values of a file whose tensors have several types."""
    keys = KeyValues()
    keys.uint32("general.file_type", int(LlamaFileType.GUESSED))
    keys.uint32("general.quantization_version", GGML_QUANT_VERSION)
    return keys


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
    keys |= mixed_types()
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
    if (window := attention_window(source)) is not None:
        keys.uint32(f"{prefix}.attention.sliding_window", window)
    return keys


def attention_window(source: ModelSource) -> int | None:
    """Return how many tokens back the model attends in some of its blocks, None for all tokens in every block.

    llama.cpp's graphs of llama (which mistral uses), qwen2 and qwen3 ignore such a window: they attend to all tokens.
    Raises UnsupportedArchitectureError for a window that is no number.
    """
    config = source.config
    window = config.get("sliding_window", DEFAULT_WINDOW if config.get("model_type") in WINDOWED else None)
    if window is None or config.get("model_type") not in WINDOWED:
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise UnsupportedArchitectureError(f"expected an integer sliding_window in config.json, found {window!r}")
    if config["model_type"] == "mistral":
        return window
    layers, kinds = dimensions_of(source).layers, config.get("layer_types")
    first = config.get("max_window_layers", DEFAULT_FULL_LAYERS)
    some = "sliding_attention" in kinds if isinstance(kinds, list) else first < layers
    return window if config.get("use_sliding_window") and some else None
