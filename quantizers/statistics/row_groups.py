"""This module measures a Hessian for each group of rows of a head or a lookup table, of the model's loss.

A row v of a head moves one logit, and the KL of the model by dW_v E[p_v (1 - p_v) h h^T] dW_v^T / 2, h being the final
hidden state and p_v the token's probability: so each row has a Hessian of its own, of the contexts in which its token
is likely. A row of a lookup table moves what its token feeds into the model: dW_v E_v[g g^T] dW_v^T / 2 over the
positions of the token, g being the gradient of a sampled label's log-likelihood. Both are blocks on the diagonal of the
Fisher information (Martens 2020, arXiv 1412.1193), and of a tied matrix they add up. A Hessian for each row takes too
much memory and more text than there is: rows that point the same way share one, as output channels do in GuidedQuant
(Kim et al. 2025, arXiv 2505.07004).

Measured on the embedded model with only its tied embedding quantized, KL on 8,192 tokens at Q3_K and Q4_K: .0218 and
.00505 under the Hessian of h plus a multiple of the identity; .0194 and .00464 under one sum of both; .0175 and .0042
in 32 groups, .0168 and .0041 in 128. Clusters of rows weighted by the root of their tokens' counts beat clusters
without weights (.0178, .0043), and parts of equal size (.0186, .0046). SmolLM2, Q4_0, 4,096 tokens: .0157, .0145, .0143
in 32 groups, .0134 in 128. Legend: V rows, D columns, G groups, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_GROUPS = 128
ROWS_OF_GROUP = 128  # on average, at least
GROUPS_BYTES = 1 << 30  # of all Hessians of a tensor, float32
# Positions, in columns, as if so many of the mean over all rows had been seen with each group's own. Embedded model, 32
# groups, Q3_K and Q4_K: .01757 and .00436 at 0.3, .01750 and .00431 at 1, .01751 and .00418 at 3. SmolLM2, 128 groups,
# Q4_0: .01390 at 1, .01336 at 3.
SHRINKAGE = 3.0
LEAST_MASS = 1e-6  # of a group whose tokens are not in the text, relative to the mean


@dataclass(frozen=True)
class RowHessians:
    """Holds the Hessians (G, D, D) of groups of rows; ``labels`` (V,) are the rows' groups."""

    labels: Tensor
    hessians: Tensor


class RowSums:
    """Sums w x x^T for each group of rows; ``labels`` (V,) are the rows' groups, all of which have rows."""

    def __init__(self, labels: Tensor, columns: int):
        self.labels = labels
        groups = int(labels.max()) + 1
        self.sums = torch.zeros(groups, columns, columns, device=labels.device)
        self.weights, self.squares = torch.zeros(2, groups, dtype=torch.float64, device=labels.device)

    def add_outputs(self, x: Tensor, row_weights: Tensor) -> None:
        """Add inputs x (P, D) of a head, with the weight ``row_weights`` (P, V) in the Hessian of each row."""
        w = row_weights.new_zeros(len(x), len(self.sums)).index_add_(1, self.labels, row_weights)
        for total, mine in zip(self.sums, w.T, strict=True):
            total.addmm_((x * mine[:, None]).T, x)
        self.weights += w.sum(0)
        self.squares += w.square().sum(0)

    def add_rows(self, rows: Tensor, scores: Tensor) -> None:
        """Add the gradients ``scores`` (P, D) at what the rows (P,) gave."""
        of_position = self.labels[rows]
        for group, total in enumerate(self.sums):
            mine = scores[of_position == group]
            total.addmm_(mine.T, mine)
        counts = torch.bincount(of_position, minlength=len(self.sums))
        self.weights += counts
        self.squares += counts

    def tensors(self) -> dict[str, Tensor]:
        """Return what ``of`` takes."""
        return {"labels": self.labels, "sums": self.sums, "weights": self.weights, "squares": self.squares}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "RowSums":
        """Return the sums that hold ``tensors``."""
        found = cls(tensors["labels"], tensors["sums"].shape[-1])
        found.sums, found.weights, found.squares = tensors["sums"], tensors["weights"], tensors["squares"]
        return found


def number_of_groups(rows: int, columns: int) -> int:
    """Return into how many groups the rows of a tensor are divided."""
    return max(1, min(MOST_GROUPS, rows // ROWS_OF_GROUP, GROUPS_BYTES // (torch.float32.itemsize * columns**2)))


def row_entries(rows: int, columns: int) -> int:
    """Return the number of entries of the Hessians of a tensor's groups of rows."""
    return number_of_groups(rows, columns) * columns**2


def row_hessians(parts: Sequence[RowSums]) -> RowHessians | None:
    """Return the Hessians that the sums of all ``parts``, of the same groups, make; None if all are zero.

    Each leans on the mean over all rows, the more the less was seen of it. Its scale is that of one row.
    """
    labels = parts[0].labels
    sums = torch.stack([part.sums for part in parts]).sum(0)
    sums /= 2
    sums += sums.mT.clone()
    mass = sums.diagonal(dim1=1, dim2=2).sum(-1)
    total = mass.sum()
    if not total > 0:
        return None
    mean = sums.sum(0) / total
    seen = sum((part.weights.square() / part.squares.clamp(min=1e-300) for part in parts), torch.zeros_like(mass))
    prior = SHRINKAGE * sums.shape[-1]
    lean = (prior / (seen + prior)).float()[:, None, None]
    own = sums / mass.clamp(min=1e-30)[:, None, None]
    of_row = mass / torch.bincount(labels)
    of_row = of_row.clamp(min=LEAST_MASS * float(total) / len(labels))[:, None, None]
    return RowHessians(labels, (own * (1 - lean) + mean * lean) * of_row)
