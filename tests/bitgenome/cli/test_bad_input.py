"""A user's mistake ends in one sentence and exit code 2, before minutes of work, and leaves what was there."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bitgenome.cli.main import main
from bitgenome.config.run import load_config
from bitgenome.storage.lease import Lease
from bitgenome.storage.run_directory import RunDirectory
from tests.bitgenome.conftest import SMALL
from tests.conftest import EMBEDDED


def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """What the command line says; it must be one sentence with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["bitgenome", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Refusal of ``bitgenome COMMAND`` for the small configuration with ``changes``."""

    def call(command: str = "run", sets: tuple[str, ...] = (), **changes: Any) -> str:
        config = {"name": "bad", "storage_path": str(tmp_path / "runs"), **SMALL, "workers": {"ray": "off"}, **changes}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        overrides = [part for value in sets for part in ("--set", value)]
        return refusal(capsys, monkeypatch, command, path, *overrides)

    return call


def test_an_unknown_key_is_answered_with_the_nearest(refused: Any) -> None:
    said = refused(sets=("search.generation=3",))
    assert "unknown key 'search.generation'" in said and "did you mean search.generations?" in said
    assert "did you mean budget?" in refused(budgets={"bits_per_weight": 3})


def test_a_missing_model_folder(refused: Any) -> None:
    assert "found no folder at ./nowhere" in refused(model="./nowhere")


def test_an_architecture_that_gguf_lacks(refused: Any, tmp_path: Path) -> None:
    folder = tmp_path / "opt"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", "architectures": ["OPTForCausalLM"]}))
    (folder / "model.safetensors").write_bytes((EMBEDDED / "model.safetensors").read_bytes())
    said = refused(model=str(folder))
    assert "opt" in said and "llama" in said


@pytest.mark.parametrize("bits", [1.0, 20.0])
def test_a_budget_out_of_reach_is_answered_with_both_bounds(bits: float, refused: Any) -> None:
    said = refused(budget={"bits_per_weight": bits})
    assert "cannot be met" in said and said.count("bits per weight (") == 3


def test_two_budgets_at_once(refused: Any) -> None:
    assert "exactly one of" in refused(budget={"bits_per_weight": 3, "file_size": "2 MB"})


def test_a_size_that_is_none(refused: Any) -> None:
    assert "'3 elephants' is not a number of bytes" in refused(budget={"file_size": "3 elephants"})


def test_too_little_text(refused: Any, tmp_path: Path) -> None:
    text = {**SMALL["text"], "tokens": {"calibration": 10_000_000}}  # type: ignore[dict-item]
    said = refused(text=text)
    assert "tokens of calibration text" in said and "lower text.tokens.calibration" in said
    assert not (tmp_path / "runs" / "bad").exists()


def test_a_window_longer_than_the_context(refused: Any) -> None:
    assert "at most the model's context (512" in refused(text={**SMALL["text"], "window": 1024})  # type: ignore[dict-item]


def test_corrupt_weights(refused: Any, tmp_path: Path) -> None:
    folder = tmp_path / "corrupt"
    folder.mkdir()
    (folder / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes((EMBEDDED / "model.safetensors").read_bytes()[:100_000])
    assert "expected a readable safetensors file" in refused(model=str(folder))


def test_a_level_that_does_not_exist(refused: Any) -> None:
    assert "found W7" in refused(levels=["W2", "W7"])


@pytest.mark.parametrize(
    ("healing", "sentence"),
    [
        ({"alpha": 0.5}, "expected alpha only with loss: distillation, found 0.5"),
        ({"loss": "distillation", "alpha": 1.5}, "healing.alpha .* less than or equal to 1, found 1.5"),
        ({"learning_rate": 0}, "healing.learning_rate .* greater than 0, found 0"),
        ({"variant": "layerwise"}, "'full' or 'blockwise', found 'layerwise'"),
        ({"enabled": "maybe"}, "'auto', 'on' or 'off', found 'maybe'"),
        ({"temperatur": 2}, "did you mean healing.temperature?"),
    ],
)
def test_healing_that_cannot_be_says_what_could(healing: dict[str, Any], sentence: str, refused: Any) -> None:
    assert re.search(sentence.replace("?", "[?]"), refused(healing=healing))


def test_no_configuration_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "found nothing at nowhere.yaml" in refusal(capsys, monkeypatch, "run", "nowhere.yaml")


def test_a_file_that_is_no_yaml(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [unclosed\n")
    assert "expected YAML" in refusal(capsys, monkeypatch, "run", path)


def test_a_directory_of_another_configuration_is_refused_with_the_keys_that_differ(
    refused: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "runs" / "bad"
    assert "found no folder" in refused(model="./nowhere")
    directory.mkdir(parents=True)
    RunDirectory.create(load_config(tmp_path / "config.yaml", [f"model={EMBEDDED}"]))
    (directory / "evaluations.jsonl").touch()
    before = (directory / "run.json").read_bytes()
    said = refused(sets=("search.seed=7", "budget.bits_per_weight=3.4"))
    assert "differs in budget.bits_per_weight, search.seed" in said
    assert (directory / "run.json").read_bytes() == before


def test_a_run_that_another_version_began_is_refused_before_any_work(refused: Any, tmp_path: Path) -> None:
    """A setting that it did not know changes all digests; only a finished run, whose file is there, goes on."""
    assert "found no folder" in refused(model="./nowhere")
    (tmp_path / "runs" / "bad").mkdir(parents=True)
    directory = RunDirectory.create(load_config(tmp_path / "config.yaml", [f"model={EMBEDDED}"]))
    (directory.path / "evaluations.jsonl").touch()
    record = json.loads((directory.path / "run.json").read_text())
    record |= {"config_digest": "of other settings", "packages": {"bitgenome": "0.0.9"}}
    (directory.path / "run.json").write_text(json.dumps(record))
    said = refused(sets=())
    assert "found one of bitgenome 0.0.9 with other settings: choose another name" in said
    (directory.path / "best.json").touch()
    assert RunDirectory.find(directory.config) is not None


def test_resume_of_what_is_no_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "expected a run directory with run.json" in refusal(capsys, monkeypatch, "resume", tmp_path)


def test_export_of_a_run_that_is_not_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Any
) -> None:
    refused(sets=("model=./nowhere",))
    run = RunDirectory.create(load_config(tmp_path / "config.yaml"))
    assert "expected a finished run" in refusal(capsys, monkeypatch, "export", run.path)
    said = refusal(capsys, monkeypatch, "export", run.path, "--split-max-size", "much")
    assert "--split-max-size: size 'much' is not a number of bytes" in said


def test_an_option_that_does_not_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such option" in refusal(capsys, monkeypatch, "run", "x.yaml", "--seed", "3")


def test_a_weight_that_is_not_finite_is_named_before_anything_is_written(refused: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 3] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "found 1 of 196608 not finite in model.layers.2.mlp.up_proj.weight" in refused(model=str(folder))
    assert not (tmp_path / "runs").exists()


def test_a_second_driver_of_a_run_is_refused_and_touches_nothing(refused: Any, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "bad"
    with Lease(directory, "the run"):
        before = {file: file.read_bytes() for file in directory.rglob("*.json")}
        assert f"found process {os.getpid()} on" in refused()
        assert {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()} == before


def test_a_full_disk_ends_a_run_with_one_sentence_and_what_was_there_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_disk: Path
) -> None:
    config = {"name": "full", "storage_path": str(small_disk), **SMALL, "workers": {"ray": "off"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["bitgenome", "run", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as end:
        main()
    *_, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert last.startswith(f"error: expected to write {small_disk}") and "No space left on device" in last
    assert RunDirectory.open(small_disk / "full").record["config"]["name"] == "full"
