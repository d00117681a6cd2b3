"""This module packs hidden states, and what else passes from a block to the next, into one tensor.

Gemma 4 gives each block an input of its own, made from the token ids and their embeddings, and lets later blocks attend
to keys and values of earlier ones. A state (B, T, S) holds hidden states (D), these inputs, and those keys and values;
for most models S is D. Shapes: B windows, T positions, D hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SHARED = "shared_kv_states"  # transformers' name of the argument in which blocks leave keys and values


@dataclass
class Carried:
    """Holds where a state keeps what; ``width`` is S, ``hidden`` D."""

    hidden: int
    width: int
    inputs: dict[tuple[int, int], slice] = field(default_factory=dict)  # by block and position of the argument
    shared: dict[str, tuple[slice, slice, int]] = field(default_factory=dict)  # keys, values, width of a head, by kind
    leaves: dict[int, str] = field(default_factory=dict)  # kind of the keys and values that a block leaves
    takes: dict[int, str] = field(default_factory=dict)  # kind of those that it attends to

    @classmethod
    def of(cls, blocks: nn.ModuleList, given: list[tuple[Any, ...]], hidden: int) -> "Carried":
        """Return the layout for ``blocks``, whose positional arguments after the hidden states are ``given``.

        Those of them that come from weights are NaN.
        """
        found = cls(hidden, hidden)
        for block, values in enumerate(given):
            for place, value in enumerate(values):
                if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                    found.inputs[block, place] = found._take(value.shape[-1])
        attentions: list[Any] = [getattr(block, "self_attn", None) for block in blocks]
        if any(getattr(part, "is_kv_shared_layer", False) for part in attentions):
            for block, part in enumerate(attentions):
                stores = getattr(part, "store_full_length_kv", False)
                if stores:
                    columns = part.k_proj.out_features
                    found.shared[part.layer_type] = found._take(columns), found._take(columns), part.head_dim
                    found.leaves[block] = part.layer_type
                if getattr(part, "is_kv_shared_layer", False):
                    found.takes[block] = part.layer_type
        return found

    def _take(self, columns: int) -> slice:
        self.width += columns
        return slice(self.width - columns, self.width)

    def state(self, hidden: Tensor, given: list[tuple[Any, ...]]) -> Tensor:
        """Return the state (B, T, S) before the first block; ``given`` are the blocks' positional arguments."""
        if self.width == self.hidden:
            return hidden
        parts = [hidden, *(given[block][place] for block, place in self.inputs)]
        rest = self.width - sum(part.shape[-1] for part in parts)
        return torch.cat([*parts, hidden.new_zeros(*hidden.shape[:2], rest)], dim=-1)

    def unpacked(
        self, block: int, state: Tensor, inputs: tuple[Any, ...], arguments: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of ``block``, those that the ``state`` carries among them."""
        inputs = tuple(
            state[..., self.inputs[block, place]] if (block, place) in self.inputs else value
            for place, value in enumerate(inputs)
        )
        if SHARED in arguments:
            kind = self.takes.get(block)
            found = {} if kind is None else {kind: self._keys_and_values(state, kind)}
            arguments = {**arguments, SHARED: found}
        return inputs, arguments

    def _keys_and_values(self, state: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        keys, values, head = self.shared[kind]
        split = (state[..., part].unflatten(-1, (-1, head)).contiguous().transpose(1, 2) for part in (keys, values))
        return next(split), next(split)

    def packed(self, block: int, output: Tensor, before: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the state after ``block``, of its ``output`` and of what it left in its ``arguments``."""
        if self.width == self.hidden:
            return output
        state = torch.cat([output, before[..., self.hidden :]], dim=-1)
        if (kind := self.leaves.get(block)) is not None:
            *places, _ = self.shared[kind]
            for place, value in zip(places, arguments[SHARED][kind], strict=True):
                state[..., place] = value.transpose(1, 2).flatten(2)
        return state
