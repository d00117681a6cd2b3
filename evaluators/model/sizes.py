"""This module holds the sizes that decide what a model takes, and what a stage of a run is predicted to take.

All of it is arithmetic on the configuration and the tensors' shapes; no weight is read. Sizes are in bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from transformers import PreTrainedConfig

from evaluators.model.folder import ModelFolder
from evaluators.model.outline import attention_of, text_config

FLOAT_BYTES, DOUBLE_BYTES = 4, 8
BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")  # part of the names of a decoder block's tensors
SHORT_TYPES = ("bfloat16", "float16")


def block_of(tensor: str) -> int | None:
    """Return the number of the decoder block that a tensor belongs to by its name; None for one of no block."""
    found = BLOCK.search(tensor)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class ModelShape:
    """Holds what of a model decides its memory and time; D is ``hidden``, V the head's rows."""

    layers: int
    hidden: int
    inner: int  # of the MLP
    heads: int
    tensors: Mapping[str, tuple[int, ...]]  # shapes by Hugging Face name
    head: str  # name of the head's weight, which is the embedding's where the two are tied
    embedding: str
    eager: bool  # whether attention forms its matrices of scores
    stored: int  # bytes of a stored weight
    carried: int = 0  # numbers of a position that pass between blocks beside hidden states

    @classmethod
    def of(cls, folder: ModelFolder) -> "ModelShape":
        """Return the sizes of a model folder. Raises ModelFolderError for a model type that transformers lacks."""
        config = text_config(folder.path)
        tensors = folder.shapes
        written = {**folder.config, **folder.config.get("text_config", {})}
        stored = str(written.get("dtype") or written.get("torch_dtype") or "float32")
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            inner=_inner(config, tensors),
            heads=_number(config, "num_attention_heads") or 1,
            tensors=tensors,
            head=folder.head_tensor,
            embedding=folder.embedding_tensor,
            eager=attention_of(folder.path) == "eager",
            stored=2 if stored in SHORT_TYPES else FLOAT_BYTES,
            carried=_carried(config, tensors),
        )

    @property
    def vocabulary(self) -> int:
        """Rows V of the head."""
        return self.tensors[self.head][0]

    def weights(self, name: str) -> int:
        """Return the number of weights of a tensor."""
        return prod(self.tensors[name])

    def bytes_of(self, name: str, compute: torch.dtype = torch.float32) -> int:
        """Return the bytes of a decoded tensor where blocks multiply in ``compute``.

        Only the matrices of blocks are in that type; embedding, head, norms and biases are float32 always.
        """
        multiplied = block_of(name) is not None and len(self.tensors[name]) == 2
        return self.weights(name) * (compute.itemsize if multiplied else FLOAT_BYTES)

    def block_bytes(self, compute: torch.dtype = torch.float32) -> int:
        """Return the bytes of the largest decoder block, decoded."""
        blocks = [0] * self.layers
        for name in self.tensors:
            if (block := block_of(name)) is not None:
                blocks[block] += self.bytes_of(name, compute)
        return max(blocks)

    @property
    def head_bytes(self) -> int:
        """Bytes of the decoded head."""
        return self.bytes_of(self.head)

    @property
    def state_bytes(self) -> int:
        """Bytes of what passes between blocks for one position."""
        return (self.hidden + self.carried) * FLOAT_BYTES

    def activation_bytes(self, window: int) -> int:
        """Return the bytes per position that are alive at once within a block, for windows of ``window`` tokens.

        They are the MLP's three inner vectors and six vectors of size D. Where attention is not fused, its scores are
        added: three matrices (window, window) per head.
        """
        scores = 3 * window * self.heads if self.eager else 0
        return (6 * self.hidden + 3 * self.inner + scores) * FLOAT_BYTES


def _inner(config: PreTrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Return the width of what an MLP holds for a token: that of the experts that a token goes to, if there are any."""
    experts = _number(config, "num_experts_per_tok")
    each = _number(config, "moe_intermediate_size") or _number(config, "intermediate_size")
    shared = _number(config, "shared_expert_intermediate_size")
    dense = _number(config, "intermediate_size")
    return max(dense, experts * each + shared) or max(
        shape[0] for n, shape in tensors.items() if block_of(n) is not None
    )


def _carried(config: PreTrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many numbers of a position ``evaluators.model.carried`` keeps: inputs of blocks, keys and values."""
    layers, shared = int(config.num_hidden_layers), _number(config, "num_kv_shared_layers")
    found = layers * _number(config, "hidden_size_per_layer_input")
    if shared:
        last = {kind: layer for layer, kind in enumerate(config.layer_types[: layers - shared])}
        ends = tuple(f".layers.{layer}.self_attn.k_proj.weight" for layer in last.values())
        found += sum(2 * shape[0] for name, shape in tensors.items() if name.endswith(ends))
    return found


def _number(config: PreTrainedConfig, name: str) -> int:
    """Return a number of the configuration, the largest where it differs by layer; 0 where there is none."""
    value = getattr(config, name, None)
    return int(max(value) if isinstance(value, list | tuple) else value or 0)


@dataclass(frozen=True)
class StageMemory:
    """Holds the predicted peak of a stage in one process, by part, beside what the process itself takes."""

    device: Mapping[str, int] = field(default_factory=dict)  # of the accelerator; nothing on a CPU
    host: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device, there: Mapping[str, int], host: Mapping[str, int]) -> "StageMemory":
        """Return the memory of a stage that holds ``there`` on its ``device``, which may be the host itself."""
        return cls({}, {**there, **host}) if device.type == "cpu" else cls(dict(there), dict(host))

    @property
    def device_bytes(self) -> int:
        """Bytes on the accelerator."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Bytes on the host."""
        return sum(self.host.values())


def larger(first: StageMemory, second: StageMemory) -> StageMemory:
    """Return the parts of whichever phase takes more, on the device and on the host each."""
    return StageMemory(
        max(first.device, second.device, key=lambda parts: sum(parts.values())),
        max(first.host, second.host, key=lambda parts: sum(parts.values())),
    )
