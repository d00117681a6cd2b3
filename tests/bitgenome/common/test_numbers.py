"""Perplexities stay finite and readable."""

import math

import pytest

from bitgenome.common.numbers import perplexity_of, perplexity_text


@pytest.mark.parametrize(
    ("loss", "text"), [(0.0, "1.000"), (math.log(14.0512), "14.051"), (150.0, "1.39e+65"), (1e6, "1.80e+308")]
)
def test_a_perplexity_is_finite_and_short(loss: float, text: str) -> None:
    assert perplexity_text(perplexity_of(loss)) == text


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    assert math.isnan(perplexity_of(math.nan))
