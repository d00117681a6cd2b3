"""Where a run computes: what is refused, and what a pool is told."""

from typing import Any

import pytest

from bitgenome.common.errors import UserError
from bitgenome.config.run import parse_config
from workers.cluster.settings import WorkerSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 4, "max": 8}, "expected count, or min and max, found count 4 with them"),
        ({"min": 9, "max": 8}, r"expected min at most max \(8\), found 9"),
        ({"gpus_per_worker": 1.5}, "expected gpus_per_worker up to 1 or a whole number, found 1.5"),
        ({"resources": {"GPU": 1}}, "expected resources beside cpus_per_worker and gpus_per_worker, found GPU"),
        ({"straggler_factor": 1}, "straggler_factor"),
    ],
)
def test_placement_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"name": "a", "model": "m", "budget": {"bits_per_weight": 3}, "workers": values}, "a.yaml")


@pytest.mark.parametrize(
    ("values", "least", "most"),
    [({}, 1, None), ({"count": 4}, 4, 4), ({"max": 8}, 1, 8), ({"min": 0, "max": 8}, 0, 8), ({"min": 2}, 2, None)],
)
def test_a_count_is_fixed_and_everything_else_elastic(values: dict[str, int], least: int, most: int | None) -> None:
    elasticity = WorkerSettings(**values).elasticity
    assert (elasticity.minimum, elasticity.maximum) == (least, most)


def test_patience_comes_from_the_configuration() -> None:
    patience = WorkerSettings(deadline=60, straggler_factor=2.5, max_retries=1, start_timeout=900).patience
    assert (patience.deadline_s, patience.straggler_factor, patience.max_retries) == (60, 2.5, 1)
    assert patience.loading_s == 900


def test_where_a_run_computes_is_no_part_of_its_result() -> None:
    data = {"name": "a", "model": "m", "budget": {"bits_per_weight": 3}}
    here, there = (
        parse_config(data | {"workers": workers}, "a.yaml") for workers in ({}, {"max": 64, "gpus_per_worker": 0.25})
    )
    assert here.digest == there.digest
