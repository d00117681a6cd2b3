"""Compensation against a plain float64 GPTQ, its identities and its promises."""

import logging
from functools import cache

import pytest
import torch
from torch import Tensor

from quantizers.formats.grids import GRIDS, Grid, Scales
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.rounding.column_loop import Segment, column_loop
from quantizers.rounding.nearest import fit_rows, quantize
from quantizers.rounding.row_choice import row_errors
from quantizers.rounding.sparsegpt import compensate, compensate_rows, conditional_importance, factor
from quantizers.settings import CompensationSettings
from quantizers.statistics.hessian import damped, inverse_factor
from tests import ggml_reference
from tests.quantizers.weights import correlated_hessian, extreme_rows, heavy_tailed

BLOCK_FORMATS = [f for f in FORMATS.values() if not f.is_float]
all_block_formats = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)
all_formats_of_integers = pytest.mark.parametrize("fmt", [g.format for g in GRIDS.values()], ids=lambda f: f.name)


def brute_force(grid: Grid, W: Tensor, H: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization (Frantar & Alistarh 2022, equations 2 and 3) in column order: decoded float64 weights.

    Every column's error is spread by the inverse of the Hessian of the columns that remain, updated by Gaussian
    elimination.
    """
    inverse = torch.linalg.inv(damped(H, damping))
    importance = conditional_importance(inverse_factor(H, damping)[0], H).double()
    W, Q, size = W.clone(), torch.zeros_like(W), grid.format.block_size
    for j in range(W.shape[1]):
        if j % size == 0:
            scales = fit_rows(grid, W[:, j : j + size].T, importance[j : j + size])
            step = scales.step[0, :, 0].repeat_interleave(grid.width, 0)
            offset = scales.offset[0, :, 0].repeat_interleave(grid.width, 0)
        s, o = step[j % size], offset[j % size]
        q = grid.nearest(torch.where(s == 0, 0, (W[:, j] + o) / s))
        Q[:, j] = q * s - o
        rest = inverse[j, j + 1 :]
        W[:, j + 1 :] -= torch.outer((W[:, j] - Q[:, j]) / inverse[j, j], rest)
        inverse[j + 1 :, j + 1 :] -= torch.outer(rest, rest) / inverse[j, j]
    return Q


@cache
def example(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (32, 512), Hessian, and the weights that brute force makes of them in format ``name``."""
    W, H = heavy_tailed(32, 512), correlated_hessian(512)
    return W, H, brute_force(GRIDS[name], W.double(), H, 0.01)


def test_exact_compensation_of_a_worked_example() -> None:
    """Two equal inputs: the second weight takes over what the first one loses."""
    H = torch.ones(2, 2) + 1e-3 * torch.eye(2)
    U, _ = inverse_factor(H, 0.0)
    error = 0.25
    assert float(error / U[0, 0] * U[0, 1]) == pytest.approx(-error, rel=2e-3)


@all_formats_of_integers
def test_vectorized_loop_follows_brute_force_in_float64(fmt: QuantFormat) -> None:
    grid, (W, H, expected) = GRIDS[fmt.name], example(fmt.name)
    U, _ = inverse_factor(H, 0.01)
    segment = Segment(grid, slice(0, 32))
    integers = column_loop(W.T.double(), U, conditional_importance(U, H).double(), [segment])
    scales = Scales.concatenate(segment.scales, 0)
    decoded = grid.blocks(integers.double()) * scales.step - scales.offset
    differs = (decoded.view(512, 32).T - expected).abs() > 1e-12
    assert not differs[:, : fmt.block_size].any()
    assert differs.any(1).sum() <= 4, "scales that tie within float64 noise may change a row, not many"


@all_formats_of_integers
def test_float32_is_enough(fmt: QuantFormat) -> None:
    """Float32 noise decides ties, and one tie changes the rest of its row, but not how good the row is."""
    W, H, expected = example(fmt.name)
    reference = row_errors(W - expected.float(), H).sum()
    data = compensate_rows({("w", fmt.name): W}, factor(H, 0.01), rounds=0)["w", fmt.name][0]
    ours = row_errors(W - dequantize(fmt, data), H).sum()
    assert float(ours) == pytest.approx(float(reference), rel=0.05)


@all_block_formats
def test_loop_errors_add_up_to_the_trace(fmt: QuantFormat) -> None:
    """sum(((w_j - q_j) / U_jj)^2), w_j as the loop meets it, is tr(dW H_damped dW^T)."""
    W, H = heavy_tailed(16, 512).double(), correlated_hessian(512)
    U, damping = inverse_factor(H, 0.01)
    data = compensate_rows({("w", fmt.name): W.float()}, factor(H, damping), rounds=0)["w", fmt.name][0]
    Q = dequantize(fmt, data).double()
    met, total = W.clone(), 0.0
    for j in range(W.shape[1]):
        error = (met[:, j] - Q[:, j]) / U[j, j]
        total += float(error.square().sum())
        met[:, j:] -= torch.outer(error, U[j, j:])
    dW = W - Q
    assert total == pytest.approx(float(torch.trace(dW @ damped(H, damping) @ dW.T)), rel=1e-9)


@all_block_formats
def test_compensation_lowers_the_output_error(fmt: QuantFormat) -> None:
    W, H = heavy_tailed(64, 512), correlated_hessian(512)
    plain = row_errors(W - dequantize(fmt, quantize(fmt, W, H.diagonal())), H).sum()
    result = compensate({"w": W}, {"w": [fmt]}, H)["w"][fmt.name]
    assert result.error < 0.75 * plain
    dW = (W - result.packed.dequantize()).double()
    assert result.error == pytest.approx(float(torch.trace(dW @ H.double() @ dW.T)), rel=1e-4)
    power = float(torch.trace(W.double() @ H.double() @ W.double().T))
    assert result.relative == pytest.approx(result.error / power, rel=1e-4)
    assert ggml_reference.is_valid(fmt, result.packed.data)


@all_block_formats
def test_no_row_is_worse_than_plain_rounding(fmt: QuantFormat) -> None:
    """Uncorrelated inputs of very different size leave little to compensate, and damping misleads."""
    W = heavy_tailed(32, 256)
    H = torch.diag(torch.logspace(-6, 2, 256)) + 1e-3
    plain = row_errors(W - dequantize(fmt, quantize(fmt, W, H.diagonal())), H)
    result = compensate({"w": W}, {"w": [fmt]}, H, CompensationSettings(damping=1.0))["w"][fmt.name]
    assert (row_errors(W - result.packed.dequantize(), H) <= plain).all()


@all_block_formats
def test_extreme_rows_survive_compensation(fmt: QuantFormat) -> None:
    W, H = extreme_rows(), correlated_hessian(256)
    result = compensate({"w": W}, {"w": [fmt]}, H)["w"][fmt.name]
    assert ggml_reference.is_valid(fmt, result.packed.data)
    plain = row_errors(W - dequantize(fmt, quantize(fmt, W, H.diagonal())), H)
    assert (row_errors(W - result.packed.dequantize(), H) <= plain).all()


def test_without_compensation_weights_are_rounded_by_importance_alone() -> None:
    W, H, fmt = heavy_tailed(8, 256), correlated_hessian(256), FORMATS["Q3_K"]
    result = compensate({"w": W}, {"w": [fmt]}, H, CompensationSettings(compensation=False))["w"]["Q3_K"]
    assert torch.equal(result.packed.data, quantize(fmt, W, H.diagonal()))


def test_stacked_levels_give_the_bytes_of_one_level_alone() -> None:
    H = correlated_hessian(512)
    weights = {"q": heavy_tailed(48, 512, seed=1), "k": heavy_tailed(20, 512, seed=2)}
    stacked = compensate(weights, dict.fromkeys(weights, BLOCK_FORMATS), H)
    for name, W in weights.items():
        for fmt in BLOCK_FORMATS:
            alone = compensate({name: W}, {name: [fmt]}, H)[name][fmt.name]
            assert torch.equal(stacked[name][fmt.name].packed.data, alone.packed.data), (name, fmt.name)


def test_float_formats_are_copied() -> None:
    W, H = heavy_tailed(8, 40), correlated_hessian(40)
    result = compensate({"w": W}, {"w": [FORMATS["F16"], FORMATS["F32"]]}, H)["w"]
    assert torch.equal(result["F16"].packed.dequantize(), W.half().float())
    assert result["F32"].error == 0.0


def test_rows_that_are_not_whole_super_blocks_work() -> None:
    W, H = heavy_tailed(8, 288), correlated_hessian(288)
    result = compensate({"w": W}, {"w": [FORMATS["Q4_0"], FORMATS["Q8_0"]]}, H)["w"]
    assert result["Q8_0"].relative < result["Q4_0"].relative < 0.05


def test_singular_hessian_warns_and_works(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(10, 256, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        result = compensate(
            {"w": heavy_tailed(8, 256)}, {"w": [FORMATS["Q4_K"]]}, x.T @ x / 10, CompensationSettings(damping=0.0)
        )
    assert "singular" in caplog.text
    assert result["w"]["Q4_K"].relative < 0.01


def test_dead_columns_are_rounded_plainly() -> None:
    W, H = heavy_tailed(16, 256), correlated_hessian(256)
    dead = torch.arange(256) % 8 == 2
    H[dead], H[:, dead] = 0, 0
    result = compensate({"w": W}, {"w": [FORMATS["Q6_K"]]}, H)["w"]["Q6_K"]
    dW = W - result.packed.dequantize()
    assert dW[:, dead].square().mean() < 0.01 * W[:, dead].square().mean()


def test_a_zero_tensor_has_no_error() -> None:
    result = compensate({"w": torch.zeros(4, 256)}, {"w": [FORMATS["Q2_K"]]}, correlated_hessian(256))["w"]["Q2_K"]
    assert (result.error, result.relative) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("W", "H", "message"),
    [
        (torch.zeros(4, 256), torch.eye(256) * torch.inf, "non-finite values: check the calibration inputs"),
        (torch.zeros(4, 256), torch.eye(512), r"expected weights \(rows, 512\), got shape \(4, 256\)"),
        (torch.full((4, 256), torch.inf), torch.eye(256), "1024 non-finite values"),
    ],
)
def test_bad_input_is_named(W: Tensor, H: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compensate({"w": W}, {"w": [FORMATS["Q4_K"]]}, H)
