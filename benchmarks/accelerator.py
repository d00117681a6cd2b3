"""Every stage of a run on the device that bitgenome picks: seconds, peak memory and kernels, and its results beside the
CPU's.

Subjects: the embedded model, one random block at the shapes of Llama-3.1-8B (hidden 4096, MLP 14336, 32 heads of which
8 of keys), and a model folder of your own. Stages are the workers' pool tasks in this process: beside torch and
transformers they need gguf, psutil, pydantic and rich, but no Ray, DEAP, Optuna or llama.cpp. Each stage has a time
limit, and what it raised is recorded. JSON and table are written after each stage, so that an interrupted benchmark
leaves what it has. Kernels are those of one part of the stage (the note names it), counted by the profiler on an
accelerator, else as the operations that torch dispatches.

    python -m benchmarks.accelerator [--model FOLDER] [--seconds 480] [--out DIR] [--only SUBJECT ...] [--quick]
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks import device_stages as stages
from benchmarks.kernels import count_kernels
from benchmarks.limits import OutOfTimeError, time_limit
from bitgenome.common.devices import best_device, compute_type, device_name, peak_memory, release_memory
from evaluators.prepare.bank import Bank, group_tensors
from quantizers.formats.table import LEVEL_PRESETS

MIB = 1 << 20
CONSOLE = Console()
GPU_TESTS = ("tests/evaluators/test_accelerator.py", "-m", "gpu", "-q", "--noconftest", "-x")
SUBJECTS = ("tests", "embedded", "block", "model")
COLUMNS = ("subject", "stage", "seconds", "work", "per second", "allocated MiB", "reserved MiB", "kernels", "note")


class Report:
    """Collects rows and writes them as JSON and as a Markdown table after each."""

    def __init__(self, folder: Path, deadline: float):
        self.folder = folder
        self.deadline = deadline
        self.rows: list[dict[str, Any]] = []
        device = best_device()
        self.machine = {
            "device": device_name(device),
            "type": device.type, "compute": str(compute_type("auto", device)), "torch": torch.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
        }  # fmt: skip

    def stage(
        self, subject: str, name: str, limit: float, run: Callable[[dict[str, Any]], Any],
        part: Callable[[], Any] | None = None, note: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Run a stage within its limit; ``run`` adds figures to the row, ``part`` is run again to count kernels."""
        row: dict[str, Any] = {"subject": subject, "stage": name, "note": note}
        self.rows.append(row)
        left = self.deadline - time.perf_counter()
        if left < 5:
            row["error"] = "no time left"
            self.write()
            return row
        CONSOLE.print(f"{subject}: {name}", highlight=False)
        with self.recorded(row, min(limit, left)), measured(row):
            row.update(run(row) or {})
        left = self.deadline - time.perf_counter()
        if part is not None and "error" not in row and left > 5:
            with self.recorded(row, min(limit, left)):
                row.update(count_kernels(part))
        release_memory()
        self.write()
        return row

    @contextmanager
    def recorded(self, row: dict[str, Any], limit: float) -> Iterator[None]:
        """Record what is raised inside instead of raising it."""
        try:
            with time_limit(limit):
                yield
        except OutOfTimeError:
            row["cut"] = f"cut after {limit:.0f} s"
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
            row["traceback"] = traceback.format_exc()

    def write(self) -> None:
        result = {"machine": self.machine, "rows": self.rows}
        (self.folder / "accelerator.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        (self.folder / "accelerator.md").write_text(self.table())

    def table(self) -> str:
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        lines = [machine, "", "| " + " | ".join(COLUMNS) + " |", "|---|---|" + "--:|" * 6 + "---|"]
        for row in self.rows:
            work, seconds = row.get("work"), row.get("seconds")
            rate = f"{work / seconds:,.0f}" if work and seconds else ""
            kernels = f"{row['kernels']:,} {row['counted_by']}" if "kernels" in row else ""
            notes = [row["note"], row.get("cut", ""), row.get("error", "").split("\n")[0][:120]]
            cells = [
                row["subject"], row["stage"], "" if seconds is None else f"{seconds:.2f}",
                f"{work:,.0f} {row['unit']}" if work else "", rate, row.get("allocated_mib", ""),
                row.get("reserved_mib", ""), kernels, "; ".join(filter(None, notes)),
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines) + "\n"


@contextmanager
def measured(row: dict[str, Any]) -> Iterator[None]:
    """Add seconds and, on an accelerator, the peaks of memory, also of a stage that raises."""
    device = best_device()
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.memory.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        yield
        if device.type != "cpu":
            torch.accelerator.synchronize()
    finally:
        row["seconds"] = time.perf_counter() - started
        if device.type == "cpu":
            row["allocated_mib"] = round(peak_memory() / MIB)  # of the process, since it started
        else:
            row["allocated_mib"] = round(torch.accelerator.memory.max_memory_allocated() / MIB)
            row["reserved_mib"] = round(torch.accelerator.memory.max_memory_reserved() / MIB)


def gpu_tests(row: dict[str, Any]) -> None:
    """Run the tests that are marked for accelerators."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *GPU_TESTS], capture_output=True, text=True, timeout=110, check=False
    )
    row["output"] = (done.stdout + done.stderr)[-4000:]
    row["note"] = (done.stdout.strip().splitlines() or ["no output"])[-1][:160]
    if done.returncode not in {0, 5}:  # 5: none collected
        row["error"] = f"pytest exited with {done.returncode}"


def all_stages(report: Report, subject: stages.Subject, share: float, *, kernels: bool, twice: bool = False) -> None:
    """Run every stage of a subject; ``share`` scales the time limits, ``twice`` times replayed kernels too."""
    run = partial(report.stage, subject.name)

    def part(what: Callable[[], Any]) -> Callable[[], Any] | None:
        return what if kernels else None

    run("calibration", 40 * share, lambda row: stages.calibrate(subject))
    group = ", ".join(subject.levels)
    run(
        "bank", 100 * share, lambda row: stages.build_bank(subject, row.update),
        part(lambda: stages.scalar_task(subject, ("W4",)).run({})),
        f"{group}; kernels of attention's smallest group at W4",
    )  # fmt: skip
    run("output factors", 40 * share, lambda row: stages.measure_outputs(subject))
    for times in ("first", "replayed")[: 1 + twice]:
        run(
            f"bank on both sides, {times}", 60 * share,
            lambda row: stages.build_groups(stages.two_sided_tasks(subject), len(subject.levels), row.update),
            part(lambda: stages.two_sided_tasks(subject, ("W4",))[0].run({})) if times == "first" else None,
            f"{group}; head and embedding by their rows",
        )  # fmt: skip
    if any(not stages.whole(subject, task) for task in stages.bank_tasks(subject, subject.bank, subject.levels)):
        run("bank, the rest without compensation", 40 * share, lambda row: stages.fill_bank(subject))
    run(
        "sweep, resident", 40 * share, lambda row: stages.sweep(subject),
        part(lambda: list(subject.run([stages.sweep_task(subject)]))), f"{subject.genomes} genomes",
    )  # fmt: skip
    subject.state.clear()
    run("sweep, streamed", 40 * share, lambda row: stages.sweep(subject, memory=stages.least_memory(subject)))
    subject.state.clear()
    run("sensitivities by gradient", 40 * share, lambda row: stages.gradient(subject))
    subject.state.clear()
    run("sensitivities, exact", 30 * share, lambda row: stages.exact(subject, 8), None, "8 genes at most")
    subject.state.clear()
    run("healing, whole", 40 * share, lambda row: stages.heal_whole(subject))
    subject.state.clear()
    run("healing, by blocks", 40 * share, lambda row: stages.heal_blocks(subject, 4))
    subject.state.clear()
    run("proof by simulation", 30 * share, lambda row: stages.simulated_proof(subject))
    run("bank of codebook types", 60 * share, lambda row: stages.build_codebooks(subject), None,
        f"{', '.join(subject.codebooks)} of one group")  # fmt: skip


def against_cpu(report: Report, subject: stages.Subject, limit: float, genomes: int) -> None:
    """Compare one group of the bank, and the KL of some genomes, with a CPU process's."""

    def compare(row: dict[str, Any]) -> None:
        request = subject.folder / "request.json"
        kept = {"model": str(subject.model), "folder": str(subject.folder), "levels": subject.levels}
        kept |= {"codebooks": subject.codebooks, "groups": subject.groups, "genomes": genomes, "tokens": subject.tokens}
        request.write_text(json.dumps(kept))
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.accelerator", "--reference", str(request)]
        subprocess.run(command, env=hidden, check=True, timeout=max(10, limit))
        found = json.loads((subject.folder / "reference.json").read_text())
        row["kl_cpu"] = found["kl"]
        for compute in ("float32", "auto"):
            kls = stages.evaluated(subject, compute, genomes)
            row[f"kl_{compute}"] = kls
            row[f"worst_kl_ratio_{compute}"] = max(abs(a / b - 1) for a, b in zip(kls, found["kl"], strict=True))
            subject.state.clear()
        stages.scalar_task(subject).run({})
        banks = {"scalar": (subject.folder / "again", subject.folder / "cpu-scalar")}
        with suppress(OSError):
            banks["codebook"] = (subject.folder / "codebooks", subject.folder / "cpu-codebooks")
        for kind, (ours, theirs) in banks.items():
            row[kind] = compared_banks(ours, theirs, group_tensors(stages.scalar_task(subject).group))
        shares = {f"{kind} {name}": v["equal_bytes"] for kind in banks for name, v in row[kind].items()}
        worst = max(v["objective"] for kind in banks for v in row[kind].values())
        row["note"] = (
            f"KL off by {row['worst_kl_ratio_float32']:.1e} (float32), {row['worst_kl_ratio_auto']:.1e} (auto); equal "
            f"bytes {min(shares.values()):.4f} to {max(shares.values()):.4f}, objective off by {worst:+.1e} at worst"
        )

    report.stage(subject.name, "against the CPU", limit, compare)


def compared_banks(ours: Path, theirs: Path, tensors: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """By format: the share of equal bytes, and the worst relative difference of a tensor's objective."""
    found: dict[str, dict[str, float]] = {}
    for tensor in tensors:
        a, b = (load_file(folder / f"{tensor}.safetensors") for folder in (ours, theirs))
        for name in a.keys() & b.keys():
            record = found.setdefault(name, {"equal": 0, "bytes": 0, "objective": 0.0})
            record["equal"] += int((a[name] == b[name]).sum())
            record["bytes"] += a[name].numel()
            mine, other = (entries(folder, tensor)[name] for folder in (ours, theirs))
            record["objective"] = max(record["objective"], mine / other - 1 if other else 0.0, key=abs)
    return {name: {**record, "equal_bytes": record["equal"] / record["bytes"]} for name, record in found.items()}


def entries(folder: Path, tensor: str) -> dict[str, float]:
    """Objective of a tensor by format name."""
    with Bank(folder)._file(tensor) as file:
        return {name: record["error"] for name, record in json.loads(file.metadata()["errors"]).items()}


def reference(request: Path) -> None:
    """The part of the CPU: the same groups from the same Hessians, the same genomes on the same bank."""
    kept = json.loads(request.read_text())
    subject = stages.Subject(
        "reference", Path(kept["model"]), Path(kept["folder"]), tuple(kept["levels"]), tuple(kept["codebooks"]),
        tokens=kept["tokens"], groups=kept["groups"],
    )  # fmt: skip
    assert best_device().type == "cpu"
    group = stages.codebook_task(subject).group
    for levels, name in ((subject.levels, "cpu-scalar"), (subject.codebooks, "cpu-codebooks")):
        for task in stages.bank_tasks(subject, subject.folder / name, levels):
            if task.group == group:
                task.run({})
    kls = stages.evaluated(subject, "float32", kept["genomes"])
    (subject.folder / "reference.json").write_text(json.dumps({"kl": kls}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, run after the other two")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, default=Path("accelerator"))
    parser.add_argument("--only", choices=SUBJECTS, default=SUBJECTS, nargs="+", help="these subjects alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        reference(args.reference)
        return
    deadline = time.perf_counter() + args.seconds
    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    report = Report(args.out, deadline)
    levels, codebooks = LEVEL_PRESETS["fine"], ("IQ2_XXS", "IQ3_S", "IQ4_XS")
    embedded, sizes, tiny = stages.EMBEDDED, stages.LLAMA_8B, {}
    if args.quick:
        levels, codebooks, sizes, tiny = ("W2", "W4"), codebooks[:1], stages.TINY, stages.LITTLE_WORK
        embedded = stages.block_model(work / "tiny-model", **sizes)
    wanted = args.only
    if best_device().type != "cpu" and "tests" in wanted:
        report.stage("tests", "pytest -m gpu", 120, gpu_tests)
    if "embedded" in wanted:
        small = stages.Subject(embedded.name, embedded, work / "small", levels, codebooks, **tiny)
        all_stages(report, small, 1.0, kernels=True)
        against_cpu(report, small, 60, 4)
    if "block" in wanted:
        model = stages.block_model(work / "block-model", **sizes)
        block = stages.Subject("block of 8B", model, work / "block", levels, codebooks[:1], **tiny)
        all_stages(report, block, 1.2, kernels=True, twice=True)
    if args.model and "model" in wanted:
        own = stages.Subject(args.model.name, args.model, work / "own", ("W3", "W4", "W6"), codebooks[-1:], **tiny)
        all_stages(report, own, 1.0, kernels=False)
        against_cpu(report, own, 60, 2)
    shutil.rmtree(work, ignore_errors=True)
    CONSOLE.print(report.table(), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
