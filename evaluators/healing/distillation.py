"""Distillation losses between the final hidden states of two models, over the whole vocabulary.

Shapes: P positions, D hidden size, V vocabulary. Logits exist for one chunk of positions at a time, and only in the
forward pass, which also computes each chunk's gradient with respect to the hidden states and the head's weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evaluators.data.windows import scored
from evaluators.engine.divergence import chunk_positions, next_tokens
from evaluators.model.head import Head
from evaluators.settings import HealingSettings


@dataclass(frozen=True)
class DistillationLoss:
    """Computes (1 - alpha) * temperature^2 * KL(P || Q) + alpha * cross-entropy of the text's own next token.

    P and Q are softmax(logits / temperature) of the full-precision and the trained model. The KL, in nats, is a mean
    over the positions that are scored; the cross-entropy, at temperature 1, a mean over those of them that have a next
    token. The factor temperature^2 keeps the size of the gradient (Hinton, Vinyals and Dean, "Distilling the knowledge
    in a neural network", 2015, section 2). ``alpha`` 0 is the plain KL.
    """

    temperature: float = 1.0
    alpha: float = 0.0

    @classmethod
    def of(cls, settings: HealingSettings) -> "DistillationLoss":
        """Return the loss with the temperature and the alpha of ``settings``."""
        return cls(settings.chosen_temperature, settings.chosen_alpha)

    def __call__(
        self, hidden: Tensor, head: Head, reference: Tensor, reference_head: Head, ids: Tensor, unscored: int = 0
    ) -> Tensor:
        """Return the scalar loss, differentiable with respect to ``hidden`` (B, T, D) and the weight of ``head`` only.

        ``hidden`` are the trained model's final hidden states and ``head`` its head, ``reference`` (B, T, D) and
        ``reference_head`` those of the full-precision model; ``ids`` (B, T) are the tokens. The first
        ``unscored`` positions of each window do not count.
        """
        rows, reference_rows, targets = (
            scored(x, unscored).flatten(0, 1) for x in (hidden, reference, next_tokens(ids))
        )
        loss: Tensor = _ChunkedLoss.apply(rows, head.weight, head, reference_rows, reference_head, targets, self)
        return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: Head,
        reference: Tensor,
        reference_head: Head,
        targets: Tensor,
        loss: DistillationLoss,
    ) -> Tensor:
        followed = int((targets >= 0).sum())
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradient = torch.empty_like(hidden)
        at_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        step = chunk_positions(head)
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            p = reference_head(reference[rows]).div_(loss.temperature)
            q = head(hidden[rows])
            value, logits_gradient = _soft(p, q, loss.temperature)
            share = (1 - loss.alpha) / len(hidden)
            total += share * value
            logits_gradient.mul_(share)
            if loss.alpha and followed:
                total += loss.alpha / followed * _add_hard(q, targets[rows], logits_gradient, loss.alpha / followed)
            head.hidden_gradient(q, logits_gradient, out=gradient[rows])
            if at_weight is not None:
                at_weight.addmm_(logits_gradient.T, hidden[rows])
        ctx.save_for_backward(gradient, at_weight)
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gradient, at_weight = ctx.saved_tensors
        return gradient * grads[0], None if at_weight is None else at_weight * grads[0], None, None, None, None, None


def _soft(p: Tensor, q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of temperature^2 * KL(P || Q), float64, and its gradient (P, V) in the logits ``q``.

    ``p`` are the reference's logits, already divided by the temperature, and are overwritten.
    """
    log_p = p.log_softmax(-1)
    log_q = (q / temperature).log_softmax(-1) if temperature != 1 else q.log_softmax(-1)
    probs = log_p.exp()
    value = torch.sum(probs * (log_p - log_q), dtype=torch.float64) * temperature**2
    return value, log_q.exp_().sub_(probs).mul_(temperature)


def _add_hard(q: Tensor, targets: Tensor, gradient: Tensor, weight: float) -> Tensor:
    """Return the targets' summed cross-entropy, float64; add ``weight`` times its gradient to ``gradient`` (P, V)."""
    rows = (targets >= 0).nonzero()[:, 0]
    log_q = functional.log_softmax(q[rows], -1)
    value = -log_q.gather(1, targets[rows, None]).sum(dtype=torch.float64)
    probs = log_q.exp_()
    probs[torch.arange(len(rows), device=q.device), targets[rows]] -= 1
    gradient[rows] += probs.mul_(weight)
    return value
