"""The loop: nothing is evaluated twice, a killed run resumes to the same end, and the winner is never worse."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from search.allocation.repair import Repair
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.ladder import Ladder
from search.loop.search import Progress, run_search
from search.loop.winner import choose_winner, pareto_records, search_best
from search.strategies.factory import make_strategy
from search.strategies.random_search import RandomStrategy
from search.strategies.settings import RandomSettings
from search.types import Evaluation, Fidelity, Genome
from tests.search.loop.killed_run import SETTINGS, run
from tests.search.synthetic import SEARCH, VALIDATION, Landscape, middle_budget, random_table, transformer_space

SPACE = transformer_space(2)
LADDER = Ladder((SEARCH.tokens,))
ROOT = Path(__file__).parents[3]


def landscape() -> Landscape:
    return Landscape(SPACE, random_table(SPACE, 0), 1.0)


def random_strategy(evaluations: int = 20) -> RandomStrategy:
    return RandomStrategy(Repair(SPACE, middle_budget(SPACE)), RandomSettings(evaluations, batch_size=8))


@pytest.mark.parametrize(
    ("strategy", "ladder"),
    [
        *((strategy, "one rung") for strategy in ("genetic", "optuna", "random", "exact")),
        ("optuna", "rungs"),
        ("genetic", "rungs of new text"),
    ],
)
def test_a_run_killed_at_any_byte_of_its_log_resumes_to_the_same_end(
    strategy: str, ladder: str, tmp_path: Path
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    expected_log, expected, calm_landscape = run(calm, strategy, ladder)
    rng = random.Random(strategy)
    deaths = 0
    for _ in range(2):
        left = rng.randrange(1, (calm / "evaluations.jsonl").stat().st_size // 3)
        command = [sys.executable, "-m", "tests.search.loop.killed_run", str(killed), strategy, ladder, str(left)]
        deaths += (
            subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
        )
    assert deaths == 2
    log, winner, resumed_landscape = run(killed, strategy, ladder)
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
        random_strategy(), landscape(), EvaluationLog(tmp_path / "e.jsonl"), LADDER,
        checkpoint=Checkpoint(tmp_path / "c.json", "d"), on_progress=seen.append,
    )  # fmt: skip
    assert [(p.generation, p.genomes, p.expected) for p in seen] == [(1, 8, 20), (2, 16, 20), (3, 20, 20)]
    assert seen[0].best.loss >= seen[1].best.loss >= seen[2].best.loss == best.loss
    assert [p.diagnostics for p in seen] == [{}] * 3


def test_progress_tells_how_the_predictions_of_each_generation_but_the_first_held(tmp_path: Path) -> None:
    seen: list[Progress] = []
    checkpoint = Checkpoint(tmp_path / "c.json", "d")
    budget, table = middle_budget(SPACE), random_table(SPACE, 0)
    strategy = make_strategy("genetic", SPACE, budget, tables=[table], settings=SETTINGS["genetic"])
    log = EvaluationLog(tmp_path / "e.jsonl")
    run_search(strategy, landscape(), log, LADDER, checkpoint=checkpoint, on_progress=seen.append)
    scores = strategy.state_dict()["screening"]["scores"]
    assert seen[0].diagnostics == {}
    assert [p.diagnostics["surrogate_correlation"] for p in seen[1:]] == [score["correlation"] for score in scores]
    assert [p.diagnostics["surrogate_coverage"] for p in seen[1:]] == [score["coverage"] for score in scores]


def test_the_order_of_answers_does_not_matter(tmp_path: Path) -> None:
    truth = landscape()

    def backwards(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return truth(genomes[::-1], fidelity)

    best = []
    for i, evaluate in enumerate((truth, backwards)):
        log = EvaluationLog(tmp_path / f"{i}.jsonl")
        best.append(
            run_search(random_strategy(), evaluate, log, LADDER, checkpoint=Checkpoint(tmp_path / f"{i}.json", "d"))
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
            run_search(random_strategy(), wrong, log, LADDER, checkpoint=Checkpoint(tmp_path / f"{i}.json", "d"))


def test_a_search_without_any_finite_loss_has_no_best(tmp_path: Path) -> None:
    truth = landscape()

    def broken(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        return (replace(evaluation, loss=float("nan")) for evaluation in truth(genomes, fidelity))

    log = EvaluationLog(tmp_path / "e.jsonl")
    with pytest.raises(ValueError, match="none of the evaluated genomes has a finite loss"):
        run_search(random_strategy(), broken, log, LADDER, checkpoint=Checkpoint(tmp_path / "c.json", "d"))


def test_the_winner_is_chosen_by_validation_and_never_worse_there_than_any_reference(tmp_path: Path) -> None:
    truth, overfitted = landscape(), random_strategy().ask()[0]

    def evaluate(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        """On the search text one genome looks best, which on validation text is worst."""
        for evaluation in truth(genomes, fidelity):
            fake = 0.0 if fidelity == SEARCH else 1.0
            yield replace(evaluation, loss=fake) if evaluation.genome == overfitted else evaluation

    log = EvaluationLog(tmp_path / "e.jsonl")
    best = run_search(random_strategy(), evaluate, log, LADDER, checkpoint=Checkpoint(tmp_path / "c.json", "d"))
    references = {"smallest": SPACE.smallest(), "second": (1,) * len(SPACE.genes)}
    winner = choose_winner(log, evaluate, ladder=LADDER, validation=VALIDATION, references=references, keep=4)
    assert best.genome == overfitted != winner.evaluation.genome
    assert {overfitted, *references.values()} < {finalist.genome for finalist in winner.finalists}
    assert len(winner.finalists) == 6
    assert all(finalist.fidelity == VALIDATION for finalist in winner.finalists)
    assert winner.evaluation.loss == min(finalist.loss for finalist in winner.finalists)


def test_the_lead_over_the_best_reference_is_paired_and_counts_ties(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "e.jsonl")
    references = {"smallest": SPACE.smallest(), "good": (2,) * len(SPACE.genes), "same": (2,) * len(SPACE.genes)}
    base = landscape().evaluation(SPACE.largest(), VALIDATION)
    kl = {SPACE.largest(): (1.0, 2.0, 3.0, 4.0), references["good"]: (1.2, 2.1, 3.2, 4.1)}

    def evaluate(genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        for genome in genomes:
            windows = kl.get(genome, (9.0, 9.0, 9.0, 9.0))
            yield replace(base, genome=genome, loss=sum(windows) / 4, kl=sum(windows) / 4, window_kl=windows)

    log.append(landscape().evaluation(SPACE.largest()))
    winner = choose_winner(log, evaluate, ladder=LADDER, validation=VALIDATION, references=references)
    assert winner.evaluation.genome == SPACE.largest()
    assert winner.reference == "good"
    assert winner.lead is not None
    assert winner.lead.mean == pytest.approx(-0.15)
    assert winner.lead.standard_error == pytest.approx((4 * 0.05**2 / 3 / 4) ** 0.5)
    assert winner.ties == 0
    kl[references["good"]] = (0.0, 3.1, 2.0, 5.0)  # as good on average, but for noise
    (tmp_path / "f.jsonl").write_bytes((tmp_path / "e.jsonl").read_bytes().splitlines(keepends=True)[0])
    tied = choose_winner(
        EvaluationLog(tmp_path / "f.jsonl"), evaluate, ladder=LADDER, validation=VALIDATION, references=references
    )
    assert (tied.evaluation.genome, tied.ties) == (SPACE.largest(), 1)


def test_a_reference_that_wins_leads_over_none(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "e.jsonl")
    log.append(landscape().evaluation(SPACE.smallest()))
    winner = choose_winner(log, landscape(), ladder=LADDER, validation=VALIDATION, references={"best": SPACE.largest()})
    assert (winner.reference, winner.lead) == ("best", None)


def test_finalists_are_the_best_of_the_last_text_and_the_best_of_each_text_before(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path / "e.jsonl")
    base = landscape().evaluation(SPACE.smallest())
    losses = {7: {0: 0.1, 1: 0.2}, 3: {0: 0.5, 2: 0.4}, 5: {3: 0.9, 4: 0.8, 5: 0.7}}  # by draw: by first gene
    for draw, found in losses.items():
        for gene, loss in found.items():
            log.append(replace(base, genome=(gene, *base.genome[1:]), loss=loss, draw=draw))
        log.append(replace(base, genome=(5, 5, *base.genome[2:]), loss=0.0, draw=draw, tokens=512))  # a lower rung
    assert [genome[0] for genome in search_best(log, LADDER, keep=2)] == [5, 4, 0, 2]
    assert [genome[0] for genome in search_best(log, LADDER, keep=1)] == [5, 2]


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
