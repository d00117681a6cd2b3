"""The type of the search's products is chosen once, recorded, and kept by a run that is resumed elsewhere."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitgenome.run.compute import choose_compute
from bitgenome.storage.run_record import RunRecord
from evaluators.prepare.bank import bank_digest
from quantizers.settings import CompensationSettings
from workers.pool.base import SerialPool


@pytest.mark.parametrize(
    ("configured", "recorded", "expected"),
    [
        ("auto", {}, {"type": "float32", "device": "cpu"}),
        ("bfloat16", {}, {"type": "bfloat16", "device": "cpu"}),
        ("auto", {"compute": {"type": "bfloat16", "device": "cuda"}}, {"type": "bfloat16", "device": "cuda"}),
    ],
)
def test_compute_is_chosen_once(
    tmp_path: Path, configured: str, recorded: dict[str, Any], expected: dict[str, str]
) -> None:
    run: Any = SimpleNamespace(record=RunRecord(tmp_path / "run.json", recorded))
    plan: Any = SimpleNamespace(config=SimpleNamespace(evaluation=SimpleNamespace(compute=configured)))
    assert choose_compute(plan, run, SerialPool()) == expected
    assert run.record["compute"] == expected
    if not recorded:
        assert json.loads((tmp_path / "run.json").read_text())["compute"] == expected


def test_a_bank_of_an_accelerator_is_another_than_a_cpus() -> None:
    parts = ("model", "calibration", {}, CompensationSettings(), {})
    digests = {bank_digest(*parts, device=device) for device in ("cpu", "cuda")} | {bank_digest(*parts)}
    assert len(digests) == 2
    assert bank_digest(*parts) != bank_digest(*parts[:3], replace(parts[3], damping=0.02), {})
