"""This module searches codewords and signs of vectors, and scales of blocks, for ggml's codebook types.

Legend: V weights of a vector, E codewords, N rows, K weights of a super-block, S sub-blocks of T weights; t (V, N) the
target weights, M (V, V) the matrix of the cost e^T M e of an error e. The layout is transposed, rows last, as in
quantizers.formats.grids.
"""

import torch
from torch import Tensor

from bitgenome.common.devices import chunk_bytes
from quantizers.formats.codebooks import SIGN_GROUP, CodebookGrid
from quantizers.formats.grids import nearest_fp16, safe_inverse

CHUNK_BYTES = 1 << 20  # of the scores (rows x codewords) at a time on a CPU
STRIPES = 16  # argmin takes two steps, by stripes, as both vectorize
# Steps tried for a sub-block, by V, as multiples of its root mean square over the codebook's. Codebooks with V = 4 are
# finer: the steps they use vary more (outliers), and they gain more from a fine search.
STEP_TRIALS = {8: torch.logspace(-0.26, 0.23, 8).tolist(), 4: torch.logspace(-0.3, 0.35, 20).tolist()}
TINY = 1e-30


class VectorSearch:
    """A search finds the nearest codewords to vectors under one cost matrix M (V, V), symmetric positive definite."""

    def __init__(self, grid: CodebookGrid, M: Tensor):
        G = grid.codewords(M)
        V = G.shape[1]
        self.M = M
        self.codewords = G
        self._pairs = torch.triu_indices(V, V, 1, device=M.device)
        i, j = self._pairs
        products = 2 * self.M[i, j] * G[:, i] * G[:, j]
        # Table rows, one for each feature of a vector in ``best``: step * sign products, step, and signs * M t.
        self._table = torch.cat([products, (G.square() @ self.M.diagonal())[:, None], -2 * G], 1).T.contiguous()

    def solve(self, t: Tensor, step: Tensor, signs: Tensor, *, even_turns: bool) -> Tensor:
        """Return signed codewords q (V, N) that nearly minimize (t - step q)^T M (t - step q), from ``signs`` (V, N).

        t is (V, N), ``step`` (N,). All codewords are searched for the given signs. Then one sign of each vector (two
        with ``even_turns``) is flipped if that lowers the cost, and changed vectors search their codewords again.
        """
        q = signs * self.codewords[self.best(t, step, signs)].T
        turned = self._turn(t, step, q, even_turns)
        if never_waits(t.device):
            signs = turned.sign()
            return signs * self.codewords[self.best(t, step, signs)].T
        changed = (turned != q).any(0)
        if changed.any():
            some = changed.nonzero()[:, 0]
            signs = turned[:, some].sign()
            q[:, some] = signs * self.codewords[self.best(t[:, some], step[some], signs)].T
        return q

    def _turn(self, t: Tensor, step: Tensor, q: Tensor, even: bool) -> Tensor:
        """Return q (V, N) with the one sign (two with ``even``) flipped that lowers the cost most, where any does."""
        value = q * step
        change = 4 * value * (self.M @ (t - value) + value * self.M.diagonal()[:, None])
        if not even:
            best, which = change.min(0, keepdim=True)
            turn = torch.zeros_like(q).scatter(0, which, 2 * (best < 0).to(q.dtype))
            return q - turn * q
        i, j = self._pairs
        best, pair = (change[i] + change[j] + 8 * self.M[i, j][:, None] * value[i] * value[j]).min(0, keepdim=True)
        amount = 2 * (best < 0).to(q.dtype)
        turn = torch.zeros_like(q).scatter(0, i[pair], amount).scatter_add(0, j[pair], amount)
        return q - turn * q

    def best(self, t: Tensor, step: Tensor, signs: Tensor) -> Tensor:
        """Return the index (N,) of the codeword g of least (t - step s g)^T M (t - step s g), for signs s (V, N)."""
        i, j = self._pairs
        found = torch.empty(t.shape[1], dtype=torch.long, device=t.device)
        rows = chunk_rows(self.codewords)
        step = torch.where(step == 0, TINY, step).abs()  # dividing by the step keeps the order
        features = torch.cat([step * signs[i] * signs[j], step[None], signs * (self.M @ t)]).T.contiguous()
        for start in range(0, len(found), rows):
            scores = features[start : start + rows] @ self._table
            found[start : start + rows] = argmin(scores)
        return found


def never_waits(device: torch.device) -> bool:
    """Return whether nothing may ask for values, for which an accelerator is waited for; on a CPU that saves work."""
    return device.type != "cpu"


def chunk_rows(codewords: Tensor) -> int:
    """Return for how many rows scores are computed at a time, given the codewords (E, V)."""
    return max(1, chunk_bytes(codewords.device, CHUNK_BYTES) // (len(codewords) * codewords.element_size()))


def argmin(scores: Tensor) -> Tensor:
    """Return the index (N,) of the least of the scores (N, E) in each row; E must be a multiple of STRIPES."""
    striped = scores.view(len(scores), STRIPES, -1)
    stripe = striped.amin(1).argmin(1)
    column = striped.gather(2, stripe[:, None, None].expand(-1, STRIPES, 1))[:, :, 0]
    return column.argmin(1) * striped.shape[2] + stripe


def natural_signs(t: Tensor) -> Tensor:
    """Return the sign, 1 or -1, of each weight, in any shape; 1 for zero."""
    return torch.where(t < 0, -1.0, 1.0)


def even_signs(t: Tensor, weight: Tensor, odd: Tensor | None = None) -> Tensor:
    """Return signs of t (V, N) with an even number of minuses in each column, an odd one where ``odd`` (N,) is true.

    Where the number is wrong, the cheapest sign is flipped, that of the least |t| * ``weight``; ``weight`` is (V, 1).
    """
    signs = natural_signs(t)
    wrong = (signs < 0).sum(0) % 2 == 1
    if odd is not None:
        wrong = wrong != odd
    cheapest = (t.abs() * weight).argmin(0, keepdim=True)
    turned = signs.scatter(0, cheapest, -signs.gather(0, cheapest))
    return torch.where(wrong, turned, signs)


def fit_steps(grid: CodebookGrid, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return d (N,), fp16 values, and codes (S, N) for the weights x (K, N) of one super-block with importance w (K,).

    The step of each sub-block is searched on its own: the best of STEP_TRIALS, each with its best codewords, then the
    closed-form step for the winner's codewords. d and codes of the whole block follow, as in ggml, but chosen by error
    among several d.
    """
    K, N = x.shape
    S = K // grid.width
    magnitudes = _magnitudes(grid, x, w)
    weight = w.view(S, -1, grid.vector)
    m = magnitudes.view(S, -1, grid.vector, N)
    G = grid.codewords(x)
    steps, curvature = x.new_empty(2, S, N)
    for s in range(S):
        steps[s], curvature[s] = _fit_sub_block(G, m[s], weight[s])
    return _snap(grid, steps, curvature)


def _magnitudes(grid: CodebookGrid, x: Tensor, w: Tensor) -> Tensor:
    """Return |x|, (K, N), negated where the sign that will be stored differs from the sign of x."""
    if not grid.even_signs:
        return x.abs()
    groups = x.view(-1, SIGN_GROUP, x.shape[1])
    weights = w.view(-1, SIGN_GROUP, 1)
    return torch.cat([t * even_signs(t, v) for t, v in zip(groups, weights, strict=True)]).view_as(x)


def _fit_sub_block(G: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step (N,) and sum(w q^2) (N,) for magnitudes m (vectors, V, N) and weights w (vectors, V)."""
    vectors, V, N = m.shape
    total = (w[:, :, None] * m.square()).sum((0, 1))
    typical = (total / w.sum() / G.square().mean()).sqrt()
    best_gain = torch.full_like(typical, -torch.inf)
    best_step = torch.zeros_like(typical)
    tables = [torch.cat([2 * G * v, (G.square() @ v)[:, None]], 1).T.contiguous() for v in w]
    rows = chunk_rows(G)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        for trial in STEP_TRIALS[V]:
            step = typical[part] * trial
            gain = torch.zeros_like(step)
            for v in range(vectors):
                features = torch.cat([m[v, :, part], -step[None]]).T
                gain += (features @ tables[v]).amax(1)
            gain *= step
            better = gain > best_gain[part]
            best_gain[part] = torch.where(better, gain, best_gain[part])
            best_step[part] = torch.where(better, step, best_step[part])
    return _closed_form(G, m, w, tables, best_step)


def _closed_form(G: Tensor, m: Tensor, w: Tensor, tables: list[Tensor], step: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-squares step (N,) for the best codewords at ``step`` (N,), and their sum(w q^2) (N,)."""
    projection, square = torch.zeros_like(step), torch.zeros_like(step)
    rows = chunk_rows(G)
    for start in range(0, len(step), rows):
        part = slice(start, start + rows)
        for v, table in enumerate(tables):
            features = torch.cat([m[v, :, part], -step[None, part]]).T
            q = G[argmin(-(features @ table))].T
            projection[part] += (w[v][:, None] * m[v, :, part] * q).sum(0)
            square[part] += (w[v][:, None] * q.square()).sum(0)
    return (projection * safe_inverse(square)).clamp_(min=0), square


def _snap(grid: CodebookGrid, steps: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return d (N,) and codes (S, N) with the least sum(curvature (step - d code)^2), of several candidates."""
    largest = steps.amax(0)
    best = torch.full_like(largest, torch.inf)
    best_d, best_codes = torch.zeros_like(largest), torch.full_like(steps, grid.unit)
    for top in range(17, 32, 2):  # code of the largest step
        for nudge in (0.98, 1.0, 1.02):
            d = nearest_fp16(largest * (nudge / (top * grid.unit)))
            codes = grid.nearest_code(steps * safe_inverse(d))
            weight = curvature * codes
            d = nearest_fp16((weight * steps).sum(0) * safe_inverse((weight * codes).sum(0)))
            codes = grid.nearest_code(steps * safe_inverse(d))
            error = (curvature * (steps - d * codes).square()).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            best_d = torch.where(better, d, best_d)
            best_codes = torch.where(better, codes, best_codes)
    return best_d, best_codes
