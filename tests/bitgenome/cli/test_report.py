"""Sentences of the closing table."""

from math import inf

from bitgenome.cli.report import lead_on_validation
from bitgenome.run.outcome import validation_record
from search.loop.paired import Estimate
from search.loop.winner import Winner
from search.types import Evaluation

WINNER = Evaluation((0,), 0.1, 0.1, 0.1, 1.0, 0.1, 10, "validation", 512, window_kl=(0.1,))


def test_the_lead_is_told_with_its_paired_error_and_the_ties() -> None:
    winner = Winner(WINNER, (WINNER,), "exact kl", Estimate(-0.0004, 0.0001, 32), 2)
    assert lead_on_validation(winner) == (
        "searched beats exact kl by 0.00040 ± 0.00010 KL on validation text (paired, 32 windows); "
        "2 other finalists are within one standard error"
    )
    assert validation_record(winner) == {
        "reference": "exact kl", "kl_difference": -0.0004, "standard_error": 0.0001, "windows": 32, "ties": 2,
    }  # fmt: skip


def test_a_reference_that_wins_is_named() -> None:
    winner = Winner(WINNER, (WINNER,), "uniform", None, 0)
    assert lead_on_validation(winner) == "no other genome beats uniform on validation text"
    assert set(validation_record(winner).values()) == {"uniform", None, 0}


def test_the_error_of_a_single_window_is_no_number_in_json() -> None:
    winner = Winner(WINNER, (WINNER,), "uniform", Estimate(-0.1, inf, 1), 0)
    assert validation_record(winner)["standard_error"] is None
