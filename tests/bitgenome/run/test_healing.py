"""What healing ships: the searched integers in a file of the same size, tuned norms and scales only if they help."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bitgenome.common.errors import UserError
from bitgenome.run.export import differing_floats, differing_tensors, export_again
from bitgenome.run.verify import verify_file
from evaluators.healing.scales import ScaledBank, divided
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank
from exporters.files.gguf_reader import read_gguf
from quantizers.formats.table import FORMATS
from tests.bitgenome.conftest import Finished, Runs, call_here
from tests.conftest import EMBEDDED


def shipped(runs: Runs, name: str) -> Path:
    path: Path = runs.storage / name / runs.best(name)["gguf"]
    return path


def test_the_file_holds_the_healed_tensors_and_lost_less_than_the_search(runs: Runs, finished: Finished) -> None:
    best, healed = runs.best("base"), load_file(runs.storage / "base" / "healed.safetensors")
    assert best["healing"]["applied"]
    for split in ("validation", "test"):
        assert best["healing"][split]["after"]["kl"] < best["healing"][split]["before"]["kl"]
    floats, factors = divided(healed)
    formats = {name: FORMATS[fmt] for name, fmt in best["formats"].items()}
    assert factors.keys() == formats.keys()
    assert differing_floats(shipped(runs, "base"), ModelFolder(EMBEDDED), floats) == []
    assert set(differing_floats(shipped(runs, "base"), ModelFolder(EMBEDDED), {})) <= floats.keys()
    asked = shipped(runs, "base"), ModelFolder(EMBEDDED)
    assert differing_tensors(*asked, ScaledBank(runs.bank("base"), factors), formats) == []
    assert differing_tensors(*asked, Bank(runs.bank("base")), formats)
    searched, row = best["rows"][:2]
    assert (searched["name"].split(" ")[0], row["name"]) == ("searched", "healed")
    assert row["kl"] < searched["kl"] and row["file_bytes"] == searched["file_bytes"] == best["winner"]["file_bytes"]
    assert best["proof"]["simulated_kl"] == pytest.approx(row["kl"], rel=1e-4)
    assert "Healing (full) applied" in finished.stdout


def test_healing_that_makes_it_worse_is_refused_and_the_file_is_the_searched_one(little: Path) -> None:
    runs, config = Runs(little), yaml.safe_load((little / "little.yaml").read_text())
    healing = {"enabled": True, "steps": 1, "learning_rate": 1e6, "batch_tokens": 64}
    (little / "refused.yaml").write_text(yaml.safe_dump({**config, "name": "refused", "healing": healing}))
    done = call_here("run", little / "refused.yaml", "--set", "llamacpp_mix=off")
    assert done.returncode == 0, done.stderr
    assert "Healing (full) refused, the file is as searched" in done.stdout
    best = runs.best("refused")
    assert not best["healing"]["applied"] and "healed" not in [row["name"] for row in best["rows"]]
    folder, formats = ModelFolder(Path(config["model"])), {name: FORMATS[fmt] for name, fmt in best["formats"].items()}
    assert differing_floats(shipped(runs, "refused"), folder, {}) == []
    assert differing_tensors(shipped(runs, "refused"), folder, Bank(runs.bank("refused")), formats) == []
    assert shipped(runs, "refused").stat().st_size == best["winner"]["file_bytes"]
    assert load_file(little / "refused" / "healed.safetensors") == {}


def test_a_file_whose_norms_are_not_those_measured_does_not_verify(runs: Runs, finished: Finished) -> None:
    file = shipped(runs, "base")
    whole = file.read_bytes()
    norm = read_gguf(file).tensors["output_norm.weight"]
    try:
        file.write_bytes(whole[: norm.offset] + torch.ones(64).numpy().tobytes() + whole[norm.offset + 256 :])
        with pytest.raises(UserError, match="found tensor model.norm.weight to differ: bitgenome export"):
            verify_file(file, runs.storage / "base")
    finally:
        file.write_bytes(whole)


def test_export_without_the_healed_tensors_says_what_is_missing(runs: Runs, finished: Finished) -> None:
    healed = runs.storage / "base" / "healed.safetensors"
    moved = healed.rename(healed.with_suffix(".moved"))
    try:
        with pytest.raises(UserError, match="expected the tuned tensors in .*healed.safetensors"):
            export_again(runs.storage / "base")
    finally:
        moved.rename(healed)


def test_the_record_of_a_run_is_strict_json(runs: Runs, finished: Finished) -> None:
    text = (runs.storage / "base" / "best.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"found {name}"))
