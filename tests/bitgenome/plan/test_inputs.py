"""Model folders and configurations as people have them: what cannot be right is refused at plan, in one sentence.

What is unusual but right gives a file that llama.cpp runs.
"""

import hashlib
import json
import logging
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitgenome.common.errors import UserError
from bitgenome.common.remembered import Found
from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from evaluators.model import folder as folders
from evaluators.model.folder import ModelFolder
from evaluators.model.weights_file import survey
from tests.bitgenome.conftest import call_here
from tests.conftest import built_once
from tests.small_models import save_small_model

Change = Callable[[Path], Any]
WINDOWS = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of each kind and a text; tests change copies."""

    def build(folder: Path) -> None:
        for kind, more in {"llama": {}, "mistral": {"sliding_window": 16}, "qwen2": WINDOWS}.items():
            save_small_model(folder / kind, kind, tie_word_embeddings=False, **more)
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        (folder / "text.txt").write_text("".join(path.read_text(encoding="utf-8") for path in modules[:8]))

    return built_once(tmp_path_factory, "tiny-models", build)


def configuration(tmp_path: Path, tiny: Path, kind: str, **changes: Any) -> Path:
    """A configuration of a copy of the tiny model ``kind``, beside the copy."""
    shutil.copytree(tiny / kind, tmp_path / "model")
    tokens = {"calibration": 1024, "sensitivity": 128, "search": 128, "validation": 128, "test": 256}
    settings = {
        "name": "r",
        "model": str(tmp_path / "model"),
        "budget": {"bits_per_weight": 6.0},
        "storage_path": str(tmp_path / "runs"),
        "text": {"source": "file", "path": str(tiny / "text.txt"), "window": 64, "tokens": tokens},
        "search": {"population": 4, "generations": 1, "elites": 2, "brood": 4},
        "healing": {"enabled": "off"},
        "workers": {"ray": "off"},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return path


def configured(**changes: Any) -> Change:
    """Change keys of config.json; ... removes one."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        settings = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))

    return change


def written(name: str, content: str) -> Change:
    """Write a file in place of what was there."""
    return lambda folder: (folder / name).write_text(content)


def weighted(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the tensors."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def in_shards(then: Change) -> Change:
    """Store the weights in several files with an index, then change them."""

    def change(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        then(folder)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items() if n.endswith("proj.weight")})


def to_gptq(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)


def old_rope(scaling: Any) -> Change:
    return configured(rope_parameters=..., rope_theta=1e4, rope_scaling=scaling)


INDEX, LFS = "model.safetensors.index.json", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
REFUSED: dict[str, tuple[Change, str]] = {
    "vocabulary": (configured(vocab_size=520), "embed_tokens.weight to be 520x64, as config.json says, found 512x64"),
    "feed-forward": (configured(intermediate_size=256), "gate_proj.weight to be 256x64, as config.json says, found 96"),
    "layers": (configured(num_hidden_layers=3), r"expected tensor model.layers.2.\S+ \(\S+\), as config.json says"),
    "sizes": (configured(num_attention_heads="4"), "expected an integer num_attention_heads above 0 in config.json"),
    "activation": (configured(hidden_act="gelu"), "expected hidden_act 'silu' for llama, found 'gelu'"),
    "rope text": (old_rope("yarn"), "expected an object for rope_scaling in config.json, found 'yarn'"),
    "rope factor": (old_rope({"type": "linear"}), "expected a positive number as factor for rope scaling 'linear'"),
    "configuration list": (written("config.json", "[]"), "expected a JSON object in .*config.json, found a list"),
    "configuration bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), "expected JSON in .*config.json"),
    "configuration in LFS": (written("config.json", LFS), "expected the content of .*config.json, found a Git LFS"),
    "index cut": (in_shards(written(INDEX, '{"weight_map": ')), f"expected JSON in .*{INDEX}, found: Expecting value"),
    "index list": (written(INDEX, "[]"), f"expected a JSON object in .*{INDEX}, found a list"),
    "index of others": (written(INDEX, '{"weight_map": 3}'), "expected weight_map with a file for every tensor in"),
    "index of missing": (
        in_shards(lambda folder: next(folder.glob("*-00002-of-*")).unlink()), "that .* lists, found no model-00002-of"
    ),
    "weights in LFS": (written("model.safetensors", LFS), "expected the content of .*, found a Git LFS pointer: .*"),
    "pickled weights": (pickled, r"found pytorch_model.bin, which may hold code: .*save_pretrained\(FOLDER\)$"),
    "fp8": (weighted(to_fp8), r"expected weights in floats .*, found a model quantized before, with fp8 weights"),
    "gptq": (weighted(to_gptq), r"quantized before, with the tensor model.layers.0.mlp.down_proj.qweight in"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_folder_that_cannot_be_right_is_refused_at_plan(case: str, tiny: Path, tmp_path: Path) -> None:
    path = configuration(tmp_path, tiny, "llama")
    change, sentence = REFUSED[case]
    change(tmp_path / "model")
    with pytest.raises(UserError, match=sentence) as refusal:
        make_plan(load_config(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_text_longer_than_a_sliding_window_that_llamacpp_ignores_is_refused(
    kind: str, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = configuration(tmp_path, tiny, kind)
    with pytest.raises(UserError, match=r"expected text.window at most the model's sliding window \(16\), found 64"):
        make_plan(load_config(path))
    with caplog.at_level(logging.WARNING):
        make_plan(load_config(path, ["text.window=16"]))
    assert caplog.text.count("texts longer than 16 tokens differ") == 1


def test_files_of_one_size_are_said_to_have_one(tiny: Path, tmp_path: Path) -> None:
    path = configuration(tmp_path, tiny, "llama", levels=["W4"])
    with pytest.raises(UserError, match=r"this model's files have one size, file_size: (\d+)") as refusal:
        make_plan(load_config(path))
    size = str(refusal.value).rpartition(" ")[2]
    assert make_plan(load_config(path, [f"budget.file_size={size}"])).budget.file_bytes == int(size)


def test_an_embedding_that_serves_as_head_against_config_json_is_said(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = configuration(tmp_path, tiny, "llama")
    weighted(lambda tensors: tensors.pop("lm_head.weight"))(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        make_plan(load_config(path))
    assert "tie_word_embeddings: false, the weights hold no lm_head.weight" in caplog.text


def test_a_key_that_is_given_twice_is_refused_with_its_lines(tiny: Path, tmp_path: Path) -> None:
    path = configuration(tmp_path, tiny, "llama")
    path.write_text("name: r\nbudget: {bits_per_weight: 3}\nbudget: {bits_per_weight: 5}\n")
    for command in ("plan", "run"):
        refused = call_here(command, path)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1 and "key 'budget' in line 2 and again in line 3" in refused.stderr


def test_the_home_folder_may_be_written_as_a_tilde_in_every_path(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(tiny / "text.txt", tmp_path / "text.txt")
    path = configuration(tmp_path, tiny, "llama", model="~/model", storage_path="~/runs")
    files = {split: f"~/{split}.txt" for split in ("calibration", "search", "validation", "test")}
    config = load_config(path, ["text.path=~/text.txt", f"text.files={json.dumps(files)}", "text.splits=~/s.json"])
    assert (config.model, config.storage_path) == (str(tmp_path / "model"), tmp_path / "runs")
    assert (config.text.path, config.text.splits) == (tmp_path / "text.txt", tmp_path / "s.json")
    assert config.text.files and config.text.files["test"] == tmp_path / "test.txt"
    with pytest.raises(UserError, match="~nobody-here is no user with a home folder"):
        load_config(path, ["storage_path=~nobody-here/runs"])


def test_weights_beyond_float16_are_refused_before_calibration(tiny: Path, tmp_path: Path) -> None:
    path = configuration(tmp_path, tiny, "llama")
    weighted(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(70000.0))(tmp_path / "model")
    refused = call_here("run", path)
    assert refused.returncode == 2
    assert "the largest float16, in which GGUF types store weights or their scales, found 70000 in" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_weights_are_read_once_for_digest_and_values_and_the_digest_is_that_of_the_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bitgenome.common.remembered.SETTLED_SECONDS", -1.0)
    read: list[str] = []

    def counted(file: Path) -> Found:
        read.append(file.name)
        return survey(file)

    monkeypatch.setattr(folders, "survey", counted)
    configuration(tmp_path, tiny, "llama")
    in_shards(lambda folder: None)(tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    for _ in range(2):
        folder = ModelFolder(tmp_path / "model")
        folder.check_values()
        assert folder.digest == digest_of_files(folder.path, files)
    assert sorted(read) == files and len(files) > 1


def digest_of_files(folder: Path, weights: list[str]) -> str:
    """The digest as runs have recorded it from the beginning."""
    names = [name for name in ("config.json", "tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    found = hashlib.sha256()
    for name in [*names, *weights]:
        found.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return found.hexdigest()


def test_certain_predictions_silent_layers_and_a_padding_token_end_in_a_file(tiny: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] *= 100  # logits more than 103 nats apart
        tensors["model.layers.1.self_attn.v_proj.weight"].zero_()  # the input of o_proj is always zero
        tensors["model.layers.0.mlp.up_proj.weight"].zero_()  # and of down_proj

    path = configuration(tmp_path, tiny, "llama")
    weighted(change)(tmp_path / "model")
    configured(pad_token_id=500)(tmp_path / "model")
    done = call_here("run", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("o_proj.weight is always zero") == 1
    run = tmp_path / "runs" / "r"
    best = json.loads((run / "best.json").read_text())
    assert best["winner"]["kl"] > 0
    damaged = run / "damaged.gguf"
    shutil.copyfile(run / best["gguf"], damaged)
    (tensor,) = (t for t in GGUFReader(damaged).tensors if t.name == "blk.0.attn_q.weight")
    with damaged.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(np.float16("nan").tobytes())  # the scale of the first block
    refused = call_here("verify", damaged)
    assert refused.returncode == 2
    assert f"expected finite outputs of {damaged}, found: " in refused.stderr.replace("\n", "")
