"""This module compares a quantized model's outputs with the full-precision model's.

All scored positions (``evaluators.data.windows.scored``) and the whole vocabulary count. Logits are computed for one
chunk of positions at a time. Shapes: B windows, T positions of a window, P positions, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitgenome.common.devices import chunk_bytes
from bitgenome.common.numbers import perplexity_of
from evaluators.data.windows import scored
from evaluators.model.head import Head

CHUNK_BYTES = 1 << 22  # of the logits of one chunk on a CPU, which stay in its cache
MIN_CHUNK = 64  # fewest positions of a chunk, for large vocabularies
LEAST_GROWTH = 2**-10 - 1  # of E[exp d] - 1; below it float32 has lost what log E[exp d] needs
CACHE_BYTES = 1 << 28  # for reference logits and probabilities; larger ones are recomputed chunk by chunk


@dataclass(frozen=True)
class Divergence:
    """Holds how far a candidate model is from the reference, in means over positions.

    ``kl`` is KL(reference || candidate) in nats per token, ``logit_mse`` the mean squared difference of logits,
    ``perplexity`` the candidate's own.
    """

    kl: float
    logit_mse: float
    perplexity: float
    window_kl: tuple[float, ...] = ()  # ``kl`` of each window

    @classmethod
    def of(cls, errors: Tensor) -> "Divergence":
        """Return the mean of the ``errors`` (B, 3) of windows, as Reference.errors returns them.

        Raises FloatingPointError if their KL is not finite.
        """
        kl, mse, loss = errors.mean(0).tolist()
        if not math.isfinite(kl):
            raise FloatingPointError("the quantized model's logits are not finite")
        return cls(kl, mse, perplexity_of(loss), tuple(errors[:, 0].tolist()))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Divergence":
        """Return the divergence of a JSON object with the fields' names. Raises TypeError for other names."""
        return cls(**{**record, "window_kl": tuple(record.get("window_kl", ()))})


def chunk_positions(head: Head) -> int:
    """Return the number of positions in a chunk for the vocabulary of ``head``."""
    return chunk_size(len(head.weight), head.weight.device) // len(head.weight)


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """Return the number of logits in a chunk on ``device``, a multiple of ``vocabulary``."""
    logits = chunk_bytes(device, CHUNK_BYTES) // torch.float32.itemsize
    return max(MIN_CHUNK, logits // vocabulary) * vocabulary


class _Chunk(NamedTuple):
    """Holds full-precision ``logits`` and ``probs`` (P, V) of a chunk, and their log-sum-exp ``log_sum`` (P,)."""

    logits: Tensor
    probs: Tensor
    log_sum: Tensor


class Reference:
    """Compares candidates with the full-precision model, given by its final ``hidden`` states (B, T, D) and ``head``.

    ``ids`` (B, T) are the tokens, of which the first ``unscored`` positions do not count; ``targets`` (P,) holds the
    token that follows each position that counts, -1 for a window's last. Reference logits and
    probabilities are kept if they take at most ``cache_bytes`` bytes.
    """

    def __init__(self, hidden: Tensor, head: Head, ids: Tensor, unscored: int = 0, cache_bytes: int = CACHE_BYTES):
        self.unscored = unscored
        self.hidden = scored(hidden, unscored).flatten(0, 1)
        self.targets = scored(next_tokens(ids), unscored).flatten().to(hidden.device)
        self._step = chunk_positions(head)
        cached = 2 * len(self.hidden) * len(head.weight) * head.weight.element_size() <= cache_bytes
        kept = list(self._compute(head)) if cached else None
        self._chunks = partial(self._compute, head) if kept is None else lambda: kept  # which keep no head alive

    @torch.inference_mode()
    def _compute(self, head: Head) -> Iterable[_Chunk]:
        for hidden in self.hidden.split(self._step):
            logits = head(hidden)
            log_sum = logits.logsumexp(-1)
            yield _Chunk(logits, (logits - log_sum[:, None]).exp_(), log_sum)

    def compare(self, hidden: Tensor, head: Head) -> Divergence:
        """Return the divergence of a candidate with final ``hidden`` states (B, T, D) and ``head`` from this reference.

        Raises FloatingPointError if the candidate's logits are not finite.
        """
        return Divergence.of(self.errors([hidden], head)[0])

    @torch.inference_mode()
    def errors(self, candidates: Sequence[Tensor], head: Head) -> list[Tensor]:
        """Return, for each candidate, the KL, squared logit error and cross-entropy of each window, float64 (B, 3).

        ``candidates`` are final hidden states (B, T, D) of models with one ``head``. Errors are means over the
        positions that count, KL and cross-entropy in nats; they are not finite where the candidate's logits are not.
        Reference logits are computed once for all candidates.
        """
        found = [torch.empty(3, len(self.hidden), dtype=torch.float64, device=self.hidden.device) for _ in candidates]
        rows = [scored(hidden, self.unscored).flatten(0, 1) for hidden in candidates]
        for index, chunk in enumerate(self._chunks()):
            part = slice(index * self._step, (index + 1) * self._step)
            for row, result in zip(rows, found, strict=True):
                result[:, part] = self._chunk_errors(chunk, head(row[part]), self.targets[part])
        B, T = scored(candidates[0], self.unscored).shape[:2]
        counts = torch.tensor([T, T, T - 1], dtype=torch.float64, device=self.hidden.device)  # the last has no target
        return [result.view(3, B, T).sum(-1).T / counts for result in found]

    def _chunk_errors(self, chunk: _Chunk, logits: Tensor, targets: Tensor) -> Tensor:
        """Return KL, squared error and cross-entropy (3, P) for a candidate's ``logits`` (P, V), overwriting these."""
        target_logits = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].double()
        difference = logits.sub_(chunk.logits)
        mse = torch.linalg.vector_norm(difference, dim=-1).double().square() / difference.shape[-1]
        kl, log_ratio = kl_of_differences(chunk.logits, chunk.probs, difference)
        loss = (chunk.log_sum.double() + log_ratio - target_logits) * (targets >= 0)
        return torch.stack((kl, mse, loss))


def next_tokens(ids: Tensor) -> Tensor:
    """Return the token after each position of ``ids`` (B, T), -1 for a window's last."""
    targets = torch.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    return targets


def kl_of_differences(logits: Tensor, probs: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(P || Q) in nats and log(sum exp q) - log(sum exp p), each float64 (P,).

    ``logits`` (P, V) are those p of P and ``probs`` their probabilities, ``difference`` (P, V) the logits q - p. With
    d = q - p and Z the sums of exponentials: log(Zq / Zp) = log E[exp d] and KL = log E[exp d] - E[d], expectations
    under P. With expm1 and log1p nothing cancels where the two models are close, and float32 is enough. Positions where
    logits differ by more than float32's exponential holds (88), or Q's tokens have no probability in P's float32, are
    computed again in float64.
    """
    scratch = difference.expm1()  # the only large allocation here: mapping new memory is slow on a CPU
    grown = scratch.mul_(probs).sum(-1)
    log_ratio = grown.double().log1p()
    kl = log_ratio - torch.mul(probs, difference, out=scratch).sum(-1).double()
    far = ~(torch.isfinite(grown) & (grown > LEAST_GROWTH))
    if bool(far.any()):
        for rows in far.nonzero()[:, 0].split(MIN_CHUNK):
            kl[rows], log_ratio[rows] = _kl_far_apart(logits[rows], difference[rows])
    return kl, log_ratio


def _kl_far_apart(logits: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``kl_of_differences`` does, in float64 and with logarithms of probabilities.

    A probability below e^-103 is zero in float32, and yet its token may hold all of Q.
    """
    log_p, d = logits.double().log_softmax(-1), difference.double()
    log_ratio = (log_p + d).logsumexp(-1)
    return log_ratio - (log_p.exp() * d).sum(-1), log_ratio
