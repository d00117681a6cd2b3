"""The command ``verify`` beside another file: its figures as JSON, and one sentence for what cannot be measured."""

import json
from pathlib import Path

import pytest

from benchmarks.float_gguf import export_float
from evaluators.model.folder import ModelFolder
from tests.bitgenome.conftest import assert_one_sentence, call_here
from tests.conftest import built_once
from tests.small_models import save_small_model


@pytest.fixture
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model in F32 and F16, and one of another vocabulary."""

    def build(folder: Path) -> None:
        for name, model, formats in (("one", "llama", ("F32", "F16")), ("other", "qwen3", ("F32",))):
            for fmt in formats:
                export_float(
                    ModelFolder(save_small_model(folder / f"{name}{fmt}", model)), folder / f"{name}-{fmt}.gguf", fmt
                )
        (folder / "text.txt").write_text("Once upon a time there was a girl. " * 50)
        (folder / "short.txt").write_text("Once.")
        (folder / "latin.txt").write_bytes("Größe ".encode("latin-1") * 99)

    return built_once(tmp_path_factory, "verify-files", build)


def test_any_file_is_measured_beside_its_original(files: Path) -> None:
    pair = ("--base", files / "one-F32.gguf", files / "one-F16.gguf", "--text", files / "text.txt")
    done = call_here("verify", *pair, "--window", "32", "--tokens", "100", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["window"], found["figures"]["windows"], found["figures"]["positions"]) == (32, 3, 3 * 15)
    assert found["base_bytes"] == (files / "one-F32.gguf").stat().st_size > found["file_bytes"]
    assert 0 < found["figures"]["mean_kl"]["value"] < 1e-4
    assert found["figures"]["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-3)
    said = call_here("verify", *pair, "--window", "32", "--tokens", "100", "--scored", "all").stdout
    assert "99.9 % KL" in said and "same top token" in said and "RMS delta p" in said
    assert "96 positions of 3 windows of 32 tokens" in " ".join(said.split())


REFUSED = {
    "another vocabulary": (["--base", "one-F32.gguf", "other-F32.gguf"], "from the tokenizer of other-F32.gguf"),
    "no file": (["--base", "one-F32.gguf", "none.gguf"], "none.gguf"),
    "no base": (["--base", "none.gguf", "one-F16.gguf"], "none.gguf"),
    "a text as file": (["--base", "one-F32.gguf", "text.txt"], "text.txt"),
    "no text": (["--base", "one-F32.gguf", "one-F16.gguf", "--text", "none.txt"], "found none at"),
    "a short text": (["--base", "one-F32.gguf", "one-F16.gguf", "--text", "short.txt"], "one window, 64 tokens"),
    "no UTF-8": (["--base", "one-F32.gguf", "one-F16.gguf", "--text", "latin.txt"], "iconv"),
    "a window over the context": (["--base", "one-F32.gguf", "one-F16.gguf", "--window", "99999"], "context of"),
    "a text without base": (["one-F16.gguf", "--text", "text.txt"], "--text with --base"),
    "a run and a base": (["--base", "one-F32.gguf", "one-F16.gguf", "--run", "r"], "--run or --base"),
}


@pytest.mark.parametrize(("arguments", "place"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], place: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    window = [] if "--window" in arguments or "--base" not in arguments else ["--window", "64"]
    assert_one_sentence(call_here("verify", *arguments, *window), place)
