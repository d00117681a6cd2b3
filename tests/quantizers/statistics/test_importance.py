"""Five-dimensional importance against its definition in float64."""

import numpy as np
import pytest
import torch

from quantizers.statistics.hessian import damped
from quantizers.statistics.importance import (
    DIMENSIONS,
    ImportanceWeights,
    channel_contribution,
    channel_dimensions,
    combined_importance,
)
from quantizers.statistics.moments import InputStatistics, StatisticsAccumulator
from tests.quantizers.weights import heavy_tailed


def inputs(columns: int) -> tuple[torch.Tensor, torch.Tensor, InputStatistics]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, columns, generator=generator) * torch.linspace(0.1, 3, columns) + 0.2
    statistics = StatisticsAccumulator(columns)
    statistics.add(x)
    return x, x.T @ x / len(x), statistics.statistics()


def test_the_five_dimensions_are_their_definitions_in_float64() -> None:
    W = heavy_tailed(24, 32)
    x, H, statistics = inputs(32)
    found = channel_dimensions(W, H, statistics)
    W64, x64 = W.double().numpy(), x.double().numpy()
    expected = {
        "activation": np.abs(x64).mean(0),
        "hessian": 1 / np.diag(np.linalg.inv(damped(H, 0.01).numpy())),
        "weight": np.abs(W64).mean(0),
        "sensitivity": np.sqrt(W64**2 * (x64**2).mean(0)).sum(0),
        "stability": x64.var(0),
    }
    assert tuple(found) == DIMENSIONS
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-5, err_msg=name)
    weights = ImportanceWeights(1, 2, 3, 4, 0)
    score = sum(w * expected[n] / expected[n].mean() for n, w in zip(DIMENSIONS, (0.1, 0.2, 0.3, 0.4, 0), strict=True))
    np.testing.assert_allclose(combined_importance(found, weights).numpy(), score, rtol=1e-5)


def test_the_score_has_mean_one_and_knows_no_units() -> None:
    W = heavy_tailed(24, 32)
    _, H, statistics = inputs(32)
    score = combined_importance(channel_dimensions(W, H, statistics))
    assert float(score.mean()) == pytest.approx(1)
    other = StatisticsAccumulator(32)
    other.add(100 * inputs(32)[0])
    again = combined_importance(channel_dimensions(7 * W, 1e4 * H, other.statistics()))
    torch.testing.assert_close(again, score, rtol=1e-4, atol=0)


def test_a_dead_channel_and_a_layer_of_zeros_have_finite_scores() -> None:
    x, _, _ = inputs(32)
    x[:, 5] = 0
    statistics = StatisticsAccumulator(32)
    statistics.add(x)
    score = combined_importance(channel_dimensions(torch.zeros(8, 32), x.T @ x / len(x), statistics.statistics()))
    assert score.isfinite().all() and score[5] == 0 == score.min()


def test_the_contribution_is_that_of_the_three_level_variant() -> None:
    W = heavy_tailed(24, 32)
    x, _, statistics = inputs(32)
    contribution = W.double().abs().mean(0) * x.double().abs().mean(0)
    torch.testing.assert_close(channel_contribution(W, statistics), contribution / contribution.mean())


def test_an_ablation_leaves_one_dimension_out_and_keeps_the_others_ratios() -> None:
    shares = ImportanceWeights().without("hessian").shares()
    assert shares["hessian"] == 0 and sum(shares.values()) == pytest.approx(1)
    assert shares["activation"] / shares["weight"] == pytest.approx(0.25 / 0.15)
    with pytest.raises(ValueError, match="expected a dimension among activation, hessian, weight"):
        ImportanceWeights().without("variance")


@pytest.mark.parametrize("values", [(0, 0, 0, 0, 0), (-1, 1, 1, 1, 1), (float("nan"), 1, 1, 1, 1)])
def test_weights_that_cannot_serve_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="finite, not negative and not all zero"):
        ImportanceWeights(*values)
