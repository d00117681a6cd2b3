"""A run that rounds by the loss: its bank is another one, its words say so, and workers do not change a byte."""

from pathlib import Path

import pytest
import yaml

from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from bitgenome.run.bank import BankBuild
from tests.bitgenome.conftest import LITTLE, Runs, call_here
from tests.small_models import save_small_model


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("objective"))
    model = save_small_model(runs.storage / "model", "llama", hidden_size=256, intermediate_size=512)
    little = {key: value for key, value in LITTLE.items() if key not in ("quantization", "model")}
    for name, objective in (("auto", "auto"), ("loss", "loss")):
        storage = str(runs.storage if name != "loss" else runs.storage / "other")
        runs_file = runs.storage / f"{name}.yaml"
        settings = {
            **little, "model": str(model), "name": name, "storage_path": storage, "budget": {"bits_per_weight": 4},
            "quantization": {"objective": objective}, "workers": {"ray": "off"},
        }  # fmt: skip
        runs_file.write_text(yaml.safe_dump(settings))
        done = call_here("run", runs_file)
        assert done.returncode == 0, done.stderr
    return runs


def test_the_default_looks_at_the_loss_and_the_log_says_so(tried: Runs) -> None:
    said = "rounding looks at the loss of the whole model (quantization.objective: loss; "
    assert said in (tried.storage / "auto" / "events.log").read_text()
    assert said in " ".join(call_here("plan", tried.storage / "auto.yaml").stdout.split())
    assert (tried.storage / "shared" / "outputs").is_dir()


def test_another_objective_is_another_bank_and_the_same_one_is_the_same_to_the_byte(tried: Runs) -> None:
    plan = make_plan(load_config(tried.storage / "auto.yaml"))
    assert BankBuild(plan, "calibration").directory != BankBuild(plan, "calibration", outputs=Path("factors")).directory
    manifests = [folder / "shared" / "bank" for folder in (tried.storage, tried.storage / "other")]
    first, again = ({f.parent.name: f.read_bytes() for f in folder.glob("*/manifest.json")} for folder in manifests)
    assert len(first) == 1 and again == first, "built anew by another run, whose configuration says loss"


def test_loss_without_compensation_is_refused(tried: Runs) -> None:
    changes = ["--set", "quantization.objective=loss", "--set", "quantization.compensation=false"]
    done = call_here("run", tried.storage / "auto.yaml", *changes)
    assert done.returncode == 2
    assert "expected compensation with objective: loss, found compensation: false" in done.stderr
