"""Whole runs of the command line on the embedded model, in little text; runs of a session share one bank."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitgenome.cli import terminal
from bitgenome.cli.main import main
from bitgenome.common import layout
from tests.conftest import EMBEDDED, REPOSITORY, built_once
from tests.small_models import save_small_model

SMALL = {
    "model": str(EMBEDDED),
    "budget": {"bits_per_weight": 3.5},
    "levels": ["W2", "W3", "W4", "W6"],
    "text": {
        "splits": str(EMBEDDED / "splits.json"),
        "window": 256,
        "tokens": {"calibration": 4096, "sensitivity": 256, "search": 512, "validation": 512, "test": 1024},
    },
    "search": {"population": 8, "generations": 3, "validation_candidates": 2},
    "quantization": {"objective": "output"},  # two-sided banks take four times as long; see plan/test_objective.py
    "healing": {"steps": 6, "batch_tokens": 512, "learning_rate": 0.003},
    "workers": {"ray": "local", "count": 2},
    "llamacpp_mix": "off",
}
LITTLE = {  # of everything, where the figures do not matter
    "model": str(EMBEDDED),
    "levels": ["W2", "W4"],
    "text": {
        "splits": str(EMBEDDED / "splits.json"),
        "window": 64,
        "tokens": {"calibration": 1024, "sensitivity": 128, "search": 128, "validation": 128, "test": 256},
    },
    "search": {"population": 4, "generations": 2, "elites": 2, "brood": 4, "validation_candidates": 2},
    "quantization": {"objective": "output"},
    "healing": {"enabled": "off"},
    "llamacpp_mix": "off",
}


Finished = subprocess.CompletedProcess[str]


def call_here(*arguments: str | Path) -> Finished:
    """Run the command line in this process, where its libraries are imported already; not for runs on Ray."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["bitgenome", *map(str, arguments)])
        for console in (terminal.console, terminal.errors):
            patch.setattr(console, "width", 160)
        with pytest.raises(SystemExit) as end:
            main()
    code = end.value.code
    assert isinstance(code, int)
    return Finished(arguments, code, out.getvalue(), errors.getvalue())


@dataclass(frozen=True)
class Runs:
    """A storage path, and the command line on it."""

    storage: Path

    def write(self, name: str, **changes: Any) -> Path:
        """A configuration file of the small run with top-level ``changes``; sections are merged."""
        config: dict[str, Any] = {"name": name, "storage_path": str(self.storage), **SMALL}
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) and key != "budget" else value
        path = self.storage / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "bitgenome.cli", *map(str, arguments)]

    def call(self, *arguments: str | Path) -> Finished:
        environment = {**os.environ, "COLUMNS": "160"}
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
        )

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """evaluations.jsonl without the seconds."""
        lines = (self.storage / name / "evaluations.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    def best(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.storage / name / "best.json").read_text())
        return record

    def bank(self, name: str) -> Path:
        """The bank that the run took its weights from."""
        return Path(json.loads((self.storage / name / "run.json").read_text())["bank"])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def finished(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The undisturbed run ``base`` on two Ray workers: made once, and each test process has a copy to change."""

    def build(storage: Path) -> None:
        original = Runs(storage)
        done = original.call("run", original.write("base"))
        assert done.returncode == 0, done.stderr
        (storage / "stdout").write_text(done.stdout)
        (storage / "stderr").write_text(done.stderr)

    built = built_once(tmp_path_factory, "base-run", build)
    shutil.copytree(built, runs.storage, dirs_exist_ok=True)
    runs.write("base")
    record = runs.storage / "base" / layout.RECORD
    record.write_text(record.read_text().replace(str(built), str(runs.storage)))
    return Finished(runs.command("run"), 0, (built / "stdout").read_text(), (built / "stderr").read_text())


@pytest.fixture
def little(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path with the finished run ``little`` of a random model, a copy to be changed; no Ray."""

    def build(storage: Path) -> None:
        model = save_small_model(storage / ("m" * 240), "llama")  # a long name, as some hubs have them
        config = {**LITTLE, "name": "little", "model": str(model), "levels": ["W4", "W8"], "workers": {"ray": "off"}}
        config |= {"storage_path": str(storage), "budget": {"bits_per_weight": 8.0}, "llamacpp_mix": "on"}
        (storage / "little.yaml").write_text(yaml.safe_dump(config))
        done = call_here("run", storage / "little.yaml")
        assert done.returncode == 0, done.stderr

    built = built_once(tmp_path_factory, "little-run", build)
    shutil.copytree(built, tmp_path / "runs")
    for file in (tmp_path / "runs" / "little" / layout.RECORD, tmp_path / "runs" / "little.yaml"):
        file.write_text(file.read_text().replace(str(built), str(tmp_path / "runs")))
    return tmp_path / "runs"


def assert_one_sentence(done: Finished, place: str) -> None:
    """The command was refused with one whole sentence that names ``place``."""
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "expected" in said and "found" in said and place in said, done.stderr
    assert "Traceback" not in done.stderr
