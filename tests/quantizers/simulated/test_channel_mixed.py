"""Channel-mixed grids against brute force and a plain float64 GPTQ."""

import numpy as np
import pytest
import torch

from quantizers.rounding.row_choice import row_errors
from quantizers.simulated.channel_mixed import GridSettings, fit_range, round_affine, simulate
from quantizers.statistics.hessian import damped, inverse_factor
from tests.quantizers.weights import correlated_hessian, heavy_tailed

MINMAX = GridSettings("channel", fit="minmax")


def gptq_in_float64(W: np.ndarray, H: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Algorithm 1 of Frantar & Alistarh 2022 without blocks, one min-max range a column, H already damped."""
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    W, Q = W.copy(), np.zeros_like(W)
    for j in range(W.shape[1]):
        low, high = min(W[:, j].min(), 0), max(W[:, j].max(), 0)
        step = (high - low) / (2 ** bits[j] - 1)
        zero = np.round(-low / step)
        Q[:, j] = (np.clip(np.round(W[:, j] / step) + zero, 0, 2 ** bits[j] - 1) - zero) * step
        W[:, j + 1 :] -= np.outer((W[:, j] - Q[:, j]) / U[j, j], U[j, j + 1 :])
    return Q


def test_rounding_finds_the_nearest_of_the_values_that_the_bits_allow() -> None:
    x = heavy_tailed(64, 1)[:, 0].clamp(-0.1, 0.12)
    values = torch.arange(8) * (0.22 / 7)
    values = values - values[(values - 0.1).abs().argmin()]
    found = round_affine(x, torch.tensor(-0.1), torch.tensor(0.12), torch.tensor(7.0))
    nearest = values[(x[:, None] - values).abs().argmin(1)]
    torch.testing.assert_close(found, nearest, atol=1e-6, rtol=0)


def test_compensation_agrees_with_a_plain_loop_in_float64() -> None:
    W, H = heavy_tailed(16, 160), correlated_hessian(160)
    bits = torch.tensor([3, 4, 6, 8] * 40)
    U, _ = inverse_factor(H, 0.01)
    found = simulate(W, bits, MINMAX, U).weights
    expected = gptq_in_float64(W.double().numpy(), damped(H, 0.01).numpy(), bits.numpy())
    agree = np.isclose(found.numpy(), expected, rtol=1e-3, atol=1e-5).mean()
    assert agree > 0.99, "a tie that rounds the other way may move a few weights after it"
    errors = [float(row_errors(W - q, H).sum()) for q in (found, torch.from_numpy(expected).float())]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("share", ["channel", "group"])
def test_compensation_lowers_the_output_error_and_more_bits_lower_it_further(share: str) -> None:
    W, H = heavy_tailed(32, 256), correlated_hessian(256)
    U, _ = inverse_factor(H, 0.01)
    grid = GridSettings(share)  # type: ignore[arg-type]
    errors = {}
    for b in (2, 4, 8):
        bits = torch.full((256,), b)
        errors[b] = [float(row_errors(W - simulate(W, bits, grid, u).weights, H).sum()) for u in (None, U)]
        assert errors[b][1] < 0.9 * errors[b][0]
    assert errors[2][1] > 5 * errors[4][1] > 50 * errors[8][1]


def test_every_channel_takes_no_more_values_than_its_bits_allow() -> None:
    W, bits = heavy_tailed(64, 12), torch.tensor([2, 3, 4] * 4)
    decoded = simulate(W, bits, MINMAX).weights
    assert [len(decoded[:, j].unique()) <= 2**b for j, b in enumerate(bits.tolist())] == [True] * 12
    shared = simulate(W, torch.full((12,), 3), MINMAX, labels=torch.tensor([0, 1] * 6)).weights
    assert len(shared[:, ::2].unique()) <= 8 and len(shared[:, 1::2].unique()) <= 8


def test_the_least_squares_range_is_the_best_of_all_tried() -> None:
    x, top = heavy_tailed(24, 8).T, torch.full((8,), 3.0)
    low, high = fit_range(x, top, "mse", per_row=True)
    chosen = (round_affine(x, low, high, top[:, None]) - x).square().sum(0)
    for share in torch.linspace(0.4, 1, 13):
        full_low, full_high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
        tried = (round_affine(x, share * full_low, share * full_high, top[:, None]) - x).square().sum(0)
        assert (chosen <= tried * (1 + 1e-5)).all()


def test_scales_are_counted() -> None:
    W = heavy_tailed(10, 96)
    bits = torch.full((96,), 4)
    assert simulate(W, bits, GridSettings("group", 64)).stored_bits == 4 + 32 * 20 / 960
    assert simulate(W, bits, GridSettings("channel")).stored_bits == 4 + 32 * 96 / 960
    assert simulate(W, bits, MINMAX, labels=torch.arange(96) % 3).stored_bits == 4 + 32 * 3 / 960


def test_zeros_and_constants_survive() -> None:
    W = torch.zeros(8, 6)
    W[:, 1] = 0.25
    decoded = simulate(W, torch.full((6,), 2), MINMAX).weights
    torch.testing.assert_close(decoded, W)


def test_weights_and_bits_that_cannot_serve_are_refused() -> None:
    W = heavy_tailed(4, 8)
    with pytest.raises(ValueError, match="expected 8 bit widths of at least 1"):
        simulate(W, torch.full((7,), 4), MINMAX)
    W[1, 2] = torch.inf
    with pytest.raises(ValueError, match="1 non-finite values of 32"):
        simulate(W, torch.full((8,), 4), MINMAX)
