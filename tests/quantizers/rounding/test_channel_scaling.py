"""Channel scaling changes what rounding loses, never what the product is."""

import pytest
import torch

from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS
from quantizers.rounding.channel_scaling import (
    PROTECTION,
    SharedColumns,
    awq_scales,
    choose_scaling,
    grid_candidates,
    normalized_scales,
    protection,
    scaled_error,
    scaled_hessian,
    smoothquant_scales,
)
from quantizers.rounding.nearest import quantize
from quantizers.rounding.row_choice import row_errors
from quantizers.settings import ScalingSettings
from quantizers.statistics.moments import InputStatistics, StatisticsAccumulator
from tests.quantizers.weights import heavy_tailed

COLUMNS = 256


def inputs(columns: int = COLUMNS) -> torch.Tensor:
    """(n, columns) correlated, with a few features far larger than the rest."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(2048, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    sizes = torch.linspace(-1, 1, columns)[torch.randperm(columns, generator=generator)].exp()
    sizes[:4] *= 20
    return mixed * sizes / columns**0.5


def statistics_of(X: torch.Tensor) -> InputStatistics:
    accumulator = StatisticsAccumulator(X.shape[1])
    accumulator.add(X)
    return accumulator.statistics()


def hessian_of(X: torch.Tensor) -> torch.Tensor:
    return (X.double().T @ X.double() / len(X)).float()


@pytest.mark.parametrize("format_name", ["Q2_K", "Q4_K", "Q8_0"])
def test_the_error_under_the_scaled_hessian_is_that_of_the_original_output(format_name: str) -> None:
    X, W, fmt = inputs(), heavy_tailed(16, COLUMNS), FORMATS[format_name]
    s = awq_scales(statistics_of(X).mean_abs, W.abs().mean(0), 0.5, True)
    rounded = dequantize(fmt, quantize(fmt, W * s))
    found = row_errors(W * s - rounded, scaled_hessian(hessian_of(X), s)).sum()
    output = X.double() @ (W.double() - rounded.double() / s.double()).T
    assert float(found) == pytest.approx(float(output.square().sum(1).mean()), rel=1e-4)


def test_statistics_of_scaled_inputs_are_the_scaled_statistics() -> None:
    X = inputs()
    s = normalized_scales(torch.rand(COLUMNS) + 0.1)
    divided, measured = statistics_of(X).divided(s), statistics_of(X / s)
    for name, vector in measured.tensors().items():
        assert torch.allclose(divided.tensors()[name], vector, rtol=1e-5, atol=1e-7), name


def test_smoothquant_is_its_equation_up_to_one_factor() -> None:
    x, w = torch.rand(COLUMNS).double() + 0.01, torch.rand(COLUMNS).double() + 0.01
    s = smoothquant_scales(x.float(), w.float(), 0.3).double()
    expected = x**0.3 / w**0.7
    assert torch.allclose(s / s[0], expected / expected[0], rtol=1e-5)
    assert float(s.log().mean()) == pytest.approx(0, abs=1e-6)


def test_a_dead_column_is_not_scaled() -> None:
    x, w = torch.rand(COLUMNS) + 1, torch.rand(COLUMNS) + 1
    x[7] = w[9] = 0
    for s in (smoothquant_scales(x, w, 0.5), awq_scales(x, w, 0.5, True)):
        assert s[7] == s[9] == 1
        assert s.isfinite().all() and (s > 0).all()


@pytest.mark.parametrize("grid", [1, 4])
@pytest.mark.parametrize("format_name", ["Q3_K", "Q4_K"])
def test_the_searched_alpha_is_never_worse_than_any_other_of_the_grid(grid: int, format_name: str) -> None:
    X, weights, formats = inputs(), {"w": heavy_tailed(24, COLUMNS)}, [FORMATS[format_name]]
    H, statistics = hessian_of(X), statistics_of(X)
    chosen = choose_scaling(weights, formats, H, statistics, ScalingSettings(kind="awq", grid=grid))
    found = float(scaled_error(weights, formats, H, chosen.scales))
    weight_mean = weights["w"].abs().mean(0)
    others = [awq_scales(statistics.mean_abs, weight_mean, *candidate) for candidate in grid_candidates(grid)]
    errors = [float(scaled_error(weights, formats, H, s)) for s in [torch.ones(COLUMNS), *others]]
    assert found == min(errors)
    assert chosen.error == pytest.approx(found / errors[0])


def test_columns_of_heads_that_share_a_value_head_share_a_scale() -> None:
    shared = SharedColumns(repeats=3, width=4)
    values = torch.arange(24.0)  # two groups of three heads of size 4
    assert shared.mean(values)[:4].tolist() == [4, 5, 6, 7]
    assert shared.amax(values)[4:].tolist() == [20, 21, 22, 23]
    assert torch.equal(shared.expand(shared.mean(values)).view(2, 3, 4)[:, 0], shared.mean(values).view(2, 4))
    X, weights = inputs(), {"w": heavy_tailed(8, COLUMNS)}
    shared = SharedColumns(repeats=2, width=32)
    settings = ScalingSettings(kind="smoothquant", protect=0.05)
    s = choose_scaling(weights, [FORMATS["Q4_K"]], hessian_of(X), statistics_of(X), settings, shared).scales
    heads = s.view(-1, 2, 32)
    assert torch.equal(heads[:, 0], heads[:, 1])


def test_protection_enlarges_exactly_the_salient_share() -> None:
    salience = torch.rand(200)
    factors = protection(salience, 0.01)
    assert (factors == PROTECTION).sum() == 2
    assert set(factors.nonzero()[:, 0].tolist()) == set(range(200))
    assert salience[factors == PROTECTION].min() >= salience[factors == 1].max()
