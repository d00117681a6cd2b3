"""This module rounds weights to codebook types with OBS compensation, a vector of columns at a time.

GPTQ (Frantar et al. 2022) rounds column j by |w - q| and spreads (w - q) / U_jj * U_j,rest over later columns. For a
vector of columns v, the same elimination gives the error e the cost |U_vv^-T e|^2, which decides the codeword, and
spreads U_v,rest^T (U_vv^-T e), as GPTVQ (van Baalen et al. 2024) does with learned codebooks. Scales are fitted to the
compensated weights at the start of each super-block, and frozen.

Legend: W, U as in quantizers.rounding.sparsegpt; V weights of a vector, N rows; M = U_vv^-1 U_vv^-T.
"""

from typing import ClassVar

import torch
from torch import Tensor

from quantizers.formats.codebooks import SIGN_GROUP, CodebookGrid
from quantizers.formats.grids import Scales
from quantizers.formats.table import SUPER_BLOCK
from quantizers.rounding.codebook_search import VectorSearch, even_signs, fit_steps, natural_signs
from quantizers.rounding.coordinate_descent import Block


def codebook_loop(grid: CodebookGrid, W: Tensor, importance: Tensor, U: Tensor | None = None) -> tuple[Scales, Tensor]:
    """Return scales and signed codewords int8 (columns, N) for W (columns, N), which is overwritten if U is given.

    Scales are fitted under ``importance`` (columns,). Codewords are chosen under U (columns, columns); without U they
    are chosen under ``importance`` as well, and no error is spread: plain rounding.
    """
    columns, N = W.shape
    integers = torch.empty(columns, N, dtype=torch.int8, device=W.device)
    spread = None if U is None else U.to(W.dtype)
    scales = []
    for start in range(0, columns, SUPER_BLOCK):
        stop = start + SUPER_BLOCK
        d, codes = fit_steps(grid, W[start:stop], importance[start:stop])
        scale = codes[None, :, None]
        scales.append(Scales(d[None, None, None], torch.zeros_like(d)[None, None, None], scale, 0 * scale))
        errors = torch.empty_like(W[start:stop])
        for first in range(start, stop, grid.vector):
            vector = slice(first, first + grid.vector)
            whiten = _whiten(importance, U, vector)
            search = VectorSearch(grid, (whiten.T @ whiten).to(W.dtype))
            step = d * codes[(first - start) // grid.width]
            signs = _signs(grid, W, integers, search.M, first)
            q = search.solve(W[vector], step, signs, even_turns=grid.even_signs)
            integers[vector] = q.to(torch.int8)
            if spread is not None:
                error = whiten.to(W.dtype) @ (W[vector] - q * step)
                errors[first - start : first - start + grid.vector] = error
                W[first + grid.vector : stop] -= spread[vector, first + grid.vector : stop].T @ error
        if spread is not None:
            W[stop:] -= spread[start:stop, stop:].T @ errors
    return Scales.concatenate(scales, 0), integers


def _whiten(importance: Tensor, U: Tensor | None, vector: slice) -> Tensor:
    """Return the matrix (V, V) that maps an error of the vector's columns to one whose squared length is its cost."""
    if U is None:
        return torch.diag(importance[vector].sqrt())
    return torch.linalg.inv(U[vector, vector].double()).T


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

    waits: ClassVar[bool] = True
    grid: CodebookGrid

    def adjust_integers(self, kept: Tensor | None) -> None:
        """Update the codewords vector by vector, where that lowers the error; ``kept`` must be None."""
        assert kept is None, "no codeword holds a zero, so nothing can be pruned"
        V = self.grid.vector
        for first in range(0, len(self.q), V):
            vector = slice(first, first + V)
            q, step = self.q[vector], self.d * self.scale[first // self.grid.width]
            search = VectorSearch(self.grid, self.H[vector, vector])
            wanted = torch.linalg.solve(self.H[vector, vector].double(), self.G[vector].double()).to(q.dtype)
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
        others = torch.ones(SIGN_GROUP, dtype=torch.bool, device=t.device)
        others[first - group : first - group + V] = False
        odd = (self.q[group : group + SIGN_GROUP][others] < 0).sum(0) % 2 == 1
        return even_signs(t, M.diagonal()[:, None], odd)
