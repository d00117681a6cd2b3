"""A model runs no code, a configuration holds no secret, and nothing leaves the storage path."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config, parse_config
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.tokenizer import load_tokenizer
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, ModelFolderError
from exporters.metadata.tensor_names import quantizable_tensors
from tests.bitgenome.conftest import SMALL, Runs
from tests.conftest import EMBEDDED


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model that may be spoiled."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def with_code(model: Path, **config: object) -> Path:
    """Give a model its own code, which leaves the returned marker when it runs."""
    marker = model / "executed"
    (model / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(model / "config.json", auto_map=own, **config)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_own.Own"]})
    return marker


def test_the_code_of_a_known_architecture_is_never_run_and_the_model_works_without(model: Path) -> None:
    marker = with_code(model)
    folder = ModelFolder(model)
    assert BlockModel(folder, torch.device("cpu")).blocks and load_tokenizer(folder.path).ids("a")
    assert not marker.exists()


def test_an_architecture_that_is_only_in_the_models_code_is_refused_without_running_it(model: Path) -> None:
    marker = with_code(model, model_type="own", architectures=["Own"])
    with pytest.raises(UserError, match="own"):
        quantizable_tensors(ModelFolder(model))
    with pytest.raises(UserError):
        BlockModel(ModelFolder(model), torch.device("cpu"))
    assert not marker.exists()


def test_pickled_weights_are_refused_with_a_remedy_that_works(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    before = ModelFolder(model).shapes
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"found pytorch_model.bin, which may hold code: convert it .*\(FOLDER"):
        ModelFolder(model)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, safe_serialization=True)
    assert ModelFolder(model).shapes == before


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "a/../../b.safetensors"])
def test_an_index_that_points_out_of_the_model_folder_is_refused(name: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelFolderError, match=f"expected weights inside the model folder, found {name}"):
        ModelFolder(model)


@pytest.mark.parametrize("name", ["../out", "/out", "a/b", "..", "", "a\n", ".hidden"])
def test_a_run_is_named_by_a_plain_word(name: str) -> None:
    with pytest.raises(UserError, match="name in test: "):
        parse_config({**SMALL, "name": name}, "test")


def test_a_run_directory_that_links_out_of_the_storage_path_is_refused(runs: Runs, tmp_path: Path) -> None:
    config = load_config(runs.write("linked"))
    (runs.storage / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    sentence = f"expected the run linked inside the storage path {runs.storage}, found {tmp_path}/elsewhere"
    with pytest.raises(UserError, match=sentence), RunDirectory.owned(config):
        pass
    with pytest.raises(UserError, match=sentence):
        RunDirectory.create(config)
    with pytest.raises(UserError, match=sentence):
        RunDirectory.open(runs.storage / "linked")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_storage_path_may_itself_be_a_link(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    config = load_config(runs.write("on-a-disk"), [f"storage_path={tmp_path}/runs"])
    assert RunDirectory.open(RunDirectory.create(config).path).path == tmp_path / "runs" / "on-a-disk"


@pytest.mark.parametrize("key", ["bank", "scaled_model"])
def test_an_artefact_that_is_recorded_outside_the_storage_path_is_refused(key: str, runs: Runs) -> None:
    run = RunDirectory.create(load_config(runs.write(f"forged-{key}")))
    run.record[key] = "/etc/shared/bank"
    with pytest.raises(UserError, match=f"expected the {key.replace('_', ' ')} of .*run.json inside .*found /etc/sha"):
        run.artefact(key)
    run.record[key] = str(runs.storage / "shared" / "bank" / "0")
    assert run.artefact(key) == runs.storage / "shared" / "bank" / "0"


def test_a_password_in_a_url_is_refused_as_settings_are_recorded(runs: Runs) -> None:
    for url in ("s3://key:secret@bucket/runs", "https://user:word@host/x"):
        with pytest.raises(UserError, match="expected storage_path in .* without a password") as refused:
            load_config(runs.write("secret", storage_path=url))
        assert "secret@" not in str(refused.value) and "word@" not in str(refused.value)
    load_config(runs.write("plain"), ["model=org/name", "workers.ray=10.0.0.1:6379"])
