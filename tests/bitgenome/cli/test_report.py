"""Sentences of the closing table."""

import io
from math import inf
from pathlib import Path

import numpy as np
from rich.console import Console

from bitgenome.cli.report import against_mix, lead_on_validation, show_use
from bitgenome.run.outcome import validation_record
from bitgenome.run.proof import MixProof, Proof, Sample
from exporters.runtime.figures import Figures, PositionErrors
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


def test_a_file_is_held_against_llama_cpps_own_of_the_nearest_size() -> None:
    errors = PositionErrors(np.zeros((1, 1)), np.ones((1, 1), bool), np.zeros((1, 1)), np.zeros((1, 1)))
    figures = Figures.of(errors)
    mix = MixProof("Q3_K_M", 2_000_000, 0.2, 9.0, figures)
    proof = Proof("f.gguf", 1_900_000, 8, 8.0, 0.1, 8.5, 0.1, 8.5, 0.0, 1.0, 1.0, 1.0, figures, mix=mix)
    assert against_mix(proof, mix) == (
        "The file is 5.0 % smaller than llama.cpp's Q3_K_M (2.000 MB, with the same importance matrix); its KL is 0.50 "
        "of that one's"
    )


def test_a_sample_can_do_nothing_to_the_terminal() -> None:
    out = Console(file=io.StringIO(), width=80)
    show_use(Path("my runs/f.gguf"), Sample("Why?", "[red]be\x1b[2Jcause\n  so[/red]", chat=True), out)
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue().splitlines()[1:] == [
        "        llama-cli -m 'my runs/f.gguf'",
        "        llama-server -m 'my runs/f.gguf'",
        "To 'Why?' it answers: '[red]be[2Jcause so[/red]'",
    ]
