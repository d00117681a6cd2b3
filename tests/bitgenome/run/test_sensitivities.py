"""Sensitivity tables on the pool: resumed part by part, seeding the search, and compared by the command line."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bitgenome.config.run import load_config
from bitgenome.observe.monitoring import Monitor
from bitgenome.plan.plan import make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate
from bitgenome.run.prepare import Artefacts, evaluator_setup, record_inputs
from bitgenome.run.search import search
from bitgenome.run.sensitivities import GRADIENTS, Measurement, measure_sensitivities, table_of
from bitgenome.run.sensitivity_comparison import MEASURED_BY, spread_budgets
from bitgenome.storage.run_directory import RunDirectory
from search.allocation.seeds import nearest_uniform
from tests.bitgenome.conftest import Runs, call_here
from tests.conftest import no_progress
from workers.pool.base import SerialPool, Task

ALONE = {"workers": {"ray": "off"}}


class FailingPool(SerialPool):
    """A serial pool that remembers what it ran, and stops before task ``last``."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last = last
        self.labels: list[str] = []

    def map(self, tasks):  # type: ignore[no-untyped-def]
        tasks: list[Task] = list(tasks)
        for index, result in enumerate(super().map(tasks)):
            if index == self.last:
                raise KeyboardInterrupt
            self.labels.append(tasks[index].label)
            yield result


@pytest.fixture(scope="module")
def measurement(runs: Runs) -> Measurement:
    """Of gradients, before anything is measured."""
    config = load_config(runs.write("tables"), ["text.tokens.sensitivity=512"])
    plan, run, pool = make_plan(config), RunDirectory.create(config), SerialPool()
    windows = read_windows(plan)
    record_inputs(plan, windows, run)
    bank = build_bank(plan, *calibrate(plan, windows, pool, no_progress), pool, no_progress)
    return Measurement(plan, evaluator_setup(plan, run, bank), windows, "gradient")


def test_an_interrupted_measurement_goes_on_where_it_stopped(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluators.gradient.sensitivity.PART_TOKENS", 256)
    first, second, third = FailingPool(1), FailingPool(), FailingPool()
    with pytest.raises(KeyboardInterrupt):
        measurement.frame(first, no_progress)
    before = measurement.seconds
    frame = measurement.frame(second, no_progress)
    assert (first.labels, second.labels) == (["gradient[1-1]"], ["gradient[2-2]"])
    assert 0 < before < measurement.seconds
    assert measurement.frame(third, no_progress).equals(frame)
    assert third.labels == []


def test_every_measure_has_a_directory_of_its_own(measurement: Measurement) -> None:
    measures = [replace(measurement, measure=m) for m in (*GRADIENTS, "kl", "around_base")]
    assert len({m.digest for m in measures}) == len(measures)


def test_around_the_base_its_own_choice_is_free_and_no_loss_of_the_table_is_negative(measurement: Measurement) -> None:
    around = replace(measurement, measure="around_base")
    space, frame = around.setup.space, around.frame(SerialPool(), no_progress)
    base = nearest_uniform(space, around.plan.budget)
    assert around.base == base
    own = frame[frame.choice == frame.gene.map(dict(zip([g.name for g in space.genes], base, strict=True)))]
    assert (own.around_base == 0).all() and len(own) == len(space.genes)
    assert (frame.around_base < 0).any()
    assert min(values.min() for values in table_of(space, frame, "around_base").loss) == 0


def test_a_search_starts_from_the_table_that_it_is_configured_for(runs: Runs, measurement: Measurement) -> None:
    changes = ["text.tokens.sensitivity=512", "sensitivity.measure=gradient", "search.strategy=exact"]
    config = load_config(runs.write("by-gradient"), changes)
    plan, run, pool = make_plan(config), RunDirectory.create(config), SerialPool()
    frame = measure_sensitivities(plan, measurement.setup, measurement.windows, run, pool, no_progress)
    assert pd.read_parquet(run.path / "sensitivity.parquet").equals(frame)
    assert frame.gradient.equals(measurement.frame(pool, no_progress).gradient)
    monitor = Monitor(pool.statistics, None)
    found = search(plan, Artefacts(plan, measurement.setup, frame), run, pool, no_progress, monitor)
    assert {"exact gradient", "exact reconstruction"} <= found.seeds.keys()
    assert "exact kl" not in found.seeds


def test_the_command_compares_every_measure_and_measures_nothing_twice(runs: Runs) -> None:
    path = runs.write("compared", **ALONE)
    arguments = ("sensitivity", path, "--genomes", "6", "--bits", "3.25", "--bits", "3.5")
    done = call_here(*arguments)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(runs.storage / "compared" / "sensitivity-comparison.parquet")
    assert frame.measure.tolist() == [measure for measure in MEASURED_BY for _ in range(2)]
    assert all(f" {measure} " in done.stdout for measure in MEASURED_BY), "names are not cut"
    assert pd.read_csv(runs.storage / "compared" / "sensitivity-comparison.csv").shape == frame.shape
    by = frame.set_index(["measure", frame.groupby("measure").cumcount()])
    assert by.loc[("gradient", 0), "spearman_spread"] > 0.9
    assert by.loc[("gradient", 0), "seconds"] < by.loc[("kl", 0), "seconds"]
    assert (frame.bits_per_weight.to_numpy().reshape(-1, 2) <= [3.25, 3.5]).all()
    again = call_here(*arguments)
    assert again.returncode == 0, again.stderr
    assert not [line for line in again.stderr.splitlines() if "sensitivities" in line or "genomes" in line]
    assert pd.read_parquet(runs.storage / "compared" / "sensitivity-comparison.parquet").equals(frame)


def test_a_budget_of_the_command_out_of_reach_is_refused_before_any_work(runs: Runs) -> None:
    done = call_here("sensitivity", runs.write("unmet", **ALONE), "--bits", "1.5")
    assert done.returncode == 2
    assert "cannot be met" in done.stderr
    assert not (runs.storage / "unmet").exists()


def test_sizes_are_spread_over_the_range(measurement: Measurement) -> None:
    space = measurement.setup.space
    sizes = np.array([budget.file_bytes for budget in spread_budgets(space, 5)])
    assert np.ptp(np.diff(sizes)) <= 1
    assert space.file_bytes(space.smallest()) < sizes[0] < sizes[-1] < space.file_bytes(space.largest())
