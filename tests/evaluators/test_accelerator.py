"""Every stage runs on an accelerator: nothing mixes devices, and independent paths give the same divergence."""

from math import isfinite
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import device_stages as stages
from bitgenome.common import replay
from bitgenome.common.devices import best_device
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.table import FORMATS
from quantizers.kernels import choice as kernels
from quantizers.rounding.sparsegpt import compensate
from tests.quantizers.weights import correlated_hessian, heavy_tailed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(best_device().type == "cpu", reason="needs an accelerator"),
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> stages.Subject:
    """One small block, calibrated, with its bank."""
    folder: Path = tmp_path_factory.mktemp("accelerator")
    model = stages.block_model(folder / "model", **stages.TINY)
    found = stages.Subject("tiny", model, folder / "work", ("W2", "W4"), ("IQ2_XXS", "IQ4_XS"), **stages.LITTLE_WORK)
    stages.calibrate(found)
    stages.build_bank(found, lambda figures: None)
    return found


@pytest.mark.parametrize(("compute", "rounding"), [("float32", 1e-3), ("auto", 0.05)])
def test_a_streamed_sweep_is_a_resident_one(subject: stages.Subject, compute: str, rounding: float) -> None:
    resident = stages.sweep(subject, compute)
    streamed = stages.sweep(subject, compute, stages.least_memory(subject, compute))
    assert resident["resident"]
    assert not streamed["resident"]
    assert streamed["kl"] == pytest.approx(resident["kl"], rel=rounding)  # batches differ


def test_the_proof_by_simulation_measures_what_the_sweep_does(subject: stages.Subject) -> None:
    (expected,) = stages.evaluated(subject, "float32", 1, split="test")
    assert stages.simulated_proof(subject)["kl"] == pytest.approx(expected, rel=1e-3)


def test_codebook_types_are_built(subject: stages.Subject) -> None:
    stages.build_codebooks(subject)
    files = list((subject.folder / "codebooks").glob("*.safetensors"))
    assert files
    assert all(set(load_file(file)) == set(subject.codebooks) for file in files)


def test_recorded_kernels_round_as_those_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = best_device()
    names = [name for name, fmt in FORMATS.items() if not fmt.is_float and name not in CODEBOOK_GRIDS]
    W, H = heavy_tailed(96, 1024).to(device), correlated_hessian(1024).to(device)

    def rounded(*, enabled: bool, kernels_of: set[str]) -> dict[str, Tensor]:
        recordings = replay.Recordings()
        recordings.enabled = enabled
        monkeypatch.setattr(replay, "_RECORDINGS", recordings)
        monkeypatch.setattr(kernels, "ENABLED", kernels_of)
        found = compensate({"w": W}, {"w": [FORMATS[name] for name in names]}, H)["w"]
        assert recordings.enabled == enabled
        return {name: level.packed.data for name, level in found.items()}

    for kernels_of in (set(), {"panels"}, kernels.ENABLED):
        expected = rounded(enabled=False, kernels_of=kernels_of)
        found = rounded(enabled=True, kernels_of=kernels_of)
        assert [name for name in names if not torch.equal(found[name], expected[name])] == []


def test_sensitivities_and_healing_give_finite_figures(subject: stages.Subject) -> None:
    assert isfinite(stages.gradient(subject)["largest"])
    assert stages.exact(subject, 4)["work"] >= 4
    stages.heal_whole(subject)
    before, after = stages.heal_blocks(subject, subject.layers + 1)["kl"]["test"]
    assert isfinite(before)
    assert isfinite(after)
