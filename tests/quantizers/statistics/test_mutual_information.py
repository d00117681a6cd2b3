"""Pairwise mutual information against scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from quantizers.statistics import mutual_information
from quantizers.statistics.mutual_information import bin_codes, pairwise_information


def samples(n: int = 600, C: int = 7, seed: int = 0) -> torch.Tensor:
    """Correlated, one a function of another, one constant."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, C, generator=generator) @ torch.randn(C, C, generator=generator)
    X[:, 3] = X[:, 2].square()
    X[:, 5] = 1.5
    return X


@pytest.mark.parametrize("cells", [1 << 24, 64])
def test_histograms_agree_with_scikit_learn_for_every_pair(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutual_information, "CHUNK_CELLS", cells)  # all pairs at once, and one channel after the other
    X = samples()
    codes = bin_codes(X, 6).numpy()
    found = pairwise_information(X, "histogram", 6)
    expected = np.array([[mutual_info_score(a, b) for a in codes.T] for b in codes.T])
    np.testing.assert_allclose(found.information.numpy(), expected, atol=1e-10)
    normalized = np.array([[normalized_mutual_info_score(a, b) for a in codes.T] for b in codes.T])
    alive = np.ix_(*[[0, 1, 2, 3, 4, 6]] * 2)
    np.testing.assert_allclose(found.normalized().numpy()[alive], normalized[alive], atol=1e-10)


def test_bins_hold_equal_counts_and_equal_values_share_a_bin() -> None:
    codes = bin_codes(samples(n=800), 8)
    assert [int((codes[:, 0] == b).sum()) for b in range(8)] == [100] * 8
    assert len(codes[:, 5].unique()) == 1


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, -0.9])
def test_both_estimates_find_the_closed_form_of_two_gaussians(rho: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    X = torch.stack([x, rho * x + math.sqrt(1 - rho**2) * noise], 1)
    expected = -0.5 * math.log(1 - rho**2)
    gaussian = pairwise_information(X, "gaussian")
    assert float(gaussian.information[0, 1]) == pytest.approx(expected, abs=0.005)
    assert float(gaussian.normalized()[0, 1]) == pytest.approx(
        expected / (0.5 * math.log(2 * math.pi * math.e)), abs=0.005
    )
    assert float(pairwise_information(X, "histogram", 32).information[0, 1]) == pytest.approx(
        expected, rel=0.1, abs=0.01
    )


def test_what_is_not_linear_is_seen_by_the_histogram_alone() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(2))
    X = torch.stack([x, x.square()], 1)
    assert float(pairwise_information(X, "histogram").information[0, 1]) > 1.0
    assert float(pairwise_information(X, "gaussian").information[0, 1]) < 0.01


@pytest.mark.parametrize("estimate", ["histogram", "gaussian"])
def test_a_constant_channel_shares_nothing_and_all_is_symmetric(estimate: str) -> None:
    found = pairwise_information(samples(), estimate)  # type: ignore[arg-type]
    normalized = found.normalized()
    assert torch.equal(normalized, normalized.T) and torch.equal(found.information, found.information.T)
    assert found.information[5].abs().max() < 1e-12 and float(normalized[5, 5]) == 1.0
    assert float(normalized.min()) >= 0 and float(normalized.max()) <= 1


def test_samples_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="n of at least 2"):
        pairwise_information(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="1 non-finite values of 8"):
        pairwise_information(torch.tensor([[1.0, torch.inf], [0, 0], [1, 1], [2, 2]]))
    with pytest.raises(ValueError, match="at least 2 bins, found 1"):
        pairwise_information(torch.zeros(4, 4), bins=1)
