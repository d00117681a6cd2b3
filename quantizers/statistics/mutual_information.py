"""This module estimates the mutual information of every pair of channels from samples of their activations.

I(x; y) = H(x) + H(y) - H(x, y), in nats; its normalized form is 2 I / (H(x) + H(y)). There are two estimates:

    histogram   channels in bins of equal count; all joint histograms are products of one-hot matrices
    gaussian    I = -1/2 log(1 - rho^2) from the correlation rho; entropies as for channels of variance 1

A joint histogram of B x B bins overestimates by about (B - 1)^2 / (2 n) for n samples (Miller 1955).

Shapes: samples X (n, C), matrices (C, C).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Estimate = Literal["histogram", "gaussian"]
DEFAULT_BINS = 8
CHUNK_CELLS = 1 << 24  # cells of joint histograms in memory at once: 64 MiB of float32 counts
STANDARD_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of a Gaussian of variance 1
LARGEST_CORRELATION = 1 - 1e-12  # of rho^2; at 1, for a channel and its copy, I would be infinite


@dataclass(frozen=True)
class PairwiseInformation:
    """Holds the mutual information of every pair of channels, float64 (C, C), and entropies, float64 (C,), in nats.

    The diagonal of ``information`` holds the entropies.
    """

    information: Tensor
    entropy: Tensor

    def normalized(self) -> Tensor:
        """Return 2 I / (H(x) + H(y)), float64 (C, C) in 0..1: 1 on the diagonal, 0 between constant channels."""
        total = self.entropy[:, None] + self.entropy
        ratio = torch.where(total > 0, 2 * self.information / total, 0.0).clamp_(0, 1)
        return ratio.fill_diagonal_(1.0)


def pairwise_information(X: Tensor, estimate: Estimate = "histogram", bins: int = DEFAULT_BINS) -> PairwiseInformation:
    """Return the mutual information of all pairs of channels of X (n, C), in nats; ``bins`` is for histograms alone.

    Raises ValueError for fewer than two samples or bins, and for values that are not finite.
    """
    if X.ndim != 2 or len(X) < 2:
        raise ValueError(f"expected samples (n, channels) with n of at least 2, found shape {tuple(X.shape)}")
    if not X.isfinite().all():
        raise ValueError(f"samples hold {int((~X.isfinite()).sum())} non-finite values of {X.numel()}")
    return _gaussian(X) if estimate == "gaussian" else _histogram(bin_codes(X, bins), bins)


def bin_codes(X: Tensor, bins: int) -> Tensor:
    """Return bin numbers int64 (n, C) of X (n, C): each channel's samples by rank, in ``bins`` bins of equal count.

    Equal values share a bin. Raises ValueError for fewer than 2 bins.
    """
    if bins < 2:
        raise ValueError(f"expected at least 2 bins, found {bins}")
    columns = X.T.contiguous()
    edges = columns.sort(1).values[:, [len(X) * i // bins for i in range(1, bins)]].contiguous()
    return torch.searchsorted(edges, columns, right=True).T


def _histogram(codes: Tensor, bins: int) -> PairwiseInformation:
    n, C = codes.shape
    one_hot = functional.one_hot(codes, bins).float().view(n, C * bins)
    table = _plogp(n, codes.device)
    entropy = -table[one_hot.sum(0).long()].view(C, bins).sum(1)
    joint = torch.zeros(C, C, dtype=torch.float64, device=codes.device)
    step = max(1, CHUNK_CELLS // (bins * bins * C))
    for start in range(0, C, step):
        stop = min(start + step, C)
        counts = one_hot[:, start * bins : stop * bins].T @ one_hot[:, start * bins :]  # whole numbers, exact
        cells = table[counts.long()].view(stop - start, bins, C - start, bins)
        joint[start:stop, start:] = -cells.sum((1, 3))
    information = (entropy[:, None] + entropy - _mirrored(joint)).clamp_(min=0)
    return PairwiseInformation(information, entropy)


def _plogp(n: int, device: torch.device) -> Tensor:
    """Return p log p, in nats, for p = 0/n, 1/n ... n/n, float64 (n + 1,)."""
    p = torch.arange(n + 1, dtype=torch.float64, device=device) / n
    return torch.xlogy(p, p)


def _gaussian(X: Tensor) -> PairwiseInformation:
    centred = X.double() - X.double().mean(0)
    norms = centred.norm(dim=0)
    scaled = torch.where(norms > 0, centred / norms, 0.0)
    square = _mirrored(scaled.T @ scaled).square_().clamp_(max=LARGEST_CORRELATION)
    information = -0.5 * torch.log1p(-square)
    entropy = torch.where(norms > 0, STANDARD_ENTROPY, 0.0)
    information.diagonal().copy_(entropy)
    return PairwiseInformation(information, entropy)


def _mirrored(upper: Tensor) -> Tensor:
    """Return an exactly symmetric matrix, from the diagonal and the part above it."""
    return torch.triu(upper) + torch.triu(upper, 1).T
