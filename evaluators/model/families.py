"""This module lists the model families of which more is known than that they run: how GGUF stores them, and scaling.

A family is a ``model_type`` of transformers' config.json. Any decoder runs, with a row here or without one
(``evaluators.model.parts``). ``architecture`` is set where llama.cpp computes what transformers computes.
"""

from dataclasses import dataclass

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
LINEARS = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """Describes the llama.cpp graph that runs a family."""

    name: str  # llama.cpp's name, which is also the prefix of the GGUF file's metadata keys
    permutes_qk: bool = False  # rows of q and k go from transformers' half-split rotary order to the interleaved one
    biases: frozenset[str] = frozenset()  # kinds of tensors whose bias the graph adds
    free_head_dim: bool = True  # whether heads * head_dim may differ from the hidden size


@dataclass(frozen=True)
class Family:
    """Describes one ``model_type``: whether channel scales fold into it, and how it is exported."""

    model_type: str
    scalable: bool = False  # norms multiply by the plain weight (not 1 + weight), so channel scales fold into them
    architecture: Architecture | None = None  # None: evaluated, but not exported without a template


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", scalable=True, architecture=Architecture("llama", permutes_qk=True, biases=LINEARS)),
        Family("mistral", scalable=True, architecture=Architecture("llama", permutes_qk=True)),
        Family("qwen2", scalable=True, architecture=Architecture("qwen2", biases=QKV, free_head_dim=False)),
        Family("qwen3", scalable=True, architecture=Architecture("qwen3")),
    )
}
SCALABLE = tuple(name for name, family in FAMILIES.items() if family.scalable)
EXPORTABLE = tuple(name for name, family in FAMILIES.items() if family.architecture)
