"""Batches in one file: combinations with readable names, each checked before any of them starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitgenome.batch.config import load_batch, run_name
from bitgenome.cli.batch import batch_name
from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config
from bitgenome.storage.run_directory import RunDirectory
from search.types import Evaluation
from tests.bitgenome.conftest import LITTLE
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs" / "batch").glob("*.yaml"))
BUDGETS = [{"bits_per_weight": 3.0}, {"bits_per_weight": 3.5}]
MATRIX = {"budget": BUDGETS, "search.strategy": ["genetic", "exact"], "search.seed": [0, 1]}


def write(path: Path, name: str = "matrix", **changes: Any) -> Path:
    """A batch over the small run."""
    base = {**LITTLE, "budget": BUDGETS[1], "workers": {"ray": "off"}, "storage_path": str(path / "runs")}
    file = path / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"base": base, "matrix": MATRIX, **changes}, sort_keys=False))
    return file


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_batch_in_the_repository_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    runs = load_batch([path])
    assert [run.name for run in runs[:2]] == ["stdlib-6m-3.0bpw-genetic", "stdlib-6m-3.0bpw-optuna"]
    assert len({run.preparation for run in runs}) == 1, "one bank for all"
    assert len({run.config.digest for run in runs}) == len(runs) == 6


def test_a_matrix_makes_every_combination_but_the_excluded_and_overrides_apply_to_all(tmp_path: Path) -> None:
    file = write(tmp_path, exclude=[{"search.strategy": "exact", "search.seed": 1}])
    runs = load_batch([file], ["search.generations=2"])
    assert [run.name for run in runs] == [
        "stdlib-6m-3.0bpw-genetic-s0", "stdlib-6m-3.0bpw-genetic-s1", "stdlib-6m-3.0bpw-exact-s0",
        "stdlib-6m-3.5bpw-genetic-s0", "stdlib-6m-3.5bpw-genetic-s1", "stdlib-6m-3.5bpw-exact-s0",
    ]  # fmt: skip
    assert {run.config.search.generations for run in runs} == {2}
    assert [run.config.budget.bits_per_weight for run in runs] == [3.0, 3.0, 3.0, 3.5, 3.5, 3.5]
    assert [run.config.search.seed for run in runs[:3]] == [0, 1, 0]


def test_a_base_may_be_a_file_and_single_runs_may_stand_beside_a_matrix(tmp_path: Path) -> None:
    settings = {
        **LITTLE,
        "name": "alone",
        "budget": BUDGETS[0],
        "workers": {"ray": "off"},
        "storage_path": str(tmp_path / "runs"),
    }
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(settings))
    matrix = write(tmp_path, base="alone.yaml", name="m", matrix={"search.population": [8, 16]})
    runs = load_batch([tmp_path / "alone.yaml", matrix])
    assert [run.name for run in runs] == ["alone", "stdlib-6m-population8", "stdlib-6m-population16"]
    assert batch_name([matrix]) == "m"
    assert batch_name([matrix, tmp_path / "alone.yaml"]) == tmp_path.name
    with pytest.raises(UserError, match="expected --name for files of several folders"):
        batch_name([matrix, tmp_path / "elsewhere" / "alone.yaml"])


@pytest.mark.parametrize(
    ("batch", "combination", "name"),
    [
        (None, {"model": "models/stdlib-6m", "search.seed": 3, "budget": BUDGETS[0]}, "stdlib-6m-3.0bpw-s3"),
        ("night", {"budget": {"file_size": "3.2 MiB"}}, "night-3.2MiB"),
        ("night", {"model": "Qwen/Qwen2.5-7B", "budget.bits_per_weight": 4}, "night-Qwen2.5-7B-4bpw"),
        (None, {"levels": ["W2", "W4"], "budget": {"compression_ratio": 0.25}}, "m-0.25x-levelsW2-W4"),
        (None, {"quantization.pruning": {"sparsity": 0.5}}, "m-sparsity0.5"),
    ],
)
def test_names_say_what_differs(batch: str | None, combination: dict[str, Any], name: str) -> None:
    budget = combination.get("budget", {"bits_per_weight": combination.get("budget.bits_per_weight", 3)})
    assert run_name(batch, {"model": "m", "budget": budget}, combination) == name


@pytest.mark.parametrize(
    ("changes", "overrides", "sentence"),
    [
        (
            {"matrix": {"search.strategy": ["genetic", "tpe"]}},
            [],
            "run stdlib-6m-tpe: .*'random', found 'tpe'|strategy",
        ),
        (
            {"matrix": {"search.sed": [0]}},
            [],
            "unknown key 'search.sed' in .*matrix.yaml, run .*: did you mean search.s",
        ),
        ({"matrix": {"budget": [*BUDGETS, {"bits_per_weight": 1}]}}, [], "matrix.yaml, run stdlib-6m-1bpw: .* be met"),
        ({"matrix": {"search.seed": [0, 0]}}, [], "expected runs of different names, found 'stdlib-6m-s0' twice in"),
        ({"matrix": {"search.seed": []}}, [], "matrix.search.seed in .*: List should have at least 1 item"),
        ({"matrix": {}}, [], "matrix in .*: Dictionary should have at least 1 item"),
        ({"matrixx": {}}, [], "unknown key 'matrixx' in .*: did you mean matrix"),
        ({"base": "nowhere.yaml"}, [], "found nothing at .*nowhere.yaml"),
        ({"exclude": [{"search.seed": 7}]}, [], "expected each exclude of .* to match a combination .*, found"),
        ({"matrix": {"search.seed": [1]}, "exclude": [{"search.seed": 1}]}, [], "to leave a run, found none left"),
        (
            {"matrix": {"workers.ray": ["off", "local"]}},
            [],
            "expected one workers.ray for all runs of a batch, found off",
        ),
        ({"matrix": {"model.name": ["a"]}}, [], "expected a section 'model' for matrix of .*, found a value"),
        ({}, ["search.seed=3"], "expected --set of settings that .* does not vary, found search.seed"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    changes: dict[str, Any], overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        load_batch([write(tmp_path, **changes)], overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_directory_of_another_run_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = write(tmp_path, matrix={"search.seed": [0, 1]})
    taken = load_batch([file])[1].config
    RunDirectory.create(taken.model_copy(update={"name": "stdlib-6m-s0"}))
    (tmp_path / "runs" / "stdlib-6m-s0" / "evaluations.jsonl").touch()
    with pytest.raises(UserError, match="run stdlib-6m-s0: expected .* differs in search.seed: choose another name"):
        load_batch([file])


def test_a_run_is_finished_by_its_result_of_the_same_settings_model_and_text(tmp_path: Path) -> None:
    (run,) = load_batch([write(tmp_path, matrix={"search.seed": [0]})])
    directory = RunDirectory.create(run.config)
    directory.record.pin("text", run.windows.digest)
    directory.record.pin("model", run.plan.folder.digest)
    winner = Evaluation((0,), 0.1, 0.1, 0.1, 1.0, 0.1, 10, "validation", 512).to_json()
    best = {"winner": winner, "gguf": "m.gguf", "bits_per_weight": 3.5, "budget_bytes": 10}
    assert not run.finished
    for content in ("{", json.dumps(best)):  # damaged, and before its proof
        (directory.path / "best.json").write_text(content)
        assert not run.finished
    (directory.path / "best.json").write_text(json.dumps(best | {"proof": {"figures": {"mean_kl": {"value": 0.1}}}}))
    assert run.finished
    record = json.loads((directory.path / "run.json").read_text())
    record["digests"]["model"] = "another"
    (directory.path / "run.json").write_text(json.dumps(record))
    assert not run.finished


def test_the_written_configuration_of_a_run_is_the_same_run(tmp_path: Path) -> None:
    (run,) = load_batch([write(tmp_path, matrix={"search.seed": [5]})])
    path = tmp_path / "written.yaml"
    path.write_text(yaml.safe_dump(run.config.model_dump(mode="json", exclude_none=True)))
    assert load_config(path).digest == run.config.digest
