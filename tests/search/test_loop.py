"""The loop: nothing is evaluated twice, a killed run resumes to the same end, and the winner is never worse."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from search.archive import EvaluationLog
from search.checkpoint import Checkpoint
from search.loop import Progress, choose_winner, pareto_records, run_search
from search.repair import Repair
from search.strategies.random_search import RandomSettings, RandomStrategy
from search.types import Evaluation, Fidelity, Genome
from tests.search.killed_run import run
from tests.search.synthetic import SEARCH, VALIDATION, Landscape, middle_budget, random_table, transformer_space

SPACE = transformer_space(2)
ROOT = Path(__file__).parents[2]


def landscape() -> Landscape:
    return Landscape(SPACE, random_table(SPACE, 0), 1.0)


def random_strategy(evaluations: int = 20) -> RandomStrategy:
    return RandomStrategy(Repair(SPACE, middle_budget(SPACE)), RandomSettings(evaluations, batch_size=8))


@pytest.mark.parametrize("strategy", ["genetic", "optuna", "random", "exact"])
def test_a_run_killed_at_any_byte_of_its_log_resumes_to_the_same_end(strategy: str, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    expected_log, expected, calm_landscape = run(calm, strategy)
    rng = random.Random(strategy)
    deaths = 0
    for _ in range(2):
        left = rng.randrange(1, (calm / "evaluations.jsonl").stat().st_size // 3)
        command = [sys.executable, "-m", "tests.search.killed_run", str(killed), strategy, str(left)]
        deaths += (
            subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
        )
    assert deaths == 2
    log, winner, resumed_landscape = run(killed, strategy)
    assert list(log) == list(expected_log)
    assert winner == expected
    assert (killed / "evaluations.jsonl").read_bytes() == (calm / "evaluations.jsonl").read_bytes()
    assert (killed / "checkpoint.json").read_bytes() == (calm / "checkpoint.json").read_bytes()
    assert 0 < len(resumed_landscape.calls) < len(calm_landscape.calls)


def test_a_finished_run_evaluates_nothing_when_it_is_started_again(tmp_path: Path) -> None:
    _, expected, _ = run(tmp_path, "genetic")
    _, winner, again = run(tmp_path, "genetic")
    assert winner == expected
    assert again.calls == []


def test_a_lost_checkpoint_costs_no_evaluation(tmp_path: Path) -> None:
    _, expected, _ = run(tmp_path, "genetic")
    (tmp_path / "checkpoint.json").unlink()
    _, winner, again = run(tmp_path, "genetic")
    assert winner == expected
    assert again.calls == []


def test_progress_counts_up_to_what_was_expected_and_the_best_never_gets_worse(tmp_path: Path) -> None:
    seen: list[Progress] = []
    best = run_search(
        random_strategy(), landscape(), EvaluationLog(tmp_path / "e.jsonl"), SEARCH,
        checkpoint=Checkpoint(tmp_path / "c.json", "d"), on_progress=seen.append,
    )  # fmt: skip
    assert [(p.generation, p.evaluations, p.expected) for p in seen] == [(1, 8, 20), (2, 16, 20), (3, 20, 20)]
    assert seen[0].best.loss >= seen[1].best.loss >= seen[2].best.loss == best.loss


def test_the_order_of_answers_does_not_matter(tmp_path: Path) -> None:
    truth = landscape()

    def backwards(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return truth(genomes[::-1], fidelity)

    best = []
    for i, evaluate in enumerate((truth, backwards)):
        log = EvaluationLog(tmp_path / f"{i}.jsonl")
        best.append(
            run_search(random_strategy(), evaluate, log, SEARCH, checkpoint=Checkpoint(tmp_path / f"{i}.json", "d"))
        )
    assert best[0] == best[1]


def test_an_evaluator_that_leaves_out_a_genome_or_answers_one_twice_is_refused(tmp_path: Path) -> None:
    truth = landscape()

    def twice(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return truth([*genomes, genomes[0]], fidelity)

    def short(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return truth(genomes[:-1], fidelity)

    for i, wrong in enumerate((twice, short)):
        log = EvaluationLog(tmp_path / f"{i}.jsonl")
        with pytest.raises(ValueError, match="must answer each genome once"):
            run_search(random_strategy(), wrong, log, SEARCH, checkpoint=Checkpoint(tmp_path / f"{i}.json", "d"))


def test_a_search_without_any_finite_loss_has_no_best(tmp_path: Path) -> None:
    truth = landscape()

    def broken(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return (replace(evaluation, loss=float("nan")) for evaluation in truth(genomes, fidelity))

    log = EvaluationLog(tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match="none of 20 evaluated genomes has a finite loss"):
        run_search(random_strategy(), broken, log, SEARCH, checkpoint=Checkpoint(tmp_path / "c.json", "d"))


def test_the_winner_is_chosen_by_validation_and_never_worse_there_than_any_reference(tmp_path: Path) -> None:
    truth, overfitted = landscape(), random_strategy().ask()[0]

    def evaluate(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        """On the search text one genome looks best, which on validation text is worst."""
        for evaluation in truth(genomes, fidelity):
            fake = 0.0 if fidelity == SEARCH else 1.0
            yield replace(evaluation, loss=fake) if evaluation.genome == overfitted else evaluation

    log = EvaluationLog(tmp_path / "e.jsonl")
    best = run_search(random_strategy(), evaluate, log, SEARCH, checkpoint=Checkpoint(tmp_path / "c.json", "d"))
    references = [SPACE.smallest(), (1,) * len(SPACE.genes)]
    winner = choose_winner(log, evaluate, search=SEARCH, validation=VALIDATION, references=references, keep=4)
    assert best.genome == overfitted != winner.evaluation.genome
    assert {overfitted, *references} < {finalist.genome for finalist in winner.finalists}
    assert len(winner.finalists) == 6
    assert all(finalist.fidelity == VALIDATION for finalist in winner.finalists)
    assert winner.evaluation.loss == min(finalist.loss for finalist in winner.finalists)


def test_pareto_records_mark_the_front_of_each_fidelity() -> None:
    base = Evaluation((0,), 1.0, 1.0, 1.0, 1.0, 1.0, 10, "search", 8)
    made = [
        base,
        replace(base, genome=(1,), loss=2.0, file_bytes=11),  # larger and worse
        replace(base, genome=(2,), loss=0.5, file_bytes=12),
        replace(base, genome=(3,), loss=0.6, file_bytes=12),  # as large and worse
        replace(base, genome=(4,), loss=0.9, file_bytes=13, tokens=16),  # alone at its fidelity
        replace(base, genome=(5,), loss=float("nan")),
    ]
    records = pareto_records(reversed(made))
    assert [(r["genome"][0], r["front"]) for r in records] == [(0, True), (1, False), (2, True), (3, False), (4, True)]
