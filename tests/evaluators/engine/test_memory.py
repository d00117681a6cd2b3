"""A search keeps to the memory that it was given, and takes what was predicted; what is replaced is gone."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import SLACK, measured_apart
from bitgenome.common.devices import ACCELERATOR_SHARE, accelerator_share
from evaluators.engine.evaluator import EvaluatorSetup, GenomeEvaluator, warm
from evaluators.gradient.sensitivity import GradientEvaluator
from evaluators.healing.whole import TrainedModel
from search.types import Fidelity
from tests.conftest import SmallBank
from workers.pool.base import SerialPool

LIMIT = 240 << 20


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """A search over ten blocks of width 512 under a limit on the memory that its process may write to."""
    path: Path = tmp_path_factory.mktemp("streamed")
    return measured_apart({"path": str(path), "layers": 10, "genomes": 4, "tokens": 512, "limit": LIMIT})


def test_a_model_whose_weights_exceed_the_limit_is_searched_within_it(streamed: dict[str, float]) -> None:
    assert streamed["all_weights"] > 1.3 * LIMIT
    assert not streamed["resident"]
    assert streamed["evaluations"] == 8
    assert streamed["measured"] < (1 + SLACK) * streamed["predicted"] <= (1 + SLACK) * LIMIT


@pytest.mark.long
def test_what_a_resident_search_takes_is_predicted(tmp_path: Path) -> None:
    case = {"path": str(tmp_path), "layers": 4, "genomes": 8, "tokens": 1024, "limit": None}
    resident = measured_apart(case)
    assert resident["resident"]
    assert resident["predicted"] == pytest.approx(resident["measured"], rel=SLACK)


def parts_of(kind: Any, small_bank: SmallBank, state: dict[Any, Any]) -> list[weakref.ref[Any]]:
    """References to a worker's warm object after its work, to its modules and to one of its weights."""
    made = warm(kind, small_bank.setup(), state)
    if isinstance(made, GenomeEvaluator):
        made.evaluate([small_bank.space.smallest(), small_bank.space.largest()], Fidelity("search", 512))
        model, weight = made.sweep.model, next(iter(made.sweep.weights._stays.weights.values()))
    else:
        model = made.model
        weight = model.weight(model.head_name)
    return [weakref.ref(part) for part in (made, model, model.blocks[0], weight)]


@pytest.mark.parametrize("kind", [GenomeEvaluator, GradientEvaluator, TrainedModel])
def test_what_a_worker_held_is_gone_before_its_successor_measures_what_is_free(
    kind: Any, small_bank: SmallBank
) -> None:
    pool = SerialPool()
    parts = parts_of(kind, small_bank, pool._state)

    def successor(setup: EvaluatorSetup) -> list[Any]:
        return [part() for part in parts]

    assert all(part() is not None for part in parts)
    assert warm(successor, small_bank.setup(), pool._state) == [None] * len(parts)
    parts = parts_of(kind, small_bank, pool._state)
    pool.close()
    assert [part() for part in parts] == [None] * len(parts)


def test_a_worker_takes_its_share_of_an_accelerator_and_no_more_than_is_free() -> None:
    gib = 1 << 30
    whole, quarter = accelerator_share(20 * gib, 24 * gib, 1.0), accelerator_share(20 * gib, 24 * gib, 0.25)
    assert (whole, quarter) == (int(ACCELERATOR_SHARE * 20 * gib), int(ACCELERATOR_SHARE * 6 * gib))
    assert accelerator_share(2 * gib, 24 * gib, 0.25) == int(ACCELERATOR_SHARE * 2 * gib)
