"""Accumulation and factorization of Hessians."""

import logging

import pytest
import torch

from quantizers.statistics.hessian import HessianAccumulator, check_hessian, damped, inverse_factor, invert_upper
from tests.quantizers.weights import correlated_hessian


def test_accumulated_hessian_is_the_mean_outer_product() -> None:
    x = torch.randn(5, 40, 16, generator=torch.Generator().manual_seed(0))
    accumulator = HessianAccumulator(16)
    for batch in x.split(2):
        accumulator.add(batch)
    vectors = x.reshape(-1, 16).double()
    assert torch.allclose(accumulator.matrix().double(), vectors.T @ vectors / 200, rtol=1e-5, atol=1e-6)
    assert torch.equal(accumulator.importance(), accumulator.matrix().diagonal())


def test_hessian_gives_the_mean_squared_output_error() -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    dW = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    accumulator = HessianAccumulator(16)
    accumulator.add(x)
    expected = (x @ dW.T).square().sum(1).mean()
    assert torch.allclose(torch.trace(dW @ accumulator.matrix() @ dW.T), expected, rtol=1e-5)


def test_accumulator_names_wrong_width_and_no_input() -> None:
    accumulator = HessianAccumulator(16)
    with pytest.raises(ValueError, match="expected inputs of 16 features, got 8"):
        accumulator.add(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="seen no input"):
        accumulator.matrix()


def test_factor_is_that_of_the_damped_inverse() -> None:
    H = correlated_hessian(64)
    U, damping = inverse_factor(H, 0.01)
    assert damping == 0.01
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U @ damped(H, 0.01), torch.eye(64, dtype=torch.float64), atol=1e-9)


def test_singular_hessian_is_damped_more_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        U, damping = inverse_factor(x.T @ x, 0.0)
    assert damping > 0
    assert U.isfinite().all()
    assert "singular at damping 0" in caplog.text


def test_indefinite_hessian_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    H = torch.ones(8, 8) * 1000
    H.fill_diagonal_(1.0)
    with pytest.raises(ValueError, match="smallest eigenvalue -999"):
        inverse_factor(H, 0.01)


def test_dead_columns_are_cut_off() -> None:
    H = correlated_hessian(32)
    H[5], H[:, 5] = 0, 0
    U, _ = inverse_factor(H, 0.0)
    assert not U[5, 6:].any()
    assert not U[:5, 5].any()


def test_an_input_that_is_always_zero_weighs_all_columns_the_same() -> None:
    U, taken = inverse_factor(torch.zeros(8, 8), 0.01)
    assert taken == 0.01
    assert torch.allclose(U, torch.eye(8, dtype=torch.float64) * 1.01**-0.5)


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (torch.eye(8) * torch.nan, "64 non-finite values"),
        (-torch.eye(8), "8 negative diagonal values"),
        (torch.eye(7), r"expected a Hessian of shape \(8, 8\), got \(7, 7\)"),
    ],
)
def test_bad_hessian_is_named(H: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_hessian(H, 8)


@pytest.mark.parametrize("columns", [1, 512, 1300])
def test_triangular_matrices_are_inverted_in_place(columns: int) -> None:
    R = torch.randn(columns, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).triu()
    R.diagonal().abs_().add_(columns**0.5)
    inverse = R.clone()
    invert_upper(inverse)
    assert (inverse @ R - torch.eye(columns, dtype=torch.float64)).abs().max() < 1e-12
    assert torch.equal(inverse, inverse.triu())
