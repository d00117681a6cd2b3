"""Pruning against the published algorithm in float64, brute force, and the bytes of every format."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.formats.grids import Scales
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import CODEBOOK_TYPES, FORMATS, QuantFormat
from quantizers.rounding.column_loop import Segment, column_loop
from quantizers.rounding.coordinate_descent import descend_kept
from quantizers.rounding.pruned_sparsegpt import check_prunable, encode_pruned, prune_and_compensate
from quantizers.rounding.pruning_masks import MASK_BLOCK, ColumnMasks, group_mask, prune_columns, unstructured_mask
from quantizers.rounding.row_choice import row_errors
from quantizers.rounding.sparsegpt import conditional_importance
from quantizers.rounding.zero_grids import ZERO_GRIDS, pack_with_zero, quantize_with_zero
from quantizers.settings import CompensationSettings, Sparsity
from quantizers.statistics.hessian import damped, inverse_factor
from tests import ggml_reference
from tests.quantizers.formats.test_packing import random_blocks
from tests.quantizers.rounding.sparsegpt_reference import keep_all_but, keep_all_but_n, sparsegpt
from tests.quantizers.weights import correlated_hessian, extreme_rows, heavy_tailed

BLOCK_FORMATS = [FORMATS[name] for name in ZERO_GRIDS]
HALF, TWO_OF_FOUR = Sparsity.of_fraction(0.5), Sparsity.of_pattern("2:4")
RULES = {  # the paper's B_s and mask rule of each sparsity
    HALF: (MASK_BLOCK, keep_all_but(0.5)),
    Sparsity.of_fraction(0.3): (MASK_BLOCK, keep_all_but(0.3)),
    TWO_OF_FOUR: (4, keep_all_but_n(2)),
    Sparsity.of_pattern("1:8"): (8, keep_all_but_n(1)),
}
all_block_formats = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)
both = pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=str)


def prune(W: Tensor, H: Tensor, fmt: QuantFormat, sparsity: Sparsity, **settings: Any) -> Tensor:
    """Decoded weights."""
    result = prune_and_compensate({"w": W}, {"w": [fmt]}, {"w": sparsity}, H, CompensationSettings(**settings))
    return result["w"][fmt.name].packed.dequantize()


def by_magnitude(W: Tensor, sparsity: Sparsity) -> Tensor:
    """W (rows, columns) with the smallest magnitudes of each group, or of the whole matrix, set to 0."""
    scores = W.abs().T.contiguous()
    if sparsity.group:
        return W * ~group_mask(scores, sparsity.zeros, sparsity.group).T
    return W * ~unstructured_mask(scores, sparsity.fraction).T


@pytest.mark.parametrize("sparsity", RULES, ids=str)
def test_pruning_alone_is_the_published_algorithm(sparsity: Sparsity) -> None:
    W, H = heavy_tailed(24, 320).double(), correlated_hessian(320)
    expected, expected_kept = sparsegpt(W, damped(H, 0.01), *RULES[sparsity])
    U, _ = inverse_factor(H, 0.01)
    ours = W.T.clone()
    kept = prune_columns(ours, U, conditional_importance(U, H).double(), sparsity)
    assert torch.equal(kept.T, expected_kept)
    torch.testing.assert_close(ours.T, expected, rtol=1e-9, atol=1e-12)


@all_block_formats
@pytest.mark.parametrize("sparsity", RULES, ids=str)
def test_pruning_with_quantization_is_the_published_algorithm(fmt: QuantFormat, sparsity: Sparsity) -> None:
    """On the scales that the loop froze, the reference makes the same integers of the same weights."""
    W, H, grid = heavy_tailed(16, 512).double(), correlated_hessian(512), ZERO_GRIDS[fmt.name]
    U, _ = inverse_factor(H, 0.01)
    importance = conditional_importance(U, H).double()
    stack = W.T.clone()
    masks = ColumnMasks(stack, importance, [(slice(None), sparsity)])
    segment = Segment(grid, slice(0, 16))
    integers = column_loop(stack, U, importance, [segment], masks)
    step = Scales.concatenate(segment.scales, 0).step.double()
    decoded = (grid.blocks(integers.double()) * step).view(512, 16).T
    steps = step.expand(-1, -1, grid.width, -1).reshape(512, 16)

    def rounded(j: int, w: Tensor) -> Tensor:
        s = steps[j]
        return torch.where(s == 0, 0.0, (w / s).round().clamp(grid.low, grid.high) * s)

    expected, expected_kept = sparsegpt(W, damped(H, 0.01), *RULES[sparsity], rounded)
    assert torch.equal(masks.kept.T, expected_kept)
    torch.testing.assert_close(decoded, expected, rtol=1e-9, atol=1e-12)


def test_the_score_is_what_removing_a_weight_costs() -> None:
    """Brute force: the least error with w_j = 0, earlier columns as they are and later ones free."""
    W, H = heavy_tailed(1, 6).double()[0], damped(correlated_hessian(8)[:6, :6], 0.01)
    U, _ = inverse_factor(H, 0.0)
    for j in range(6):
        later = slice(j + 1, 6)
        change = torch.zeros(6, dtype=torch.float64)
        change[j] = -W[j]
        change[later] = torch.linalg.solve(H[later, later], -H[later, j] * change[j])
        assert float(change @ H @ change) == pytest.approx(float((W[j] / U[j, j]) ** 2), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), zeros=st.integers(1, 3), fraction=st.floats(0, 0.99))
def test_masks_are_the_cheapest_of_all_choices(seed: int, zeros: int, fraction: float) -> None:
    scores = torch.rand(8, 2, generator=torch.Generator().manual_seed(seed)).double()
    count = round(fraction * 6)
    least = min(sum(choice) for choice in itertools.combinations(scores[:3].flatten().tolist(), count))
    pruned = unstructured_mask(scores[:3], fraction)
    assert int(pruned.sum()) == count
    assert float(scores[:3][pruned].sum()) == pytest.approx(least)
    for group, mask in zip(scores.unflatten(0, (2, 4)), group_mask(scores, zeros, 4).unflatten(0, (2, 4)), strict=True):
        for row, chosen in zip(group.T, mask.T, strict=True):
            assert int(chosen.sum()) == zeros
            assert float(row[chosen].sum()) == pytest.approx(min(map(sum, itertools.combinations(row.tolist(), zeros))))


def test_among_equals_the_first_go() -> None:
    assert unstructured_mask(torch.ones(4, 2), 0.5).tolist() == [[True] * 2] * 2 + [[False] * 2] * 2
    assert group_mask(torch.zeros(4, 2), 2, 4).tolist() == [[True] * 2] * 2 + [[False] * 2] * 2


@pytest.mark.parametrize("fraction", [0.5, 0.37, 0.9])
def test_the_sparsity_asked_for_is_reached_exactly(fraction: float) -> None:
    W = heavy_tailed(20, 320)
    zeros = prune(W, correlated_hessian(320), FORMATS["F16"], Sparsity.of_fraction(fraction)) == 0
    for block in zeros.split(MASK_BLOCK, 1):
        assert int(block.sum()) == round(fraction * block.numel())


@all_block_formats
@both
def test_zeros_lie_in_the_bytes_where_ggml_reads_them(fmt: QuantFormat, sparsity: Sparsity) -> None:
    W, H = heavy_tailed(16, 512), correlated_hessian(512)
    packed = prune_and_compensate({"w": W}, {"w": [fmt]}, {"w": sparsity}, H)["w"][fmt.name].packed
    zeros = ggml_reference.dequantize(fmt, packed.data) == 0
    assert ggml_reference.is_valid(fmt, packed.data)
    if sparsity.group:
        assert (zeros.unflatten(1, (-1, 4)).sum(2) >= 2).all()
    else:
        assert all(int(block.sum()) >= block.numel() // 2 for block in zeros.split(MASK_BLOCK, 1))


@all_block_formats
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_grids_with_a_zero_pack_without_loss(fmt: QuantFormat, seed: int) -> None:
    grid = ZERO_GRIDS[fmt.name]
    scales, integers = random_blocks(grid, 2, 3, seed)
    integers[1::3] = 0
    values = (grid.blocks(integers.float()) * scales.step).view(-1, 3).T
    assert torch.equal(ggml_reference.dequantize(fmt, pack_with_zero(grid, scales, integers)), values)


@all_block_formats
def test_plain_rounding_keeps_zeros_even_of_extreme_rows(fmt: QuantFormat) -> None:
    W = extreme_rows()
    W[:, ::3] = 0
    data = quantize_with_zero(fmt, W)
    assert ggml_reference.is_valid(fmt, data)
    assert not dequantize(fmt, data)[:, ::3].any()


@pytest.mark.parametrize("fmt", [*BLOCK_FORMATS, FORMATS["F16"]], ids=lambda f: f.name)
@both
def test_the_mask_rule_loses_less_than_magnitude(fmt: QuantFormat, sparsity: Sparsity) -> None:
    W, H = heavy_tailed(48, 512), correlated_hessian(512)
    ours = row_errors(W - prune(W, H, fmt, sparsity), H).sum()
    magnitude = row_errors(W - dequantize(fmt, encode_pruned(fmt, by_magnitude(W, sparsity), H.diagonal())), H).sum()
    assert ours < 0.35 * magnitude


def test_no_row_is_worse_than_the_original_weights_under_its_mask() -> None:
    """Uncorrelated inputs of very different size leave little to compensate, and damping misleads."""
    W = heavy_tailed(32, 256)
    H = torch.diag(torch.logspace(-6, 2, 256)) + 1e-3
    pruned = prune(W, H, FORMATS["F32"], HALF, damping=1.0, refinement_rounds=0)
    assert (row_errors(W - pruned, H) <= row_errors(W * (pruned == 0), H)).all()


@both
def test_without_compensation_kept_weights_stay_and_the_least_products_go(sparsity: Sparsity) -> None:
    W, H = heavy_tailed(24, 256), correlated_hessian(256)
    scores = (W.square() * damped(H, 0.01).diagonal()).T
    if sparsity.group:
        pruned = group_mask(scores, sparsity.zeros, sparsity.group)
    else:
        pruned = torch.cat([unstructured_mask(block, sparsity.fraction) for block in scores.split(MASK_BLOCK)])
    assert torch.equal(prune(W, H, FORMATS["F32"], sparsity, compensation=False), W * ~pruned.T)


@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["F16"]], ids=lambda f: f.name)
def test_refinement_lowers_the_error(fmt: QuantFormat) -> None:
    W, H = heavy_tailed(24, 256), correlated_hessian(256)
    errors = [row_errors(W - prune(W, H, fmt, HALF, refinement_rounds=r), H).sum() for r in (0, 2)]
    assert errors[1] < 0.6 * errors[0]


def test_kept_weights_settle_at_the_least_squares_solution() -> None:
    W, H = heavy_tailed(8, 96).T.double(), damped(correlated_hessian(96), 0.1)
    kept = ~unstructured_mask(W.square(), 0.5)
    ours, errors = W * kept, []
    for _ in range(8):
        errors.append(float(torch.trace((W - ours).T @ H @ (W - ours))))
        descend_kept(W, H, ours, kept, 40)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    for w, q, keep in zip(W.T, ours.T, kept.T, strict=True):
        exact = torch.linalg.solve(H[keep][:, keep], H[keep] @ w)
        torch.testing.assert_close(q[keep], exact, rtol=1e-5, atol=1e-8)
        assert not q[~keep].any()


def test_a_tensor_in_a_stack_is_pruned_as_it_is_alone() -> None:
    H = correlated_hessian(256)
    weights = {"q": heavy_tailed(48, 256, seed=1), "k": heavy_tailed(20, 256, seed=2)}
    sparsity, formats = (
        {"q": HALF, "k": TWO_OF_FOUR},
        [FORMATS[name] for name in ("Q2_K", "Q4_K", "Q6_K", "Q4_0", "F16")],
    )
    stacked = prune_and_compensate(weights, dict.fromkeys(weights, formats), sparsity, H)
    for name, W in weights.items():
        for fmt in formats:
            alone = prune_and_compensate({name: W}, {name: [fmt]}, sparsity, H)[name][fmt.name]
            assert torch.equal(stacked[name][fmt.name].packed.data, alone.packed.data), (name, fmt.name)


def test_dead_columns_are_pruned_first() -> None:
    W, H = heavy_tailed(16, 256), correlated_hessian(256)
    dead = torch.arange(256) % 4 == 1
    H[dead], H[:, dead] = 0, 0
    assert not prune(W, H, FORMATS["Q6_K"], HALF)[:, dead].any()
    assert not prune(W, H, FORMATS["F32"], TWO_OF_FOUR)[:, dead].any()


@both
def test_a_rank_deficient_hessian_serves(sparsity: Sparsity) -> None:
    x = torch.randn(100, 256, generator=torch.Generator().manual_seed(0))
    W, H = heavy_tailed(8, 256), x.T @ x / 100
    pruned = prune(W, H, FORMATS["F32"], sparsity, damping=0.0)
    assert int((pruned == 0).sum()) == W.numel() // 2
    assert row_errors(W - pruned, H).sum() < 0.01 * row_errors(W, H).sum()


@both
def test_an_input_that_is_always_zero_prunes_by_magnitude(sparsity: Sparsity) -> None:
    W = heavy_tailed(4, 256)
    pruned = prune(W, torch.zeros(256, 256), FORMATS["F32"], sparsity)
    assert torch.equal(pruned, prune(W, torch.eye(256), FORMATS["F32"], sparsity))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("half", r'expected a pattern "n:m" such as "2:4"'),
        ("5:4", "expected n of a pattern n:m from 1 to m - 1, found '5:4'"),
        ("0:4", "expected n of a pattern n:m from 1 to m - 1"),
        ("1:3", "expected m of a pattern n:m among 2, 4, 8, 16, 32, found '1:3'"),
    ],
)
def test_an_impossible_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparsity.of_pattern(pattern)


@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan")])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected a sparsity of at least 0 and below 1, found"):
        Sparsity.of_fraction(fraction)


def test_formats_and_rows_that_cannot_hold_the_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match="m divides rows of 90 weights, found 2:4"):
        check_prunable(FORMATS["F16"], TWO_OF_FOUR, 90)
    for name in CODEBOOK_TYPES:
        with pytest.raises(ValueError, match=rf"with an exact zero for pruning \(W2, .*, W16\), found {name}"):
            check_prunable(FORMATS[name], HALF, 256)
