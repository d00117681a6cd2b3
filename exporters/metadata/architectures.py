"""Finds the llama.cpp graph of a model and the dimensions that GGUF records.

A model is refused, in one sentence, unless llama.cpp has a graph that computes the same as transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgenome.common.errors import UserError
from evaluators.model.families import EXPORTABLE, FAMILIES, Architecture
from exporters.metadata.source import ModelSource


class UnsupportedArchitectureError(UserError):
    """Raised if no GGUF file computes the same as the model; the message is one sentence for the user."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder, as GGUF records them."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    norm_epsilon: float


def architecture_of(source: ModelSource) -> Architecture:
    """Return the llama.cpp graph of a model.

    Raises UnsupportedArchitectureError unless ``config.json`` names a family that has one, and the activation "silu".
    """
    found = str(source.config.get("model_type", ""))
    family = FAMILIES.get(found)
    if family is None or family.architecture is None:
        raise UnsupportedArchitectureError(
            f"expected a model of type {', '.join(EXPORTABLE)}, found {found or 'none'!r} in {source.path}: "
            "it has no GGUF export"
        )
    activation = source.config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedArchitectureError(f"expected hidden_act 'silu' for {found}, found {activation!r}")
    return family.architecture


def dimensions_of(source: ModelSource) -> Dimensions:
    """Return the sizes in ``config.json``.

    Raises UnsupportedArchitectureError if a size without default is missing or the head size does not suit the graph.
    """
    config, architecture = source.config, architecture_of(source)
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    head_dim = _integer(config, "head_dim", hidden // heads)
    epsilon = config.get("rms_norm_eps", 1e-6)  # transformers' default
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
        raise UnsupportedArchitectureError(f"expected a number as rms_norm_eps in config.json, found {epsilon!r}")
    if heads * head_dim != hidden and not architecture.free_head_dim:
        raise UnsupportedArchitectureError(
            f"expected heads of {hidden // heads} = {hidden} / {heads} for {config['model_type']}, found {head_dim}"
        )
    return Dimensions(
        layers=_integer(config, "num_hidden_layers"),
        hidden=hidden,
        feed_forward=_integer(config, "intermediate_size"),
        heads=heads,
        kv_heads=_integer(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        vocabulary=_integer(config, "vocab_size"),
        context=_integer(config, "max_position_embeddings"),
        norm_epsilon=float(epsilon),
    )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UnsupportedArchitectureError(
            f"expected an integer {key} above 0 in config.json, found {config.get(key)!r}"
        )
    return value
