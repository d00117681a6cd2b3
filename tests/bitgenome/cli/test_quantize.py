"""One command makes a file: settings, run, proof and copy; its YAML lies in the run's directory."""

from pathlib import Path

import pytest

from bitgenome.common import layout
from bitgenome.config.run import load_config
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_result import RunResult
from tests.bitgenome.conftest import assert_one_sentence, call_here
from tests.conftest import EMBEDDED
from tests.small_models import save_small_model

TINY = (  # of everything, where the figures do not matter
    "levels=[Q4_K, q8_0]", "workers.ray=off", "text.window=64",
    *(f"text.tokens.{split}=128" for split in ("sensitivity", "search", "validation", "test")),
    "text.tokens.calibration=1024",
)  # fmt: skip
SET = [word for setting in TINY for word in ("--set", setting)]


def test_one_command_makes_a_file_and_leaves_the_settings_it_goes_on_with(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "small", "llama")
    command = ["quantize", model, "--bits", "8", "--time", "1s", "--storage", tmp_path / "runs", *SET]
    done = call_here(*command, "-o", tmp_path / "mine.gguf")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small-8bpw"
    for what in ("model", "size", "levels", "text", "effort", "search", "workers", "forecast"):
        assert any(line.strip().startswith(f"{what}  ") for line in done.stdout.splitlines()), what
    result = RunResult.read(run)
    assert result and (tmp_path / "mine.gguf").read_bytes() == (run / result.gguf).read_bytes()
    settings = run / layout.SETTINGS
    assert settings.read_text().startswith(f"# bitgenome quantize {model} --bits 8")
    assert load_config(settings) == RunDirectory.open(run).config
    kept = settings.read_text()
    assert_one_sentence(call_here(*command, "--set", "text.seed=1"), "differs in text.seed: choose another name")
    assert settings.read_text() == kept
    (run / result.gguf).unlink()  # the same command goes on, with the settings that are there
    again = call_here(*command)
    assert again.returncode == 0 and f"going on with the settings of {settings}" in again.stdout
    assert "forecast" not in again.stdout and (run / result.gguf).read_bytes() == (tmp_path / "mine.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", EMBEDDED], "expected one size"),
        (["quantize", EMBEDDED, "--size", "4.5"], "'4.5' has no unit"),
        (["quantize", EMBEDDED, "--device-memory", "1GiB", "--context", "9"], "on a device of 1GiB"),
        (["quantize", EMBEDDED, "--size", "2.6MB", "--kv", "q8_0"], "expected --device-memory beside"),
        (["quantize", EMBEDDED, "--bits", "4", "-o", "none/x.gguf"], "none"),
        (["init", EMBEDDED, "--time", "soon"], "--time"),
        (["init", EMBEDDED, "-o", EMBEDDED / "config.json"], "config.json"),
        (["init", "no/such/model"], "no/such/model"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str | Path], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(call_here(*arguments), said)
    assert not any(tmp_path.iterdir())


def test_a_size_that_no_file_has_is_told_with_those_that_some_have(tmp_path: Path) -> None:
    done = call_here("quantize", EMBEDDED, "--size", "1MB", "--storage", tmp_path)
    assert done.returncode == 2 and "this model's files lie between 1.6452 MB" in done.stderr
    assert not any(tmp_path.iterdir())


def test_help_is_also_h_and_has_examples() -> None:
    for command in ("quantize", "init"):
        short, long = call_here(command, "-h"), call_here(command, "--help")
        assert short.returncode == long.returncode == 0
        assert short.stdout == long.stdout and f"bitgenome {command} " in short.stdout
