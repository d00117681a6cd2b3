"""Claims about the probes from which a run's time is forecast."""

import json
import time
from pathlib import Path

import pytest
import torch

from evaluators.model.folder import ModelFolder
from evaluators.probes.measure import MeasureRates, cache_seconds
from evaluators.probes.rates import Rates, Rounding
from evaluators.probes.rounding import column_and_weight, random_hessian
from quantizers.settings import CompensationSettings, Sparsity
from tests.conftest import EMBEDDED
from tests.small_models import save_small_model
from workers.pool.base import SerialPool

KINDS = (
    Rounding(256, ("Q2_K", "Q4_K")),
    Rounding(64, ("Q4_0", "Q8_0")),
    Rounding(256, ("Q4_K",), Sparsity(0.5)),
    Rounding(256, ("Q4_K",), two_sided=True),
)


def test_rows_that_do_not_divide_into_large_blocks_read_eight_bit_inputs_too(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "llama")  # its rows have 64 weights
    task = MeasureRates(path, 16, KINDS[1:2], CompensationSettings(), "auto", "q8")
    (rates,) = SerialPool().map([task])
    assert rates.block > 0


def test_writing_counts_what_attention_reads_of_earlier_positions(tmp_path: Path) -> None:
    few, many = (cache_seconds(ModelFolder(EMBEDDED), torch.device("cpu"), torch.float32, n) for n in (8, 1024))
    assert many > 4 * few > 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 256}))
    (tmp_path / "model.safetensors").symlink_to(EMBEDDED / "model.safetensors")
    assert cache_seconds(ModelFolder(tmp_path), torch.device("cpu"), torch.float32, 8) == 0


def test_a_machine_so_busy_that_few_rows_take_as_long_as_many_gives_rates_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    taken = iter([3.0, 2.0, 2.5, 2.0, 2.0, 2.5])  # seconds of few and of many rows, three times
    monkeypatch.setattr("evaluators.probes.rounding.seconds_of", lambda work, device: next(taken))
    column, weight = column_and_weight(KINDS[1], random_hessian(64, cpu), CompensationSettings(), cpu)
    assert column == pytest.approx(2.0 / 64 * (1 - 32 / 1536)) and weight == pytest.approx(2.0 / 1536 / 64)
    taken = iter([3.0, 2.0, 1.0, 2.0])  # the second time few rows take less
    column, weight = column_and_weight(KINDS[1], random_hessian(64, cpu), CompensationSettings(), cpu)
    assert weight == pytest.approx(1.0 / (1536 - 32) / 64) and column == pytest.approx(1.0 / 64 - 32 * weight)


def test_rates_are_measured_for_every_kind_without_reading_weights() -> None:
    task = MeasureRates(EMBEDDED, 128, KINDS, CompensationSettings(), "auto", "q8")
    started = time.monotonic()
    (rates,) = SerialPool().map([task])
    assert time.monotonic() - started < 60  # seconds: a probe, not a benchmark
    assert rates.rounding.keys() == {kind.key for kind in KINDS}
    assert rates.hessian.keys() == {"64", "256"}
    single = (rates.block_float32, rates.block_gradient, rates.head, rates.head_gradient, rates.decode, rates.factor)
    assert all(
        value > 0 for value in (*single, *(rate.weight for rate in rates.rounding.values()), *rates.hessian.values())
    )
    assert rates.threads == 1 and torch.get_num_threads() >= 1
    assert Rates.from_json(json.loads(json.dumps(rates.to_json()))) == rates
