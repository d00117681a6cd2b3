"""Rungs of text: who goes on, what is read anew, and what that costs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.allocation.repair import Repair
from search.allocation.seeds import seed_genomes
from search.loop.archive import EvaluationLog
from search.loop.checkpoint import Checkpoint
from search.loop.ladder import Ladder, promoted
from search.loop.search import run_search, with_table_rung
from search.strategies.genetic import GeneticStrategy
from search.strategies.settings import GeneticSettings
from search.types import Evaluation, Fidelity, Genome
from tests.search.synthetic import Landscape, middle_budget, random_table, transformer_space

SPACE = transformer_space(2)
TABLE = random_table(SPACE, 0)
BUDGET = middle_budget(SPACE)


def evaluation(index: int, *kl: float, loss: float | None = None) -> Evaluation:
    mean = float(np.mean(kl))
    return Evaluation((index,), mean if loss is None else loss, mean, 0.0, 1.0, 0.0, 9, "search", 512, window_kl=kl)


def genetic(generations: int = 6) -> GeneticStrategy:
    repair = Repair(SPACE, BUDGET, TABLE)
    settings = GeneticSettings(population=8, generations=generations, elites=3, brood=2)
    return GeneticStrategy(repair, seed_genomes(SPACE, BUDGET, [TABLE]), TABLE, settings)


class Recorder:
    """A landscape that keeps every call: genomes and fidelity."""

    def __init__(self) -> None:
        self.landscape = Landscape(SPACE, TABLE, 1.0, noise=0.02)
        self.calls: list[tuple[list[Genome], Fidelity]] = []

    def __call__(self, genomes: Sequence[Genome], fidelity: Fidelity) -> Iterator[Evaluation]:
        self.calls.append((list(genomes), fidelity))
        return self.landscape(genomes, fidelity)


def search(folder: Path, ladder: Ladder, strategy: GeneticStrategy) -> tuple[Recorder, EvaluationLog]:
    recorder, log = Recorder(), EvaluationLog(folder / "e.jsonl")
    evaluate = with_table_rung(recorder, SPACE, TABLE)
    run_search(strategy, evaluate, log, ladder, checkpoint=Checkpoint(folder / "c.json", "d"))
    return recorder, log


def test_the_better_share_goes_on_in_the_order_it_was_asked() -> None:
    found = [evaluation(i, *(loss + 0.001 * w for w in range(4))) for i, loss in enumerate((5.0, 1.0, 4.0, 2.0, 3.0))]
    assert promoted(found, 0.4) == [(1,), (3,)]
    assert promoted(found, 0.41) == [(1,), (3,), (4,)]
    assert promoted(found, 0.01) == [(1,)]


def test_a_genome_that_the_text_cannot_tell_from_the_last_one_promoted_goes_on_too() -> None:
    last, clear = (2.0, 2.0, 2.0, 2.0), (2.3, 2.2, 2.3, 2.2)
    doubtful = (1.8, 2.4, 1.9, 2.1)  # 0.05 worse, with a standard error of 0.13
    found = [evaluation(i, *kl) for i, kl in enumerate([(1.0, 1.0, 1.0, 1.0), clear, last, doubtful])]
    assert promoted(found, 0.5) == [(0,), (2,), (3,)]


def test_doubt_promotes_at_most_a_quarter_as_many_again() -> None:
    found = [evaluation(i, 1.0 + i / 1000, 2.0 - i / 1001, 3.0) for i in range(40)]
    assert promoted(found, 0.25) == [(i,) for i in range(13)]


def test_losses_that_are_no_numbers_stay_where_they_are_unless_all_are() -> None:
    found = [evaluation(i, 1.0, 1.0, loss=loss) for i, loss in enumerate((math.nan, 2.0, math.inf, 3.0))]
    assert promoted(found, 0.9) == [(1,), (3,)]
    assert promoted([found[0], found[2]], 0.9) == [(0,)]


def test_without_text_there_is_no_doubt() -> None:
    found = [replace(evaluation(i, 1.0), tokens=0, window_kl=(), loss=1.0) for i in range(4)]
    assert promoted(found, 0.5) == [(0,), (1,)]


def test_the_rungs_of_a_generation_read_nested_text_that_changes_by_schedule_and_seed() -> None:
    ladder = Ladder((0, 512, 2048), refresh=3, seed=1)
    draws = [ladder.fidelities(generation)[-1].draw for generation in range(9)]
    assert [len(set(draws[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(draws)) == 3
    assert 0 not in draws
    assert [g for g in range(9) if ladder.turns_to_new_text(g)] == [3, 6]
    assert ladder.fidelities(4) == tuple(Fidelity("search", t, draws[4] if t else 0) for t in (0, 512, 2048))
    assert not set(draws) & {replace(ladder, seed=2).fidelities(g)[-1].draw for g in range(9)}
    assert {fidelity.draw for g in range(9) for fidelity in Ladder((512, 2048)).fidelities(g)} == {0}


@pytest.mark.parametrize("rungs", [(), (0,), (512, 512), (1024, 512), (-1, 512)])
def test_rungs_that_do_not_rise_or_end_without_text_are_refused(rungs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected rungs of tokens that rise"):
        Ladder(rungs)


def test_every_genome_is_told_at_the_highest_rung_it_reached(tmp_path: Path) -> None:
    strategy = genetic()
    recorder, log = search(tmp_path, Ladder((0, 512, 1024)), strategy)
    highest = {e.genome: e.fidelity for e in sorted(log, key=lambda e: e.tokens)}
    told = {scored.genome: scored.fidelity for batch in strategy.told for scored in batch}
    assert told == highest
    assert {fidelity.tokens for fidelity in told.values()} == {0, 512, 1024}
    assert all(fidelity.tokens for _, fidelity in recorder.calls)  # the lowest rung asks no worker
    assert all(log.get(genome, Fidelity("search", 1024)) for genome in strategy.incumbents)


def test_a_ladder_reads_less_text_for_as_many_genomes(tmp_path: Path) -> None:
    read = {}
    for name, ladder in (("ladder", Ladder((256, 1024))), ("one rung", Ladder((1024,)))):
        strategy = genetic()
        (tmp_path / name).mkdir()
        recorder, _ = search(tmp_path / name, ladder, strategy)
        assert sum(map(len, strategy.told)) == strategy.expected_evaluations
        read[name] = sum(len(genomes) * fidelity.tokens for genomes, fidelity in recorder.calls)
        least = sum(n * tokens for n, tokens in zip(ladder.counts(8), ladder.rungs, strict=True))
        assert 6 * least <= read[name] <= 6 * 1.25 * least
    assert read["ladder"] < read["one rung"]


def test_new_text_scores_incumbents_again_in_the_same_call_and_ranks_parents_by_it_alone(tmp_path: Path) -> None:
    strategy, ladder = genetic(), Ladder((1024,), refresh=2, seed=5)
    recorder, log = search(tmp_path, ladder, strategy)
    assert [len(genomes) for genomes, _ in recorder.calls] == [8, 8, 3 + 8, 8, 3 + 8, 8]
    for generation in (2, 4):
        before = {genome for genomes, _ in recorder.calls[:generation] for genome in genomes}
        assert set(recorder.calls[generation][0][:3]) <= before
        assert recorder.calls[generation][1] == ladder.fidelities(generation)[-1]
    present = ladder.fidelities(5)[-1]
    best = sorted(log.at(present), key=lambda e: e.loss)[:3]
    assert strategy.incumbents == [e.genome for e in best]


def test_one_rung_without_refresh_reads_the_same_text_for_all_genomes_in_one_call_each_generation(
    tmp_path: Path,
) -> None:
    recorder, _ = search(tmp_path, Ladder((1024,)), genetic(3))
    assert [fidelity for _, fidelity in recorder.calls] == [Fidelity("search", 1024)] * 3


@pytest.mark.parametrize("refresh", [0, 1, 3])
@pytest.mark.parametrize("generations", [0, 1, 2, 3, 4, 7, 12])
def test_turns_to_new_text_are_counted_without_going_through_the_generations(refresh: int, generations: int) -> None:
    ladder = Ladder((64,), refresh=refresh)
    assert ladder.turns(generations) == sum(map(ladder.turns_to_new_text, range(generations)))
    assert ladder.turns(10**10) == (10**10 - 1) // refresh if refresh else ladder.turns(10**10) == 0
