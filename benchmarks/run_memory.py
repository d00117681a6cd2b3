"""Peak memory of every stage of a run against what is predicted for it, from configuration to proof.

The model is a random Llama. With ``--cgroup``, a folder of /sys/fs/cgroup that one may write to, the run may take
``--limit-mib`` MiB above the libraries' own and no more, files and llama.cpp included; without it, nothing is enforced.
``--share`` says which part of the limit workers plan with: the rest is for what is not planned (files that are being
read, allocators, the run's own objects).

    OMP_NUM_THREADS=2 python -m benchmarks.run_memory [--layers 72] [--hidden 768] [--limit-mib 512]
        [--cgroup /sys/fs/cgroup/memory/bitgenome]
"""

import argparse
import gc
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory import RESULT_FILE, answer_case, confine, status_bytes
from benchmarks.synthetic import random_model
from bitgenome.common.devices import release_memory
from bitgenome.config.run import parse_config
from bitgenome.plan.memory import llamacpp_memory, proof_memory, stage_memory
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.run.pipeline import run
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine import evaluator
from evaluators.healing import blocks
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.sizes import ModelShape

EMBEDDED = Path(__file__).parents[1] / "models" / "stdlib-6m"  # whose tokenizer and held-out text the model takes
VOCABULARY = 4096
WINDOW = 64
TOKENS = {"calibration": 512, "sensitivity": 64, "search": 64, "validation": 128, "test": 256}
SHARE = 0.8
EVALUATING = ("search", "validation", "healing", "test")  # may begin with the evaluator of the stage before


def settings(path: Path, memory: int, compensation: bool) -> dict[str, Any]:
    """A run that does a little of everything, on few tokens."""
    return {
        "name": "peak",
        "model": str(path / "model"),
        "storage_path": str(path / "runs"),
        "budget": {"bits_per_weight": 3.5},
        "levels": ["W2", "W4"],
        "text": {"source": "stdlib", "splits": str(EMBEDDED / "splits.json"), "window": WINDOW, "tokens": TOKENS},
        "evaluation": {"memory": memory},
        "search": {
            "population": 4,
            "generations": 2,
            "elites": 1,
            "validation_candidates": 2,
            "gene_groups": {"by": "kind"},
        },
        "quantization": {"compensation": compensation},
        "healing": {"steps": 2, "batch_tokens": 128},
        "workers": {"ray": "off"},
    }


def model(path: Path, layers: int, hidden: int) -> Path:
    """A random model with the embedded model's tokenizer, made where it is not there yet."""
    folder = path / "model"
    if not folder.is_dir():
        random_model(folder, layers, hidden, VOCABULARY)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


class Peaks:
    """Each stage's peak of resident memory, in bytes, above what the process took when nothing was held for it.

    That is at the stage's start or, where the stage before left an evaluator, where that is closed; stages that go on
    with the evaluator of the one before count from where that one did.
    """

    def __init__(self) -> None:
        self.measured: dict[str, float] = {}
        self.base = 0

    def note(self, name: str) -> None:
        """Note the peak so far, and watch for the next."""
        self.measured[name] = max(self.measured.get(name, 0), status_bytes("VmHWM") - self.base)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def restart(self) -> None:
        """Take what is held now as nothing, and watch for a peak anew."""
        gc.collect()
        release_memory()
        self.base = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all stages of the runs within."""
        stage, make_room = RunDirectory.stage, evaluator.make_room
        running, fresh = "", True  # the stage, and whether it has freed nothing yet

        @contextmanager
        def watched(run: RunDirectory, name: str) -> Iterator[None]:
            nonlocal running, fresh
            running, fresh = name, True
            if name not in EVALUATING:
                self.restart()
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            with stage(run, name):
                yield
            self.note(name)

        def emptied(state: dict[Any, Any]) -> None:
            nonlocal fresh
            if not fresh:  # else all of it belongs to the stage before
                self.note(running)
            fresh = False
            make_room(state)
            self.restart()

        RunDirectory.stage = watched  # type: ignore[method-assign]
        evaluator.make_room = blocks.make_room = emptied
        try:
            yield
        finally:
            RunDirectory.stage = stage  # type: ignore[method-assign]
            evaluator.make_room = blocks.make_room = make_room


def children_bytes() -> int:
    """The most that any process held which this one started and which has ended."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def predictions(plan: Plan, memory: int) -> dict[str, int]:
    """The predicted peak of every stage where a worker may use ``memory`` bytes; of the proof, llama.cpp's apart."""
    cpu, text = torch.device("cpu"), plan.config.text
    stages = stage_memory(plan, cpu, memory)
    proof = proof_memory(ModelShape.of(plan.folder), text.window, text.tokens.test, memory, cpu)
    stages |= {"proof": proof, "llama.cpp": llamacpp_memory(plan)}
    return {name: found.host_bytes for name, found in stages.items()}


def measure(path: Path, memory: int, limit: int, cgroup: str | None, compensation: bool) -> dict[str, Any]:
    """Run everything in this process; return peaks, predictions and seconds by stage, and what the run ended in."""
    config = parse_config(settings(path, memory, compensation), "run_memory")
    plan = make_plan(config)
    predicted = predictions(plan, memory)
    BlockModel(ModelFolder(path / "model"), torch.device("cpu"))  # loads transformers' modules
    if cgroup is not None:
        confine(limit, cgroup)
    subprocess.run([sys.executable, "-c", "import xllamacpp"], check=True)
    alone = children_bytes()  # llama.cpp without a file
    peaks, started = Peaks(), time.perf_counter()
    with peaks.watching():
        outcome = run(config, Console(file=sys.stderr, width=120))
    measured = peaks.measured | {"llama.cpp": children_bytes() - alone}
    return {
        "weights": plan.space.weights,
        "predicted": predicted,
        "measured": measured,
        "stages": outcome.seconds,
        "seconds": time.perf_counter() - started,
        "healing": outcome.healing.variant if outcome.healing else "off",
        "mean_kl": outcome.proof.figures.mean_kl.value,
        "simulated_to_runtime_kl": outcome.proof.simulated_to_runtime_kl,
    }


def measured_apart(
    path: Path,
    layers: int,
    hidden: int,
    limit: int,
    cgroup: str | None = None,
    share: float = SHARE,
    compensation: bool = True,
) -> dict[str, Any]:
    """``measure`` in a new process. Raises RuntimeError with what it wrote if it fails."""
    model(path, layers, hidden)  # outside the limit
    case = {"path": str(path), "memory": int(share * limit), "limit": limit, "cgroup": cgroup}
    case |= {"compensation": compensation}
    command = [sys.executable, "-m", "benchmarks.run_memory", "--case", json.dumps(case)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads((path / RESULT_FILE).read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=72)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--limit-mib", type=int, default=512)
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--plain", action="store_true", help="a bank without compensation, in a fifth of the time")
    parser.add_argument("--cgroup", type=str, default=None)
    parser.add_argument("--storage", type=Path, default=None)
    parser.add_argument("--case", type=str, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        answer_case(arguments.case, measure)
        return
    storage = arguments.storage or Path(tempfile.mkdtemp())
    limit = arguments.limit_mib << 20
    found = measured_apart(
        storage, arguments.layers, arguments.hidden, limit, arguments.cgroup, arguments.share, not arguments.plain
    )
    mib = 1 << 20
    enforced = f"{arguments.limit_mib} MiB, enforced" if arguments.cgroup else "nothing enforced"
    table = Table(
        title=f"{found['weights']:,} weights, {4 * found['weights'] / mib:.0f} MiB in float32; limit {enforced}; "
        f"healing {found['healing']}; {found['seconds']:.0f} s"
    )
    for column in ("stage", "predicted MiB", "measured MiB", "ratio", "seconds"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, predicted in found["predicted"].items():
        if stage in found["measured"]:
            peak, seconds = found["measured"][stage], found["stages"].get(stage, 0.0)
            table.add_row(
                stage, f"{predicted / mib:.0f}", f"{peak / mib:.0f}", f"{predicted / peak:.2f}", f"{seconds:.0f}"
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
