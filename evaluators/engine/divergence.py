"""What a quantized model loses against the full-precision one, over every position and the whole vocabulary.

Shapes: P positions, D hidden size, V vocabulary. Logits exist for one chunk of positions at a time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluators.model.head import Head

CHUNK_LOGITS = 1 << 20  # logits of one chunk: four megabytes, which stay in a CPU's cache
MIN_CHUNK = 64  # positions, for large vocabularies
CACHE_BYTES = 1 << 28  # reference logits and probabilities are kept up to this size, else recomputed chunk by chunk


@dataclass(frozen=True)
class Divergence:
    """Means over positions; ``kl`` in nats per token, reference to candidate."""

    kl: float
    logit_mse: float
    perplexity: float
    window_kl: tuple[float, ...] = ()  # ``kl`` of each window

    @classmethod
    def of(cls, errors: Tensor) -> "Divergence":
        """From (B, 3) errors of windows, see Reference.errors. Raises FloatingPointError if they are not finite."""
        kl, mse, loss = errors.mean(0).tolist()
        if not math.isfinite(kl):
            raise FloatingPointError("the quantized model's logits are not finite")
        return cls(kl, mse, math.exp(loss), tuple(errors[:, 0].tolist()))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Divergence":
        return cls(**{**record, "window_kl": tuple(record.get("window_kl", ()))})


def chunk_positions(head: Head) -> int:
    """Positions of one chunk whose logits stay small."""
    return chunk_size(len(head.weight)) // len(head.weight)


def chunk_size(vocabulary: int) -> int:
    """Logits of one chunk."""
    return max(MIN_CHUNK, CHUNK_LOGITS // vocabulary) * vocabulary


class _Chunk(NamedTuple):
    """Full-precision ``logits`` and ``probs`` (P, V) of some positions, and the normalizing ``log_sum`` (P,)."""

    logits: Tensor
    probs: Tensor
    log_sum: Tensor


class Reference:
    """Final hidden states (P, D) and head of the full-precision model, and the token that follows each position.

    ``targets`` (P,) holds -1 where nothing follows. Logits and probabilities stay if they take ``cache_bytes`` or less.
    """

    def __init__(self, hidden: Tensor, head: Head, ids: Tensor, cache_bytes: int = CACHE_BYTES):
        self.hidden = hidden.flatten(0, 1)
        self.targets = torch.full_like(ids, -1)
        self.targets[:, :-1] = ids[:, 1:]
        self.targets = self.targets.flatten().to(hidden.device)
        self._step = chunk_positions(head)
        cached = 2 * len(self.hidden) * len(head.weight) * head.weight.element_size() <= cache_bytes
        kept = list(self._compute(head)) if cached else None
        self._chunks = partial(self._compute, head) if kept is None else lambda: kept  # which need no head any more

    @torch.inference_mode()
    def _compute(self, head: Head) -> Iterable[_Chunk]:
        for hidden in self.hidden.split(self._step):
            logits = head(hidden)
            log_sum = logits.logsumexp(-1)
            yield _Chunk(logits, (logits - log_sum[:, None]).exp_(), log_sum)

    def compare(self, hidden: Tensor, head: Head) -> Divergence:
        """Divergence of a model with final ``hidden`` states (B, T, D) and ``head`` from this reference.

        Raises FloatingPointError if the candidate's logits are not finite.
        """
        return Divergence.of(self.errors([hidden], head)[0])

    @torch.inference_mode()
    def errors(self, candidates: Sequence[Tensor], head: Head) -> list[Tensor]:
        """(B, 3) KL, squared logit error and cross-entropy of each window, for final hidden states (B, T, D) each.

        Means over positions, float64; not finite where the candidate's logits are not. The reference's logits are made
        once for all candidates.
        """
        found = [torch.empty(3, len(self.hidden), dtype=torch.float64, device=self.hidden.device) for _ in candidates]
        rows = [hidden.flatten(0, 1) for hidden in candidates]
        for index, chunk in enumerate(self._chunks()):
            part = slice(index * self._step, (index + 1) * self._step)
            for row, result in zip(rows, found, strict=True):
                result[:, part] = self._chunk_errors(chunk, head(row[part]), self.targets[part])
        B, T = candidates[0].shape[:2]
        counts = torch.tensor([T, T, T - 1], dtype=torch.float64, device=self.hidden.device)  # nothing follows the last
        return [result.view(3, B, T).sum(-1).T / counts for result in found]

    def _chunk_errors(self, chunk: _Chunk, logits: Tensor, targets: Tensor) -> Tensor:
        """(3, P) of a candidate's logits (P, V), which are changed."""
        target_logits = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].double()
        difference = logits.sub_(chunk.logits)
        mse = torch.linalg.vector_norm(difference, dim=-1).double().square() / difference.shape[-1]
        kl, log_ratio = kl_of_differences(chunk.probs, difference)
        loss = (chunk.log_sum.double() + log_ratio - target_logits) * (targets >= 0)
        return torch.stack((kl, mse, loss))


def kl_of_differences(probs: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P || Q) and log(sum exp q) - log(sum exp p), each (P,) float64, from ``probs`` of P and logits q - p (P, V).

    With d = q - p and Z the sums of exponentials: log(Zq / Zp) = log E[exp d] and KL = log E[exp d] - E[d],
    expectations under P. Written with expm1 and log1p, nothing cancels where the two models are close, and float32 is
    enough.
    """
    scratch = difference.expm1()  # the one large array made here: a CPU takes long to map new memory
    grown = scratch.mul_(probs).sum(-1)
    if not bool(torch.isfinite(grown).all()):  # logits apart by more than 88: shift before the exponential
        shift = difference.amax(-1, keepdim=True)
        log_ratio = scratch.copy_(difference).sub_(shift).exp_().mul_(probs).sum(-1).double().log()
        log_ratio += shift[:, 0].double()
    else:
        log_ratio = grown.double().log1p()
    return log_ratio - torch.mul(probs, difference, out=scratch).sum(-1).double(), log_ratio
