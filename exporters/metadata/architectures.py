"""The architectures that can be written, and the dimensions that GGUF wants to know of a model.

Each has a graph in llama.cpp that computes what transformers computes; anything else is refused in one sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from bitgenome.common.errors import UserError
from exporters.metadata.source import ModelSource


class UnsupportedArchitectureError(UserError):
    """The model has no GGUF form that computes the same; the message is one sentence for the user."""


@dataclass(frozen=True)
class Architecture:
    """A ``model_type`` of transformers and the llama.cpp graph that runs it."""

    model_type: str
    gguf: MODEL_ARCH
    permutes_qk: bool  # rows of q and k reordered from transformers' half-split rotary to the interleaved one
    biases: frozenset[str]  # kinds of tensors whose bias the graph adds
    free_head_dim: bool = True  # whether heads times their size may differ from the hidden size

    @property
    def name(self) -> str:
        """llama.cpp's name, the prefix of the file's keys."""
        return str(MODEL_ARCH_NAMES[self.gguf])


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_LINEARS = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("llama", MODEL_ARCH.LLAMA, permutes_qk=True, biases=_LINEARS),
        Architecture("mistral", MODEL_ARCH.LLAMA, permutes_qk=True, biases=frozenset()),
        Architecture("qwen2", MODEL_ARCH.QWEN2, permutes_qk=False, biases=_QKV, free_head_dim=False),
        Architecture("qwen3", MODEL_ARCH.QWEN3, permutes_qk=False, biases=frozenset()),
    )
}


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder in GGUF's vocabulary; all counts."""

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
    """Raises UnsupportedArchitectureError unless ``config.json`` names an architecture of the table."""
    found = str(source.config.get("model_type", ""))
    if found not in ARCHITECTURES:
        raise UnsupportedArchitectureError(
            f"expected a model of type {', '.join(ARCHITECTURES)}, found {found or 'none'!r} in {source.path}: "
            "it has no GGUF export"
        )
    activation = source.config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedArchitectureError(f"expected hidden_act 'silu' for {found}, found {activation!r}")
    return ARCHITECTURES[found]


def dimensions_of(source: ModelSource) -> Dimensions:
    """The sizes in ``config.json``.

    Raises UnsupportedArchitectureError if one that has no default is missing, or if the heads do not suit the graph.
    """
    config, architecture = source.config, architecture_of(source)
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    head_dim = int(config.get("head_dim") or hidden // heads)
    if heads * head_dim != hidden and not architecture.free_head_dim:
        raise UnsupportedArchitectureError(
            f"expected heads of {hidden // heads} = {hidden} / {heads} for {architecture.model_type}, found {head_dim}"
        )
    return Dimensions(
        layers=_integer(config, "num_hidden_layers"),
        hidden=hidden,
        feed_forward=_integer(config, "intermediate_size"),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocabulary=_integer(config, "vocab_size"),
        context=_integer(config, "max_position_embeddings"),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),  # transformers' default
    )


def _integer(config: Mapping[str, Any], key: str) -> int:
    if not isinstance(config.get(key), int):
        raise UnsupportedArchitectureError(f"expected an integer {key} in config.json, found {config.get(key)!r}")
    return int(config[key])
