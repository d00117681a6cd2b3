"""Losses worked out by hand."""

import math

import pytest

from search.fitness import FitnessSettings, compression_of, distortion_loss, search_loss, weighted_fitness

MEASURED = {"kl": 0.02, "logit_mse": 0.25, "reconstruction": 3.0, "file_bytes": 500, "weights": 1000}


def test_distortion_is_the_weighted_sum() -> None:
    assert distortion_loss(0.02, 3.0, 2.0, 0.01) == pytest.approx(0.07)
    assert search_loss(FitnessSettings(), **MEASURED) == 0.02
    assert search_loss(FitnessSettings(kl_weight=0, reconstruction_weight=2), **MEASURED) == 6.0


def test_a_weight_of_zero_leaves_out_what_was_not_measured() -> None:
    assert distortion_loss(0.02, math.nan, 1.0, 0.0) == 0.02
    assert math.isnan(distortion_loss(0.02, math.nan, 1.0, 0.1))


def test_the_original_fitness_grows_with_quality_and_compression_so_its_loss_is_the_negative() -> None:
    assert compression_of(500, 1000) == 4.0
    assert weighted_fitness(0.25, 4.0, alpha=1.0, beta=0.5) == 6.0
    settings = FitnessSettings(kind="weighted", alpha=1.0, beta=0.5)
    assert search_loss(settings, **MEASURED) == -6.0
    assert search_loss(settings, **MEASURED | {"logit_mse": 0.5}) > -6.0
    assert search_loss(settings, **MEASURED | {"file_bytes": 1000}) > -6.0


def test_an_unchanged_output_has_a_finite_fitness() -> None:
    assert math.isfinite(weighted_fitness(0.0, 4.0, 1.0, 1.0))


def test_settings_that_leave_nothing_to_search_for_are_refused() -> None:
    with pytest.raises(ValueError, match="'distortion' or 'weighted'"):
        FitnessSettings(kind="accuracy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both weights of the distortion fitness are zero"):
        FitnessSettings(kl_weight=0.0)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        FitnessSettings(kl_weight=-1.0)
