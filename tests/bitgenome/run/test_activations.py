"""Claims about when a search reads 8-bit inputs, as llama.cpp does."""

import json

import pytest

from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.activations import RECORDED, choose_activations, decided, plan_as_decided
from bitgenome.run.prepare import evaluator_setup, record_inputs
from bitgenome.storage.run_directory import RunDirectory
from tests.bitgenome.conftest import Finished, Runs
from workers.pool.base import SerialPool


@pytest.mark.parametrize(
    ("plain", "rounded", "choice"), [(0.0303, 0.0306, "float"), (0.0335, 0.038, "q8"), (0, 0, "float")]
)
def test_more_than_two_percent_of_the_divergence_matter(plain: float, rounded: float, choice: str) -> None:
    assert decided(plain, rounded) == choice


@pytest.mark.parametrize(("bits", "choice"), [(3.5, "float"), (6.7, "q8")])
def test_what_is_decided_depends_on_the_budget_and_is_recorded(
    runs: Runs, finished: Finished, bits: float, choice: str
) -> None:
    config = load_config(runs.write(f"activations-{choice}"), [f"budget.bits_per_weight={bits}"])
    plan, run = make_plan(config), RunDirectory.create(config)
    record_inputs(plan, read_windows(plan), run)
    setup = evaluator_setup(plan, run, runs.bank("base"))
    assert choose_activations(plan, setup, run, SerialPool()) == choice
    kept = json.loads(run.record.file.read_text())[RECORDED]
    assert kept["chosen"] == choice and kept["q8_kl"] > 0 < kept["float_kl"]
    assert plan_as_decided(plan, run).config.evaluation.activations == choice
    assert choose_activations(plan, setup, run, FailingPool()) == choice  # not measured again


class FailingPool(SerialPool):
    def map(self, tasks):  # type: ignore[no-untyped-def]
        raise AssertionError("expected what is recorded to be enough")


def test_a_finished_run_says_what_it_decided(runs: Runs, finished: Finished) -> None:
    record = json.loads((runs.storage / "base" / "run.json").read_text())
    assert record[RECORDED]["chosen"] == "float"
    assert "8-bit inputs change the KL of a uniform genome" in finished.stderr
