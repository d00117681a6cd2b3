"""Quantizes a small model through a whole run, with the converter's file as template, and reads what the run proved."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TEXT = ("argparse.py", "ast.py")  # of the interpreter's library
SETTINGS: dict[str, Any] = {
    "name": "run",
    "levels": ["W4", "W6"],
    "evaluation": {"activations": "q8"},
    "search": {"strategy": "exact", "validation_candidates": 1},
    "healing": {"enabled": "off"},
    "workers": {"ray": "off"},
}
TOKENS = {"calibration": 2048, "sensitivity": 128, "search": 128, "validation": 128, "test": 512}
SHOWN = 300  # characters of a refusal


class RunError(RuntimeError):
    """Raised if the run ends without a proof; the message is its last line."""


@dataclass(frozen=True)
class Quantized:
    """Holds what a run proved, in nats a token: of the file in llama.cpp, and of its simulation with 8-bit inputs."""

    mean_kl: float  # full precision to llama.cpp
    eight_bit_to_runtime_kl: float


def quantize(model: Path, template: Path, scratch: Path, bits: float) -> Quantized:
    """Search a genome of ``bits`` per weight for ``model``, export it by ``template`` and prove it.

    Raises RunError if the run fails.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    text, config = scratch / "text.txt", scratch / "run.yaml"
    text.write_text("".join((library / name).read_text(encoding="utf-8") for name in TEXT), encoding="utf-8")
    settings = SETTINGS | {"storage_path": str(scratch), "model": str(model), "template": str(template)}
    settings["budget"] = {"bits_per_weight": bits}
    settings["text"] = {"source": "file", "path": str(text), "window": 128, "tokens": TOKENS}
    shutil.rmtree(scratch / "run", ignore_errors=True)
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "bitgenome.cli", "run", str(config)]
    environment = {**os.environ, "COLUMNS": "1000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError((done.stderr.strip().splitlines() or ["no word"])[-1][:SHOWN])
    proof = json.loads((scratch / "run" / "best.json").read_text(encoding="utf-8"))["proof"]
    return Quantized(proof["figures"]["mean_kl"]["value"], proof["eight_bit_to_runtime_kl"])
