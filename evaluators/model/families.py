"""The one table of model families: how each runs block by block, and how GGUF stores it.

A family is a ``model_type`` of transformers' config.json. Another one is another row here, if its decoder blocks map
hidden states to hidden states and its tensors have transformers' usual names; ``architecture`` is for those that
llama.cpp computes as transformers does.
"""

from dataclasses import dataclass

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
LINEARS = QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """The llama.cpp graph that runs a family."""

    name: str  # llama.cpp's own, the prefix of a file's keys
    permutes_qk: bool = False  # rows of q and k go from transformers' half-split rotary order to the interleaved one
    biases: frozenset[str] = frozenset()  # kinds of tensors whose bias the graph adds
    free_head_dim: bool = True  # whether heads times their size may differ from the hidden size


@dataclass(frozen=True)
class Family:
    """What is known of one ``model_type``."""

    model_type: str
    attention: str = "sdpa"  # transformers' implementation; PyTorch's fused one has no soft cap
    scalable: bool = False  # its norms multiply by their plain weight, so that channel scales can be folded into them
    architecture: Architecture | None = None  # None: it can be evaluated, and not exported


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", scalable=True, architecture=Architecture("llama", permutes_qk=True, biases=LINEARS)),
        Family("mistral", scalable=True, architecture=Architecture("llama", permutes_qk=True)),
        Family("qwen2", scalable=True, architecture=Architecture("qwen2", biases=QKV, free_head_dim=False)),
        Family("qwen3", scalable=True, architecture=Architecture("qwen3")),
        Family("gemma2", attention="eager"),
        Family("gemma3_text"),
        Family("phi3"),
    )
}
SCALABLE = tuple(name for name, family in FAMILIES.items() if family.scalable)
EXPORTABLE = tuple(name for name, family in FAMILIES.items() if family.architecture)
