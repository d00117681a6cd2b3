"""Sentences of the closing table, and how sentences are printed."""

from io import StringIO
from math import inf
from pathlib import Path

import numpy as np
from rich.console import Console

from bitgenome.cli.tables import against_mix, show_use
from bitgenome.cli.terminal import jsonable, say
from bitgenome.cli.wording import lead_on_validation
from bitgenome.report.names import legend, plain
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


def test_a_lead_within_two_standard_errors_is_no_win_and_a_single_tie_is_singular() -> None:
    winner = Winner(WINNER, (WINNER,), "lagrangian kl", Estimate(-0.00006, 0.00017, 16), 1)
    assert lead_on_validation(winner) == (
        "no difference beyond noise between searched and lagrangian kl: 0.00006 ± 0.00017 KL on validation text "
        "(paired, 16 windows); 1 other finalist is within one standard error"
    )
    alone = Winner(WINNER, (WINNER,), "uniform", Estimate(-0.1, inf, 1), 0)
    assert lead_on_validation(alone).startswith("no difference beyond noise between searched and uniform, filled: 0.1")


def test_where_the_search_added_nothing_that_is_said() -> None:
    winner = Winner(WINNER, (WINNER,), "uniform", None, 0)
    said = "no genome that was tried beats uniform, filled on validation text: it ships, the search added nothing"
    assert lead_on_validation(winner) == said
    assert set(validation_record(winner).values()) == {"uniform", None, 0}


def test_every_word_of_the_table_is_explained_once_and_no_other() -> None:
    names = ["uniform W2", "lagrangian kl = greedy kl = uniform", "searched = exact reconstruction"]
    told = [word for word, _ in legend(map(plain, names))]
    assert told == ["searched", "exact", "lagrangian", "greedy", "uniform, filled", "uniform", "kl", "reconstruction"]
    assert [word for word, _ in legend(["searched", "uniform W3"])] == ["searched", "uniform"]


def test_what_json_does_not_have_is_null_and_numpys_numbers_are_numbers() -> None:
    found = {1: (np.float32(0.5), np.int64(3), inf, True), "path": Path("a/b"), "whole": Estimate(0.5, inf, 1)}
    assert jsonable(found) == {
        "1": [0.5, 3, None, True],
        "path": "a/b",
        "whole": {"mean": 0.5, "standard_error": None, "windows": 1},
    }


def test_a_number_and_its_unit_are_on_one_line() -> None:
    out = StringIO()
    say(
        Console(file=out, width=24),
        "same next token as in 89.9 %; by 0.00006 ± 0.00017 KL; /a/path/that/is/longer/than/it",
    )
    assert out.getvalue().splitlines() == [
        "same next token as in", "89.9 %; by", "0.00006 ± 0.00017 KL;", "/a/path/that/is/longer/than/it",
    ]  # fmt: skip


def test_the_error_of_a_single_window_is_no_number_in_json() -> None:
    winner = Winner(WINNER, (WINNER,), "uniform", Estimate(-0.1, inf, 1), 0)
    assert validation_record(winner)["standard_error"] is None


def test_a_file_is_held_against_llama_cpps_own_of_the_nearest_size() -> None:
    def figures(kl: float) -> Figures:
        log_prob = np.zeros((1, 1))
        return Figures.of(PositionErrors(np.full((1, 1), kl), np.ones((1, 1), bool), log_prob, log_prob))

    mix = MixProof("Q3_K_M", 2_000_000, figures(0.2))
    proof = Proof("f.gguf", 1_900_000, 8, 0.1, 8.5, 0.0, 1.0, 1.0, figures(0.1), mix=mix)
    assert against_mix(proof, mix) == (
        "The file is 5.0 % smaller than llama.cpp's Q3_K_M (2.000 MB, with the same importance matrix); its KL is 0.50 "
        "of that one's"
    )


def test_a_sample_can_do_nothing_to_the_terminal_and_is_broken_into_its_lines() -> None:
    out = Console(file=StringIO(), width=44)
    show_use(Path("my runs/f.gguf"), Sample("Why?", "[red]be\x1b[2Jcause\n  so[/red]", chat=True), out)
    assert isinstance(out.file, StringIO)
    assert out.file.getvalue().splitlines()[1:] == [
        "        llama-cli -m 'my runs/f.gguf'",
        "        llama-server -m 'my runs/f.gguf'",
        "To 'Why?' it answers: '[red]be[2Jcause",
        "so[/red]'",
    ]
