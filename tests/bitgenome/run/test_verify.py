"""A shipped file stays what was proved: nothing replaces it that is not right, and verify finds every changed byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from exporters.files.gguf_reader import read_gguf
from exporters.runtime import llamacpp
from tests.bitgenome.conftest import assert_one_sentence, call_here

DYING = """
import os, sys
sys.stdin.readline()
sys.stderr.write("/built/here/llama-vocab.cpp:2665: GGML_ASSERT(equal) failed\\n")
sys.stderr.flush()
os.abort()
"""


def best(little: Path, **changes: Any) -> dict[str, Any]:
    """The object in best.json, after ``changes`` are written into it."""
    file = little / "little" / "best.json"
    record: dict[str, Any] = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(record))
    return record


def shipped(little: Path) -> Path:
    return little / "little" / str(best(little)["gguf"])


def test_verify_says_what_differs_wherever_a_byte_has_changed(little: Path) -> None:
    file = shipped(little)
    measured = json.loads(call_here("verify", file, "--json").stdout)
    assert measured["figures"] == best(little)["proof"]["figures"]
    whole, tensor = file.read_bytes(), read_gguf(file).tensors["blk.1.ffn_up.weight"]
    for place, found in (
        (tensor.offset + 7, "tensor model.layers.1.mlp.up_proj.weight to differ"),
        (whole.index(b"general.name") + 30, "bytes outside the tensors to differ"),
        (2, "GGUF"),
    ):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_one_sentence(call_here("verify", file), found)
    file.write_bytes(whole + b"\0")
    assert_one_sentence(call_here("verify", file), f"expected the {len(whole):,} bytes that were shipped")
    file.unlink()
    assert_one_sentence(call_here("verify", little / "little"), "found none: bitgenome export")


def test_a_file_over_the_budget_does_not_verify(little: Path) -> None:
    size = shipped(little).stat().st_size
    best(little, budget_bytes=size - 1)
    assert_one_sentence(call_here("verify", shipped(little)), f"at most the budget, {size - 1:,} bytes")


def test_a_run_of_before_that_recorded_no_sha256_is_verified_by_its_tensors(little: Path) -> None:
    best(little, gguf_bytes=None, gguf_sha256=None)
    file = shipped(little)
    whole, tensor = file.read_bytes(), read_gguf(file).tensors["blk.0.attn_q.weight"]
    assert call_here("verify", file).returncode == 0
    file.write_bytes(whole[: tensor.offset] + bytes(4) + whole[tensor.offset + 4 :])
    assert_one_sentence(call_here("verify", file), "tensor model.layers.0.self_attn.q_proj.weight to differ")


def test_a_failed_export_leaves_the_good_file(little: Path) -> None:
    file, winner = shipped(little), best(little)["winner"]
    before = file.read_bytes()
    template = next(little.glob("m*")) / "chat_template.jinja"
    template.write_text("{{ messages }}")
    for command in ("export", "verify"):
        assert_one_sentence(call_here(command, little / "little"), "such as chat_template.jinja")
    template.unlink()
    best(little, winner=winner | {"file_bytes": winner["file_bytes"] + 32})
    assert_one_sentence(call_here("export", little / "little"), "bytes that were searched")
    assert file.read_bytes() == before
    assert [path.name for path in (little / "little").glob("*.tmp")] == []
    best(little, winner=winner)
    assert call_here("export", little / "little").returncode == 0 and file.read_bytes() == before


def test_what_was_searched_is_kept_when_llamacpp_dies_in_the_proof(
    little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = best(little)
    (tmp_path / "dying.py").write_text(DYING)
    with monkeypatch.context() as patch:
        patch.setattr(llamacpp, "SERVER", tmp_path / "dying.py")
        died = "it died by SIGABRT, saying: llama-vocab.cpp:2665: GGML_ASSERT(equal) failed"
        assert_one_sentence(call_here("resume", little / "little"), died)
        assert best(little)["proof"] == proved["proof"], "the same file was proved before"
        (little / "little" / "best.json").unlink()
        assert_one_sentence(call_here("resume", little / "little"), died)
        assert (best(little)["winner"], best(little)["proof"]) == (proved["winner"], None)
        assert call_here("export", little / "little").returncode == 0
        status = json.loads(call_here("status", little / "little", "--json").stdout)
        assert status["state"] == "failed" and died in status["error"]
    best(little, proof={"runtime_kl": 0.1})  # of an early version, without figures
    assert call_here("resume", little / "little").returncode == 0
    assert best(little)["proof"]["figures"] == proved["proof"]["figures"]


def test_a_run_is_named_in_the_same_ways_by_all_commands(little: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(little / "little")
    assert call_here("export", ".").returncode == 0
    assert call_here("verify", shipped(little).name).returncode == 0
    assert call_here("status", ".").stdout.split()[:2] == ["run", str(little / "little")]
    assert call_here("export", "little", "--storage", little).returncode == 0
    assert "finished" in call_here("status", "little", "--storage", little).stdout
    monkeypatch.chdir(little)
    assert call_here("export", "little").returncode == 0
    assert call_here("verify", "little", "--storage", ".").returncode == 0
    for command in ("resume", "export", "verify", "status"):
        assert_one_sentence(call_here(command, "nobody", "--storage", "."), "there are little")
    assert_one_sentence(call_here("resume", shipped(little)), "name its folder")
    assert_one_sentence(call_here("verify", "nothing.gguf"), "expected a GGUF file, found none at nothing.gguf")


def test_a_storage_path_that_has_moved_is_mended_by_resume(little: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("little", "shared"):
        (little / name).rename(moved / name)
    assert_one_sentence(call_here("export", moved / "little"), f"has moved, bitgenome resume {moved / 'little'}")
    assert call_here("resume", moved / "little").returncode == 0
    assert call_here("export", moved / "little").returncode == 0
