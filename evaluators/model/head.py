"""This module holds the head of a language model, which turns final hidden states into logits.

Shapes: P positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Computes logits with ``weight`` (V, D); a soft cap c, as Gemma 2 has, turns them into c * tanh(logits / c)."""

    weight: Tensor
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (P, V) of final hidden states (P, D).

        The soft cap works in place, so backpropagate with ``hidden_gradient``, not with autograd.
        """
        logits = hidden @ self.weight.T
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def hidden_gradient(self, logits: Tensor, gradient: Tensor, out: Tensor) -> None:
        """Write the gradient with respect to the hidden states to ``out`` (P, D).

        ``logits`` (P, V) are those of ``__call__``. ``gradient`` (P, V), with respect to them, is overwritten.
        """
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        torch.mm(gradient, self.weight, out=out)
