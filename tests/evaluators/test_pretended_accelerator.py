"""No stage mixes devices, an accelerator's chunks give a CPU's bytes, and no change launches more kernels unnoticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import device_stages as stages
from tests.conftest import REPOSITORY

# Kernels of each stage of the walk, within some 5 %. Lower a number where one falls.
BUDGET = {
    "calibration": 250, "bank": 127_000, "codebooks": 28_500, "outputs": 5_100, "two-sided": 287_000, "rows": 95_000,
    "resident": 1_010, "streamed": 1_330, "read ahead": 65,
    "gradient": 655, "exact": 1_300, "healing": 1_000, "blocks": 1_460, "proof": 250,
}  # fmt: skip


def test_every_stage_runs_on_an_accelerator_as_on_a_cpu(tmp_path: Path) -> None:
    model = stages.block_model(tmp_path / "model", **stages.TINY)
    walk = [sys.executable, "-m", "tests.pretended.walk", str(tmp_path / "walk"), str(model)]
    done = subprocess.run(walk, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]  # MixError: the traceback names the place
    found = json.loads(done.stdout)

    cpu = stages.Subject("cpu", model, tmp_path / "cpu", ("W2", "W8"), (), **stages.LITTLE_WORK)
    cpu.calibration.symlink_to(tmp_path / "walk" / "calibration")  # of another attention kernel than the CPU's
    cpu.groups = [file.stem for file in cpu.calibration.glob("model.*.safetensors")]
    stages.build_bank(cpu, lambda figures: None)
    for ours in cpu.bank.glob("*.safetensors"):
        theirs = load_file(tmp_path / "walk" / "bank" / ours.name)
        assert all((theirs[name] == packed).all() for name, packed in load_file(ours).items()), ours.name

    kl = {stage: figures.get("kl") for stage, figures in found["figures"].items()}
    assert kl["resident"] == pytest.approx(stages.evaluated(cpu, "float32", 3), rel=1e-3)
    assert kl["streamed"] == pytest.approx(kl["resident"], rel=0.05)  # products in bfloat16
    assert not found["figures"]["streamed"]["resident"]
    assert kl["proof"] == pytest.approx(kl["blocks"]["test"][0], rel=1e-3)
    over = {stage: kernels for stage, kernels in found["kernels"].items() if kernels > BUDGET[stage]}
    assert not over, f"more kernels than before: {over} of {BUDGET}"
