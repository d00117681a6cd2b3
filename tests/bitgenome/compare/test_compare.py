"""Files beside their original and llama.cpp's own, in llama.cpp."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bitgenome.common import layout
from bitgenome.compare.measure import Divergence, beginnings
from bitgenome.compare.prompts import prompts_of
from bitgenome.compare.subjects import chosen_mixes
from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from evaluators.model.folder import ModelFolder
from exporters.runtime.mix_file import mixes_by_size
from exporters.runtime.original import original_of, write_original
from tests.bitgenome.conftest import assert_one_sentence, call_here
from tests.small_models import save_small_model


def test_a_run_is_measured_beside_its_original_and_a_mix(little: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one two\n\n three\n")
    made = tmp_path / "made"
    command = ("compare", "little", "--storage", little, "--mix", "q4_k", "--keep", made, "--json")
    done = call_here(*command, "--prompts", tmp_path / "prompts", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    files = {file["kind"]: file for file in found["files"]}
    assert [file["kind"] for file in found["files"]] == ["original", "llama.cpp", "ours"]  # the first, then by size
    assert found["prompts"] == ["one two", "three"] and all(len(file["answers"]) == 2 for file in found["files"])
    proof = json.loads((little / "little" / layout.BEST).read_text())["proof"]
    assert files["ours"]["file_bytes"] == proof["file_bytes"]
    assert files["ours"]["figures"]["mean_kl"]["value"] == pytest.approx(
        proof["figures"]["mean_kl"]["value"], rel=0.05, abs=1e-5
    )
    assert files["llama.cpp"]["figures"]["mean_kl"]["value"] > files["ours"]["figures"]["mean_kl"]["value"]
    assert files["original"]["figures"] is None and files["original"]["divergence"] is None
    assert all(file["load_seconds"] > 0 and file["generated_tokens_per_second"] > 0 for file in found["files"])
    assert {file.name for file in made.iterdir()} == {
        Path(files[kind]["file"]).name for kind in ("original", "llama.cpp")
    }

    again = call_here("compare", made / Path(files["original"]["file"]).name, files["ours"]["file"], "--text", __file__)
    assert again.returncode == 0, again.stderr
    assert "ours" not in again.stdout and "RMS delta p" in again.stdout and "llama.cpp's files" not in again.stdout


def test_without_running_the_original_the_figures_are_those_of_the_model(little: Path) -> None:
    done = call_here("compare", "little", "--storage", little, "--mix", "Q8_0", "--skip-original", "--json")
    assert done.returncode == 0, done.stderr
    files = {file["kind"]: file for file in json.loads(done.stdout)["files"]}
    assert files.keys() == {"llama.cpp", "ours"}
    proof = json.loads((little / "little" / layout.BEST).read_text())["proof"]
    assert files["ours"]["figures"]["mean_kl"]["value"] == pytest.approx(proof["figures"]["mean_kl"]["value"], rel=1e-3)
    assert files["ours"]["divergence"] is None


def test_the_mixes_around_a_size_are_chosen(little: Path, tmp_path: Path) -> None:
    plan = make_plan(load_config(little / "little.yaml"))
    original = original_of(plan.folder, plan.file, tmp_path / "f32.gguf")
    sizes = [mix.size for mix in mixes_by_size(original)]
    for size in (sizes[0] - 1, sizes[len(sizes) // 2], sizes[-1] + 1):
        chosen = [mix.size for mix in chosen_mixes(original, size, ())]
        assert min(sizes, key=lambda other: abs(other - size)) in chosen
        assert chosen == sorted(set(chosen)) and len(chosen) == 2 + (sizes[0] < size < sizes[-1])
    assert [mix.mix for mix in chosen_mixes(original, 1, ("q6_k", "Q6_K"))] == ["Q6_K"]


def test_bad_input_is_refused_in_one_sentence(little: Path, tmp_path: Path) -> None:
    run = little / "little"
    best = json.loads((run / layout.BEST).read_text())
    other = save_small_model(tmp_path / "other", "llama", vocab_size=500)
    write_original(ModelFolder(other), tmp_path / "other.gguf")
    (tmp_path / "no.gguf").write_text("no GGUF file")
    (tmp_path / "empty").write_text("\n \n")
    unfinished = little / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / layout.BEST).unlink()
    lost = little / "lost"
    shutil.copytree(run, lost)
    (lost / best["gguf"]).unlink()
    for arguments, place in [
        ((tmp_path / "no.gguf",), "no.gguf"),
        ((tmp_path / "missing.gguf",), "missing.gguf"),
        ((run, tmp_path / "other.gguf"), "other.gguf"),
        ((unfinished,), "bitgenome resume"),
        ((lost,), "bitgenome export"),
        ((run, "--prompts", tmp_path / "missing"), "missing"),
        ((run, "--prompts", tmp_path / "empty"), "empty"),
        ((run, "--prompt", " "), "--prompt"),
        ((run, "--mix", "Q9"), "Q9"),
        ((run, "--text", __file__), "--text"),
        ((run / best["gguf"], "--mix", "Q4_K_M"), "--original"),
        ((tmp_path / "other.gguf", "--text", tmp_path / "missing"), "missing"),
    ]:
        assert_one_sentence(call_here("compare", *arguments), place)


def test_a_divergence_is_where_the_first_token_differs() -> None:
    found = Divergence.of([[1, 2, 3], [1, 5, 3], [4, 2, 3]], [[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert found.first == (None, 1, 0)
    assert (found.same, found.median_first) == (pytest.approx(1 / 3), 1)
    assert beginnings(np.arange(80).reshape(2, 40))[1] == list(range(40, 60))


def test_prompts_of_a_file_follow_those_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("b\n\nc \n")
    assert prompts_of(["a"], tmp_path / "prompts") == ["a", "b", "c"]
