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

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import one_hot

MOST_GROUPS = 128
ROWS_OF_GROUP = 128  # on average, at least
GROUPS_BYTES = 1 << 30  # of all Hessians of a tensor, float32
# Positions, in columns, as if so many of the mean over all rows had been seen with each group's own. Embedded model, 32
# groups, Q3_K and Q4_K: .01757 and .00436 at 0.3, .01750 and .00431 at 1, .01751 and .00418 at 3. SmolLM2, 128 groups,
# Q4_0: .01390 at 1, .01336 at 3.
SHRINKAGE = 3.0
# Of the identity, relative to the mean diagonal: rows keep to themselves where the text says nothing. KL at Q3_K and
# Q4_K: .01734 and .00414 at 0, .01696 and .00409 at 0.1, .01718 and .00416 at 0.3, .01891 and .00444 at 1.
IDENTITY = 0.1
TOGETHER = 2048  # positions whose inputs are multiplied together
LEAST_MASS = 1e-6  # of a group whose tokens are not in the text, relative to the mean


@dataclass
class RowSums:
    """Sums w x x^T for each group of rows, all of which have rows, and in how many positions it was seen.

    A group whose tokens are likely in few of them has seen little: (sum w)^2 / sum w^2 positions.
    """

    labels: Tensor  # int64 (V,), the groups of the rows
    sums: Tensor  # float32 (G, D, D)
    seen: Tensor  # float64 (G,)

    @classmethod
    def empty(cls, labels: Tensor, columns: int) -> "RowSums":
        """Return sums of nothing."""
        groups = int(labels.max()) + 1
        seen = torch.zeros(groups, dtype=torch.float64, device=labels.device)
        return cls(labels, torch.zeros(groups, columns, columns, device=labels.device), seen)

    def add(self, other: "RowSums") -> None:
        """Add what another use of the same rows has summed. Raises ValueError for other groups."""
        if not torch.equal(self.labels, other.labels):
            raise ValueError("expected sums of the same groups of rows")
        self.sums += other.sums
        self.seen += other.seen

    @property
    def any(self) -> bool:
        """Whether anything was seen. Raises ValueError for sums that are not finite."""
        mass = float(self._masses().sum())
        if not isfinite(mass):
            raise ValueError("the Hessians of rows hold non-finite values: check the gradients of the calibration text")
        return mass > 0

    def hessians(self) -> Iterator[Tensor]:
        """Yield the Hessian (D, D) of each group, which leans on the mean over all rows, the more the less was seen.

        Its scale is that of one row. Raises ValueError where nothing was seen of any group, and as ``any``.
        """
        if not self.any:
            raise ValueError("the Hessians of rows have seen nothing")
        columns, masses = self.sums.shape[-1], self._masses()
        total, sizes = float(masses.sum()), torch.bincount(self.labels)
        mean = _symmetric(self.sums.sum(0)) / total
        for group, (mass, seen) in enumerate(zip(masses.tolist(), self.seen.tolist(), strict=True)):
            prior = SHRINKAGE * columns
            lean = prior / (seen + prior)
            found = mean * lean
            if mass > 0:
                found += _symmetric(self.sums[group]) / mass * (1 - lean)
            found.diagonal().add_(IDENTITY / columns)  # its trace was 1
            yield found * max(mass / int(sizes[group]), LEAST_MASS * total / len(self.labels))

    def _masses(self) -> Tensor:
        """Return the traces (G,) of the sums."""
        return self.sums.diagonal(dim1=1, dim2=2).sum(-1)


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.T) / 2


class RowAccumulator:
    """Adds up a RowSums, use by use."""

    def __init__(self, labels: Tensor, columns: int):
        self._sums = RowSums.empty(labels, columns)
        self._weights, self._squares = torch.zeros(2, len(self._sums.sums), dtype=torch.float64, device=labels.device)
        self._members = one_hot(labels).float()
        self._waiting: list[tuple[Tensor, Tensor]] = []  # inputs and their weights by group

    def add_outputs(self, x: Tensor, row_weights: Tensor) -> None:
        """Add inputs x (P, D) of a head, with the weight ``row_weights`` (P, V) in the Hessian of each row."""
        w = row_weights @ self._members  # not index_add, whose sums a GPU takes in any order
        self._weights += w.sum(0)
        self._squares += w.square().sum(0)
        self._waiting.append((x, w))
        if sum(len(inputs) for inputs, _ in self._waiting) >= TOGETHER:
            self._multiply()

    def add_rows(self, rows: Tensor, scores: Tensor) -> None:
        """Add the gradients ``scores`` (P, D) at what the rows (P,) gave."""
        of_position = self._sums.labels[rows]
        for group, total in enumerate(self._sums.sums):
            mine = scores[of_position == group]
            total.addmm_(mine.T, mine)
        counts = torch.bincount(of_position, minlength=len(self._weights))
        self._weights += counts
        self._squares += counts

    def _multiply(self) -> None:
        """Add the inputs that wait: each product reads and writes all sums, so few positions go together with many."""
        if not self._waiting:
            return
        x, weights = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        for total, mine in zip(self._sums.sums, weights.T, strict=True):
            total.addmm_((x * mine[:, None]).T, x)

    def result(self) -> RowSums:
        """Return the sums."""
        self._multiply()
        self._sums.seen = self._weights.square() / self._squares.clamp(min=1e-300)
        return self._sums


def number_of_groups(rows: int, columns: int) -> int:
    """Return into how many groups the rows of a tensor are divided."""
    return max(1, min(MOST_GROUPS, rows // ROWS_OF_GROUP, GROUPS_BYTES // (torch.float32.itemsize * columns**2)))


def row_entries(rows: int, columns: int) -> int:
    """Return the number of entries of the Hessians of a tensor's groups of rows."""
    return number_of_groups(rows, columns) * columns**2
