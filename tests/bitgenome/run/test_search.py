"""Progress of a search as the log and generations.jsonl show it."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from bitgenome.plan.memory import MOST_TOGETHER
from bitgenome.run.search import divided, show_progress
from search.loop.search import Progress
from search.types import Evaluation

BEST = Evaluation((0,), 0.5, 0.4, 1.0, 1.0, 1.0, 2_000, "search", 64)
FOUND = {"surrogate_correlation": 0.834, "surrogate_coverage": 0.7, "screened": True}


def test_the_log_says_how_far_the_surrogate_can_be_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    show_progress(tmp_path / "g.jsonl", Progress(1, 20, 40, BEST, {}))
    show_progress(tmp_path / "g.jsonl", Progress(2, 40, 40, BEST, FOUND))
    assert caplog.messages[0] == "generation 1: 20 of 40 genomes, best loss 0.500000 (KL 0.400000) in 2,000 bytes"
    assert caplog.messages[1].endswith(
        "bytes; predicted losses (rank correlation 0.83, 70 % within their error) chose the offspring"
    )


def test_a_generation_told_again_replaces_its_line(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    for generation, loss in ((1, 3.0), (2, 2.0), (2, 1.0), (3, float("nan"))):
        show_progress(path, Progress(generation, 20, 60, replace(BEST, loss=loss), FOUND))
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(record["generation"], record["best_loss"]) for record in records] == [(1, 3.0), (2, 1.0), (3, None)]
    assert all(record["surrogate_correlation"] == 0.834 and record["screened"] for record in records)


@pytest.mark.parametrize(
    ("genomes", "workers", "sizes"),
    [
        (20, 1, [20]),
        (20, 2, [7, 7, 2, 2, 1, 1]),
        (64, 2, [22, 22, 7, 7, 2, 2, 1, 1]),
        (64, 64, [1] * 64),
        (5, 8, [1] * 5),
        (10, 4, [2, 2, 2, 2, 1, 1]),
        (512, 64, [6] * 64 + [1] * 128),
        (70, 1, [32, 32, 6]),
    ],
)
def test_a_generation_is_divided_into_large_parts_that_share_and_small_ones_that_fill_the_end(
    genomes: int, workers: int, sizes: list[int]
) -> None:
    ordered = [(n,) for n in range(genomes)]
    parts = divided(ordered, workers)
    assert [len(part) for part in parts] == sizes
    assert [genome for part in parts for genome in part] == ordered
    assert max(sizes) <= MOST_TOGETHER
