"""The last step of a language model: final hidden states to logits.

Shapes: P positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """``weight`` (V, D) and, for Gemma, the soft cap c that makes c * tanh(logits / c) of the logits."""

    weight: Tensor
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(P, D) final hidden states -> (P, V) logits, through which no gradient passes."""
        logits = hidden @ self.weight.T
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def hidden_gradient(self, logits: Tensor, gradient: Tensor, out: Tensor) -> None:
        """Write to ``out`` (P, D) the gradient in the hidden states, from that in ``logits`` (P, V), overwritten."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        torch.mm(gradient, self.weight, out=out)
