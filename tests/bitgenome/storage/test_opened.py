"""A GGUF file as the model of a run: opened once among what runs share, then as any folder."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.float_gguf import export_float
from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.storage.opened import check_space, note_model, open_model
from bitgenome.storage.prune import artefacts
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from tests.bitgenome.conftest import LITTLE, assert_one_sentence, call_here
from tests.small_models import save_small_model

TEXT = {"window": 32, "tokens": {"calibration": 64, "sensitivity": 32, "search": 32, "validation": 32, "test": 64}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(save_small_model(tmp_path_factory.mktemp("small") / "model", "llama"))


def stored(storage: Path, model: Path) -> SimpleNamespace:
    return SimpleNamespace(storage_path=storage, storage_url=None, model=str(model), name="run")


def test_a_file_is_opened_once_and_again_when_its_folder_is_damaged(folder: ModelFolder, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    export_float(folder, gguf)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    config = stored(tmp_path / "runs", gguf)
    first = open_model(config)
    note_model(config, first)
    weights = first.path / "model.safetensors"
    written, time = weights.read_bytes(), weights.stat().st_mtime_ns
    assert open_model(config).digest == first.digest and weights.stat().st_mtime_ns == time
    for damaged in (written[:-1], written[:-1] + bytes([written[-1] ^ 1])):
        weights.write_bytes(damaged)
        (first.path / ".model.safetensors.x.tmp").touch()  # as a writer that was killed leaves it
        assert open_model(config).path == first.path and weights.read_bytes() == written
    assert not list(first.path.glob(".*.tmp"))
    (kept,) = artefacts(str(tmp_path / "runs"))
    assert kept.name == f"{layout.OPENED_KIND}/{first.path.parent.name}" and kept.runs == ("run",)
    export_float(folder, gguf, "F16")  # another file of the same name
    assert open_model(config).path.parent != first.path.parent


def test_headers_leave_nothing_behind(folder: ModelFolder, tmp_path: Path) -> None:
    export_float(folder, tmp_path / "model.gguf")
    headers = open_model(stored(tmp_path / "runs", tmp_path / "model.gguf"), weights=False)
    path = headers.path
    assert headers.shapes == folder.shapes and path.is_dir() and not (tmp_path / "runs").exists()
    del headers
    assert not path.exists()


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a GGUF file at .*none\.gguf, found none"):
        open_model(stored(tmp_path, tmp_path / "none.gguf"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"expected config\.json .* model\.gguf: name that file as the model"):
        open_model(stored(tmp_path, tmp_path))


def test_a_full_disk_is_one_sentence_before_a_weight_is_written(tmp_path: Path) -> None:
    check_space(1, tmp_path / "model.gguf", tmp_path)
    with pytest.raises(UserError, match=r"expected 1000000000\.0 GB of free disk .*model\.gguf, found"):
        check_space(10**18, tmp_path / "model.gguf", tmp_path)


def settings(tmp_path: Path, name: str, model: Path) -> dict[str, Any]:
    found = {**LITTLE, "text": {**LITTLE["text"], **TEXT}, "storage_path": str(tmp_path / "runs")}
    found |= {"budget": {"bits_per_weight": 6.3}, "workers": {"ray": "off"}}
    return found | {"name": name, "model": str(model)}


def test_a_cut_file_is_refused_before_any_work(folder: ModelFolder, tmp_path: Path) -> None:
    gguf = tmp_path / "cut.gguf"
    export_float(folder, gguf)
    gguf.write_bytes(gguf.read_bytes()[:-100])
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(settings(tmp_path, "cut", gguf)))
    for command in ("plan", "run"):
        assert_one_sentence(call_here(command, tmp_path / "cut.yaml"), str(gguf))
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_run_from_a_gguf_is_the_run_from_its_folder(folder: ModelFolder, tmp_path: Path) -> None:
    gguf = tmp_path / "small.gguf"
    export_float(folder, gguf)
    files = []
    for name, model in (("folder", folder.path), ("gguf", gguf)):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings(tmp_path, name, model)))
        done = call_here("run", config)
        assert done.returncode == 0, done.stderr
        best = json.loads((tmp_path / "runs" / name / layout.BEST).read_text())
        files.append((best["winner"]["genome"], read_gguf(tmp_path / "runs" / name / best["gguf"])))
    (genome, expected), (found_genome, found) = files
    assert genome == found_genome and expected.tensors.keys() == found.tensors.keys()
    assert all(np.array_equal(expected.read(name), found.read(name)) for name in expected.tensors)
    planned = call_here("plan", tmp_path / "gguf.yaml")
    assert "the run opens small.gguf as a folder of" in planned.stdout
