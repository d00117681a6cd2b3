"""What a quantized model loses against the full-precision one, over every position and the whole vocabulary.

Shapes: P positions, D hidden size, V vocabulary. Logits exist for one chunk of positions at a time.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evaluators.head import Head

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
    def from_json(cls, record: Mapping[str, Any]) -> "Divergence":
        return cls(**{**record, "window_kl": tuple(record.get("window_kl", ()))})


def chunk_positions(head: Head) -> int:
    """Positions of one chunk whose logits stay small."""
    return max(MIN_CHUNK, CHUNK_LOGITS // len(head.weight))


class _Chunk(NamedTuple):
    """Full-precision ``logits`` and ``probs`` (P, V) of some positions, and the normalizing ``log_sum`` (P,)."""

    logits: Tensor
    probs: Tensor
    log_sum: Tensor


class Reference:
    """Final hidden states (P, D) and head of the full-precision model, and the token that follows each position.

    ``targets`` (P,) holds -1 where nothing follows.
    """

    def __init__(self, hidden: Tensor, head: Head, ids: Tensor):
        self.hidden = hidden.flatten(0, 1)
        self.head = head
        self.targets = torch.full_like(ids, -1)
        self.targets[:, :-1] = ids[:, 1:]
        self.targets = self.targets.flatten().to(hidden.device)
        self._step = chunk_positions(head)
        cached = 2 * len(self.hidden) * len(head.weight) * head.weight.element_size() <= CACHE_BYTES
        self._cache = list(self._compute()) if cached else None

    @torch.inference_mode()
    def _compute(self) -> Iterator[_Chunk]:
        for hidden in self.hidden.split(self._step):
            logits = self.head(hidden)
            log_sum = logits.logsumexp(-1)
            yield _Chunk(logits, (logits - log_sum[:, None]).exp_(), log_sum)

    @torch.inference_mode()
    def compare(self, hidden: Tensor, head: Head) -> Divergence:
        """Divergence of a model with final ``hidden`` states (B, T, D) and ``head`` from this reference.

        Raises FloatingPointError if the candidate's logits are not finite.
        """
        mse = loss = torch.zeros((), dtype=torch.float64, device=self.hidden.device)
        kls = []
        rows = hidden.flatten(0, 1).split(self._step)
        for chunk, row, target in zip(
            self._cache or self._compute(), rows, self.targets.split(self._step), strict=True
        ):
            logits = head(row)
            followed = (target >= 0).nonzero()[:, 0]
            target_logits = logits[followed, target[followed]].double()
            difference = logits.sub_(chunk.logits)
            mse = mse + difference.flatten().dot(difference.flatten()).double()
            chunk_kl, log_ratio = kl_of_differences(chunk.probs, difference)
            kls.append(chunk_kl)
            loss = loss - (target_logits - (chunk.log_sum.double() + log_ratio)[followed]).sum()
        window_kl = torch.cat(kls).reshape(hidden.shape[:2]).mean(-1)
        if not bool(window_kl.isfinite().all()):
            raise FloatingPointError("the quantized model's logits are not finite")
        positions = len(self.hidden)
        return Divergence(
            float(window_kl.mean()),
            float(mse) / positions / len(self.head.weight),
            math.exp(float(loss) / int((self.targets >= 0).sum())),
            tuple(window_kl.tolist()),
        )


def kl_of_differences(probs: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P || Q) and log(sum exp q) - log(sum exp p), each (P,) float64, from ``probs`` of P and logits q - p (P, V).

    With d = q - p and Z the sums of exponentials: log(Zq / Zp) = log E[exp d] and KL = log E[exp d] - E[d],
    expectations under P. Written with expm1 and log1p, nothing cancels where the two models are close, and float32 is
    enough.
    """
    grown = row_dots(probs, difference.expm1())
    if not bool(torch.isfinite(grown).all()):  # logits apart by more than 88: shift before the exponential
        shift = difference.amax(-1, keepdim=True)
        log_ratio = row_dots(probs, (difference - shift).exp()).double().log() + shift[:, 0].double()
    else:
        log_ratio = grown.double().log1p()
    return log_ratio - row_dots(probs, difference).double(), log_ratio


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """(P, V), (P, V) -> (P,) without the product in memory."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
