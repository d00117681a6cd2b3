"""This module rounds weights to codebook types with OBS compensation, a vector of columns at a time.

GPTQ (Frantar et al. 2022) rounds column j by |w - q| and spreads (w - q) / U_jj * U_j,rest over later columns. For a
vector of columns v, the same elimination gives the error e the cost |U_vv^-T e|^2, which decides the codeword, and
spreads U_v,rest^T (U_vv^-T e), as GPTVQ (van Baalen et al. 2024) does with learned codebooks. Scales are fitted to the
compensated weights at the start of each super-block, and frozen.

Legend: W, U as in quantizers.rounding.sparsegpt; V weights of a vector, N rows; M = U_vv^-1 U_vv^-T.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bitgenome.common.replay import replayed
from quantizers.formats.codebooks import SIGN_GROUP, CodebookGrid
from quantizers.formats.grids import Scales
from quantizers.formats.table import SUPER_BLOCK
from quantizers.rounding.codebook_search import VectorSearch, even_signs, fit_steps, natural_signs, never_waits
from quantizers.rounding.coordinate_descent import Block


def codebook_loop(grid: CodebookGrid, W: Tensor, importance: Tensor, U: Tensor | None = None) -> tuple[Scales, Tensor]:
    """Return scales and signed codewords int8 (columns, N) for W (columns, N), which is overwritten if U is given.

    Scales are fitted under ``importance`` (columns,). Codewords are chosen under U (columns, columns); without U they
    are chosen under ``importance`` as well, and no error is spread: plain rounding.
    """
    columns, N = W.shape
    integers = torch.empty(columns, N, dtype=torch.int8, device=W.device)
    scales = []
    for start in range(0, columns, SUPER_BLOCK):
        block = slice(start, start + SUPER_BLOCK)
        own = () if U is None else (U[block, block],)
        d, codes, integers[block], *errors = replayed(_round_super_block, (grid,), (W[block], importance[block], *own))
        scale = codes.clone()[None, :, None]
        scales.append(Scales(d.clone()[None, None, None], torch.zeros_like(d)[None, None, None], scale, 0 * scale))
        if U is not None:
            W[block.stop :] -= U[block, block.stop :].to(W.dtype).T @ errors[0]
    return Scales.concatenate(scales, 0), integers


def _round_super_block(grid: CodebookGrid, W: Tensor, importance: Tensor, U: Tensor | None = None) -> list[Tensor]:
    """Return d (N,), codes (S, N) and signed codewords int8 (K, N) of one super-block W (K, N); with U the errors too.

    U is (K, K); W is then overwritten.
    """
    d, codes = fit_steps(grid, W, importance)
    integers, errors = torch.empty_like(W, dtype=torch.int8), torch.empty_like(W)
    spread = None if U is None else U.to(W.dtype)
    for first, whiten in zip(range(0, len(W), grid.vector), _whiten(grid, importance, U), strict=True):
        vector, later = slice(first, first + grid.vector), slice(first + grid.vector, None)
        search = VectorSearch(grid, (whiten.T @ whiten).to(W.dtype))
        step = d * codes[first // grid.width]
        signs = _signs(grid, W, integers, search.M, first)
        q = search.solve(W[vector], step, signs, even_turns=grid.even_signs)
        integers[vector] = q.to(torch.int8)
        if spread is not None:
            errors[vector] = whiten.to(W.dtype) @ (W[vector] - q * step)
            W[later] -= spread[vector, later].T @ errors[vector]
    return [d, codes, integers] if U is None else [d, codes, integers, errors]


def _whiten(grid: CodebookGrid, importance: Tensor, U: Tensor | None) -> Iterator[Tensor]:
    """Yield for each vector the matrix (V, V) that maps its error to one whose squared length is the cost.

    ``importance`` is (K,), U (K, K).
    """
    if U is None:
        yield from map(torch.diag, importance.sqrt().view(-1, grid.vector))
    else:
        yield from (inverse.T for inverse in _inverses(_diagonal(U, grid.vector).double()))


def _diagonal(M: Tensor, V: int) -> Tensor:
    """Return the blocks (V, V) on the diagonal of M (K, K), (K / V, V, V)."""
    return M.view(len(M) // V, V, -1, V).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _inverses(M: Tensor) -> Tensor:
    """Return the inverses of M (n, V, V), positive definite or triangular."""
    if not never_waits(M.device):
        return torch.linalg.inv(M)
    A = M.clone()
    for k in range(M.shape[1]):  # Gauss-Jordan, in place; no pivots are needed
        pivot = A[:, k, k, None].reciprocal()
        row, column = A[:, k] * pivot, A[:, :, k].clone()
        A -= column[:, :, None] * row[:, None]
        A[:, k] = row
        A[:, :, k] = -column * pivot
        A[:, k, k] = pivot[:, 0]
    return A


def _signs(grid: CodebookGrid, W: Tensor, integers: Tensor, M: Tensor, first: int) -> Tensor:
    """Return initial signs (V, N) for the vector at column ``first``, such that each SIGN_GROUP can have its parity."""
    t = W[first : first + grid.vector]
    if not grid.even_signs:
        return natural_signs(t)
    group = first - first % SIGN_GROUP
    if grid.vector == SIGN_GROUP:
        return even_signs(t, M.diagonal()[:, None])
    if first == group:  # the cheapest sign to turn may be in either half of the group
        both = W[group : group + SIGN_GROUP]
        return even_signs(both, torch.ones_like(both[:, :1]))[: grid.vector]
    odd = (integers[group:first] < 0).sum(0) % 2 == 1
    return even_signs(t, M.diagonal()[:, None], odd)


class VectorBlock(Block):
    """A VectorBlock runs coordinate descent with a vector of weights at a time, moved to the best codeword under H."""

    grid: CodebookGrid

    def adjust_integers(self, kept: Tensor | None) -> None:
        """Update the codewords vector by vector, where that lowers the error; ``kept`` must be None."""
        assert kept is None, "no codeword holds a zero, so nothing can be pruned"
        V = self.grid.vector
        inverses = _inverses(_diagonal(self.H, V).double()) if never_waits(self.H.device) else None
        for first in range(0, len(self.q), V):
            vector = slice(first, first + V)
            q, step = self.q[vector], self.d * self.scale[first // self.grid.width]
            search = VectorSearch(self.grid, self.H[vector, vector])
            G = self.G[vector].double()
            if inverses is None:
                wanted = torch.linalg.solve(self.H[vector, vector].double(), G).to(q.dtype)
            else:
                wanted = (inverses[first // V] @ G).to(q.dtype)
            signs = self._signs(q * step + wanted, search.M, first)
            new = search.solve(q * step + wanted, step, signs, even_turns=self.grid.even_signs)
            change = (new - q) * step
            gain = (change * (2 * self.G[vector] - search.M @ change)).sum(0)
            change = torch.where(gain > 0, change, 0.0)
            q.copy_(torch.where(gain > 0, new, q))
            self.move(vector, change)

    def _signs(self, t: Tensor, M: Tensor, first: int) -> Tensor:
        """Return signs (V, N) for the vector at ``first`` that keep the number of minuses in its SIGN_GROUP even."""
        if not self.grid.even_signs:
            return natural_signs(t)
        V = self.grid.vector
        group = first - first % SIGN_GROUP
        others = torch.cat([self.q[group:first], self.q[first + V : group + SIGN_GROUP]])
        odd = (others < 0).sum(0) % 2 == 1
        return even_signs(t, M.diagonal()[:, None], odd)
