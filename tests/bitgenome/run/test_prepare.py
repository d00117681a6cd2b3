"""Artefacts are shared by digest, taken where they are whole and rebuilt where they are not."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config
from bitgenome.plan.objective import factored_tensors, tensors_by_rows
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate, measure_outputs
from bitgenome.storage.run_directory import RunDirectory
from evaluators.prepare.bank import BankError, tensor_file
from evaluators.prepare.output_factor import factor_file
from tests.bitgenome.conftest import Finished, Runs
from tests.conftest import no_progress
from workers.pool.base import SerialPool, Task


class CountingPool(SerialPool):
    """A serial pool that remembers what it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []

    def map(self, tasks):  # type: ignore[no-untyped-def]
        tasks: list[Task] = list(tasks)
        self.labels += [task.label for task in tasks]
        return super().map(tasks)


def builder(plan: Plan, pool: CountingPool) -> Callable[[], Path]:
    """What builds the bank from Hessians."""
    calibration, groups = calibrate(plan, read_windows(plan), pool, no_progress)
    return partial(build_bank, plan, calibration, groups, pool, no_progress)


def test_a_damaged_factor_is_measured_again_with_a_notice(
    runs: Runs, finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    plan, pool = make_plan(load_config(runs.write("factors"))), CountingPool()
    windows = read_windows(plan)
    outputs = measure_outputs(plan, windows, pool, no_progress)
    measure_outputs(plan, windows, pool, no_progress)
    assert pool.labels == ["output factors"], "measured once"
    pool.labels.clear()
    tied = [f"{tensor}@{use}" for tensor in tensors_by_rows(plan) for use in ("head", "lookup")]
    assert sorted(file.stem for file in outputs.glob("model.*")) == sorted(factored_tensors(plan) + tied)
    victim = factor_file(outputs, "model.layers.2.self_attn.k_proj.weight")
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 3])
    with caplog.at_level(logging.WARNING):
        measure_outputs(plan, windows, pool, no_progress)
    assert pool.labels == ["output factors"] and "k_proj.weight is damaged" in caplog.text
    assert victim.read_bytes() == whole


def test_a_truncated_bank_file_is_rebuilt_with_a_notice(
    runs: Runs, finished: Finished, caplog: pytest.LogCaptureFixture
) -> None:
    plan, pool = make_plan(load_config(runs.write("damaged"))), CountingPool()
    build = builder(plan, pool)
    bank = build()
    assert pool.labels == [], "everything is there already, from the run before"
    victim = tensor_file(bank, "model.layers.2.self_attn.k_proj.weight")
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 3])
    with caplog.at_level(logging.WARNING):
        build()
    assert pool.labels == ["bank[model.layers.2.self_attn.q_proj]"]
    assert "rebuilding model.layers.2.self_attn.k_proj.weight" in caplog.text
    assert victim.read_bytes() == whole


def test_a_bank_interrupted_between_tensors_goes_on_where_it_stopped(runs: Runs, finished: Finished) -> None:
    plan, pool = make_plan(load_config(runs.write("partial"))), CountingPool()
    build = builder(plan, pool)
    bank = build()
    (bank / "manifest.json").unlink()
    for block in (4, 5):
        tensor_file(bank, f"model.layers.{block}.mlp.down_proj.weight").unlink()
    build()
    assert pool.labels == ["bank[model.layers.4.mlp.down_proj]", "bank[model.layers.5.mlp.down_proj]"]


def test_a_run_begun_on_other_text_is_not_continued(runs: Runs, finished: Finished) -> None:
    directory = RunDirectory.open(runs.storage / "base")
    with pytest.raises(UserError, match="expected the text that .* was begun with"):
        directory.record.pin("text", "0" * 64)


def test_bank_errors_are_the_users_to_read() -> None:
    assert issubclass(BankError, UserError)
