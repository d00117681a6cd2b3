"""Codebook types: codewords and signs against brute force, compensation against elimination, bytes against ggml's."""

import itertools

import pytest
import torch
from torch import Tensor

from quantizers.formats.codebook_packing import pack_codebook, unpack_codebook
from quantizers.formats.codebooks import CODEBOOK_GRIDS, CodebookGrid
from quantizers.formats.grids import Scales
from quantizers.formats.table import FORMATS
from quantizers.rounding.codebook_loop import VectorBlock, codebook_loop
from quantizers.rounding.codebook_search import VectorSearch, even_signs, fit_steps, natural_signs
from quantizers.rounding.codes import Codes
from quantizers.rounding.coordinate_descent import Start, descend
from quantizers.rounding.nearest import normalized_importance
from quantizers.rounding.row_choice import row_errors
from quantizers.rounding.sparsegpt import compensate
from quantizers.statistics.hessian import damped, inverse_factor
from tests import ggml_reference
from tests.quantizers.weights import correlated_hessian, heavy_tailed

all_codebooks = pytest.mark.parametrize("grid", CODEBOOK_GRIDS.values(), ids=lambda g: g.format.name)
COLUMNS, ROWS = 512, 32


def decoded(grid: CodebookGrid, scales: Scales, integers: Tensor) -> Tensor:
    return (grid.blocks(integers.to(scales.d.dtype)) * scales.step).view_as(integers)


def metric(V: int) -> Tensor:
    return correlated_hessian(4 * V)[:V, :V].double()


def cost(t: Tensor, value: Tensor, M: Tensor) -> Tensor:
    return ((t - value) * (M @ (t - value))).sum(0)


@all_codebooks
def test_codewords_are_the_best_of_all_for_given_signs(grid: CodebookGrid) -> None:
    t, M = heavy_tailed(grid.vector, 50).double(), metric(grid.vector)
    G = grid.codewords(t)
    step = torch.linspace(0.5, 2, 50, dtype=torch.float64) * float(t.std() / G.std())
    signs = natural_signs(t).double()
    costs = torch.stack([cost(t, signs * g[:, None] * step, M) for g in G])
    found = VectorSearch(grid, M.float()).best(t.float(), step.float(), signs.float())
    assert torch.allclose(costs[found, torch.arange(50)], costs.amin(0), rtol=1e-5)


def test_signs_and_codewords_together_are_nearly_the_best_of_all() -> None:
    grid = CODEBOOK_GRIDS["IQ3_S"]
    t, M = heavy_tailed(4, 200).double(), metric(4)
    G = grid.codewords(t)
    step = torch.full((200,), float(t.std() / G.std()), dtype=torch.float64)
    every_sign = [torch.tensor(s, dtype=torch.float64)[:, None] for s in itertools.product((1, -1), repeat=4)]
    best = torch.stack([cost(t, s * g[:, None] * step, M) for s in every_sign for g in G]).amin(0)
    q = VectorSearch(grid, M.float()).solve(t.float(), step.float(), natural_signs(t.float()), even_turns=False)
    ours = cost(t, q.double() * step, M)
    assert (ours < best * (1 + 1e-4)).float().mean() > 0.9
    assert ours.sum() < 1.02 * best.sum()


def test_even_signs_turn_the_cheapest_weight() -> None:
    t = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0], [0.1, 0.2, -0.3], [7.0, 8.0, 9.0]])
    assert even_signs(t, torch.ones(4, 1)).tolist() == [[1, -1, 1], [-1, 1, -1], [-1, -1, -1], [1, 1, 1]]
    odd = torch.tensor([True, True, False])
    assert even_signs(t, torch.ones(4, 1), odd).tolist() == [[1, -1, 1], [-1, 1, -1], [1, 1, -1], [1, 1, 1]]


@all_codebooks
def test_loop_and_descent_store_only_what_the_format_can(grid: CodebookGrid) -> None:
    """Bytes decode to exactly the weights that were optimized: codewords, parities of signs, scales."""
    W, H = heavy_tailed(ROWS, COLUMNS).T.contiguous(), correlated_hessian(COLUMNS)
    U, taken = inverse_factor(H, 0.01)
    start = Codes(*codebook_loop(grid, W.clone(), torch.ones(COLUMNS), U))
    refined = descend(Start(grid, W, start, VectorBlock), damped(H, taken).float(), 2)
    for codes in (start, refined):
        data = codes.packed(grid)
        assert torch.equal(unpack_codebook(grid, data).view(ROWS, -1), decoded(grid, codes.scales, codes.integers).T)
        assert ggml_reference.is_valid(grid.format, data)


@all_codebooks
def test_loop_follows_elimination_in_float64(grid: CodebookGrid) -> None:
    """Block Gaussian elimination of the inverse Hessian, as in brute-force optimal brain quantization."""
    W, H = heavy_tailed(ROWS, COLUMNS).double(), correlated_hessian(COLUMNS)
    regular = damped(H, 0.01)
    importance = normalized_importance(torch.diag(regular).float(), COLUMNS, W.device).double()
    inverse, met, V = torch.linalg.inv(regular), W.clone(), grid.vector
    scales, integers = codebook_loop(grid, W.T.clone(), importance, inverse_factor(H, 0.01)[0])
    Q = decoded(grid, scales, integers.double()).T
    better_elsewhere = 0
    for j in range(0, COLUMNS, V):
        v, rest = slice(j, j + V), slice(j + V, None)
        if j % 256 == 0:
            d, codes = fit_steps(grid, met[:, j : j + 256].T.contiguous(), importance[j : j + 256])
            assert torch.allclose(d * codes, scales.step[j // 256, :, 0], rtol=1e-9)
        own = inverse[v, v].inverse()
        step = scales.step[j // 256, j % 256 // grid.width, 0]
        signs = Q[:, v].T.sign()
        found = signs * grid.codewords(W)[VectorSearch(grid, own).best(met[:, v].T, step, signs)].T
        ours, best = cost(met[:, v].T, Q[:, v].T, own), cost(met[:, v].T, found * step, own)
        better_elsewhere += int((best < ours * (1 - 1e-6)).sum())
        met[:, rest] -= (met[:, v] - Q[:, v]) @ own @ inverse[v, rest]
        inverse[rest, rest] -= inverse[rest, v] @ own @ inverse[v, rest]
    assert better_elsewhere == 0


@all_codebooks
def test_every_round_of_descent_lowers_the_error(grid: CodebookGrid) -> None:
    W, H = heavy_tailed(ROWS, COLUMNS).T.contiguous(), correlated_hessian(COLUMNS)
    start = Start(grid, W, Codes(*codebook_loop(grid, W.clone(), torch.ones(COLUMNS))), VectorBlock)
    found = [descend(start, H, rounds) for rounds in range(3)]
    errors = [float(row_errors((W - decoded(grid, f.scales, f.integers)).T, H).sum()) for f in found]
    assert errors[1] < 0.7 * errors[0]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"])
def test_compensation_halves_the_error_of_ggmls_encoder(name: str) -> None:
    fmt, W, H = FORMATS[name], heavy_tailed(64, COLUMNS), correlated_hessian(COLUMNS)
    theirs = ggml_reference.dequantize(fmt, ggml_reference.quantize(fmt, W, H.diagonal()))
    assert compensate({"w": W}, {"w": [fmt]}, H)["w"][name].error < 0.5 * float(row_errors(W - theirs, H).sum())


def test_magnitudes_outside_the_codebook_are_refused() -> None:
    grid = CODEBOOK_GRIDS["IQ2_XS"]
    scales, integers = codebook_loop(grid, heavy_tailed(2, 256).T.contiguous(), torch.ones(256))
    integers[3] = 8 + 25 - integers[3].abs()
    with pytest.raises(ValueError, match="magnitudes that are none"):
        pack_codebook(grid, scales, torch.where(integers == 0, 25, integers))
