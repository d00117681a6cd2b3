"""This module builds what a decoder block takes besides hidden states: mask, positions and rotary embeddings.

All of them are made by transformers. Shapes: B windows, T positions, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from evaluators.model.parts import Parts


class BlockArguments:
    """Provides the arguments of every block, recorded in a forward pass of the decoder without its blocks.

    The mask of a sliding window, the rotary embedding of a layer type and the frequencies for long text are therefore
    transformers' own. A mask of None is plain causal attention. The arguments of the last shape, dtype and device are
    cached.
    """

    def __init__(self, parts: Parts):
        self._parts = parts
        self._recorders = parts.recorders([])
        self._shape: tuple[Any, ...] = ()

    def __call__(self, block: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional arguments after the hidden states (B, T, D), and the keyword arguments, of ``block``.

        Their first dimension is 1, so that they broadcast over windows, unless the model needs one for each.
        """
        rows = len(hidden) if self._parts.by_window else 1
        shape = (rows, hidden.shape[1], hidden.dtype, hidden.device)
        if shape != self._shape:
            self._record(hidden, rows)
            self._shape = shape
        return self._recorders[block].inputs, self._recorders[block].arguments

    @torch.inference_mode(False)  # autograd may use the cached tensors, which inference tensors do not allow
    @torch.no_grad()
    def _record(self, hidden: Tensor, rows: int) -> None:
        decoder = self._parts.stubbed(self._recorders, hidden.device, hidden.dtype, [], [])
        decoder(input_ids=torch.zeros(rows, hidden.shape[1], dtype=torch.long, device=hidden.device), use_cache=False)
