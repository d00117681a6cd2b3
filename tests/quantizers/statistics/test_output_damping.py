"""Output factors are damped as far as two halves of the text disagree about them."""

import pytest
import torch
from torch import Tensor

from quantizers.statistics.output_damping import DAMPINGS, chosen_damping

ROWS = 24


def halves(samples: int, tail: float = 0.0, common: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors of ``samples`` scores each, of one distribution; the larger ``tail``, the fewer of them decide."""
    generator = torch.Generator().manual_seed(7)
    mixed = torch.eye(ROWS) + common * torch.randn(ROWS, ROWS, generator=generator) / ROWS**0.5
    scores = torch.randn(2, samples, ROWS, generator=generator) @ mixed
    scores *= (tail * torch.randn(2, samples, 1, generator=generator)).exp()
    first, second = scores.mT @ scores / samples
    return first, second


def test_many_scores_are_trusted_and_few_or_those_with_heavy_tails_are_not() -> None:
    found = [chosen_damping(*halves(*how)) for how in ((100_000, 0.0), (40, 0.0), (40, 1.5))]
    assert found[0] == DAMPINGS[0] and found == sorted(set(found)), found


def test_scores_that_do_not_go_together_are_not_believed_to() -> None:
    assert chosen_damping(*halves(30, common=0.0)) >= 10


def test_the_order_of_halves_does_not_count_nor_does_their_size() -> None:
    first, second = halves(300, 1.0)
    assert chosen_damping(first, second) == chosen_damping(100 * second, 100 * first)


def test_rows_without_scores_are_left_alone() -> None:
    first, second = halves(500)
    for half in (first, second):
        half[3] = half[:, 3] = 0
    assert chosen_damping(first, second) in DAMPINGS
    assert chosen_damping(0 * first, 0 * second) in DAMPINGS


def test_a_matrix_that_is_no_factor_is_refused() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -300.0, 1.0]))
    with pytest.raises(ValueError, match="not positive semidefinite"):
        chosen_damping(indefinite, torch.eye(3))
