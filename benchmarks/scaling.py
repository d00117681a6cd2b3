"""What channel scaling changes, format by format, and how near 8-bit inputs bring the simulation to llama.cpp.

    python -m benchmarks.scaling [--config configs/stdlib-6m.yaml] [--storage runs] [--tokens 4096] [--files 6]
                                 [--parts none smoothquant awq protect activations]

scaling: every K type, uniform, on validation text: reconstruction error (over the outputs' own power) and KL without
scaling, with smoothquant, awq (searched alpha), protection of the top 1 %. activations: files of random neighbours
of one genome, their KL by simulation in floats, with 8-bit inputs, and by llama.cpp itself.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate
from bitgenome.run.prepare import evaluator_setup, record_inputs, scale_channels
from bitgenome.run.proof import prove
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.evaluator import EvaluatorSetup, GenomeEvaluator
from evaluators.model.folder import ModelFolder
from evaluators.model.scaled_view import scaled, source_of
from evaluators.prepare.bank import Bank
from evaluators.prepare.input_group import InputGroup
from exporters.files.gguf_writer import export_gguf
from quantizers.formats.table import format_for
from quantizers.rounding.row_choice import row_errors
from search.types import Fidelity, Genome
from workers.pool.base import SerialPool

LEVELS = ("W2", "W3", "W4", "W5", "W6")
VARIANTS = {
    "none": (),
    "smoothquant": ("quantization.scaling={kind: smoothquant, alpha: 0.5}",),
    "awq": ("quantization.scaling={kind: awq, grid: 8}",),
    "protect": ("quantization.scaling={protect: 0.01}",),
}
CHANGED = 4  # genes in which they differ from the genome between


def prepared(arguments: argparse.Namespace, variant: str) -> tuple[EvaluatorSetup, Path, list[dict[str, object]]]:
    """Setup with the bank of one variant, the original model's input groups, and what was chosen for each."""
    overrides = VARIANTS[variant]
    common = [f"storage_path={arguments.storage}", f"levels=[{', '.join(LEVELS)}]", f"name=scaling-{variant}"]
    plan = make_plan(load_config(arguments.config, [*common, *overrides]))
    run, pool = RunDirectory.create(plan.config), SerialPool()
    windows = read_windows(plan)
    record_inputs(plan, windows, run)
    calibration, groups = calibrate(plan, windows, pool, lambda items, *_: iter(items))
    original, chosen = calibration, []
    if overrides:
        plan, calibration = scale_channels(plan, calibration, groups, run, pool, lambda items, *_: iter(items))
        chosen = json.loads((run.path / "scaling.json").read_text(encoding="utf-8"))
    bank = build_bank(plan, calibration, groups, pool, lambda items, *_: iter(items))
    return evaluator_setup(plan, run, bank), original, chosen


def measure_scaling(arguments: argparse.Namespace, console: Console) -> None:
    """One row a format, one pair of figures a variant."""
    variants = [variant for variant in VARIANTS if variant in arguments.parts]
    cells: dict[str, list[str]] = {level: [] for level in LEVELS}
    fidelity = Fidelity("validation", arguments.tokens)
    for variant in variants:
        started = time.perf_counter()
        setup, calibration, chosen = prepared(arguments, variant)
        seconds = time.perf_counter() - started
        evaluator = GenomeEvaluator(setup)
        for choice, level in enumerate(LEVELS):
            (result,) = evaluator.evaluate([(choice,) * len(setup.space.genes)], fidelity)
            reconstruction = original_reconstruction(setup, calibration, level)
            cells[level].append(f"{reconstruction:.3e} / {result.kl:.5f}")
        console.print(f"{variant}: {seconds:.0f} s; {alphas(chosen)}", soft_wrap=True)
    table = Table(title=f"reconstruction / KL, {arguments.tokens:,} tokens of validation text", title_justify="left")
    for column in ("", *variants):
        table.add_column(column, justify="right" if column else "left")
    for level, row in cells.items():
        table.add_row(level, *row)
    console.print(table)


def original_reconstruction(setup: EvaluatorSetup, calibration: Path, level: str) -> float:
    """Error of all tensors at one level over their outputs' power, both in the original model's units."""
    folder, bank = ModelFolder(setup.model), Bank(setup.bank)
    error = power = 0.0
    for file in sorted(calibration.glob("*.safetensors")):
        if file.name == "windows.safetensors":
            continue
        group = InputGroup.load(file)
        for name in group.tensors:
            weights, fmt = folder.read(name).float(), format_for(level, len(group.hessian))
            factors = scaled(folder.path, name, torch.ones_like(weights)) if source_of(folder.path) else torch.ones(())
            rounded = bank.weights(name, fmt, weights.shape[1], weights.device)
            error += float(row_errors((weights - rounded) / factors, group.hessian).sum())
            power += float(row_errors(weights / factors, group.hessian).sum())
    return error / power


def alphas(chosen: list[dict[str, object]]) -> str:
    """Input, alpha ("w": over the weights' magnitude) and error relative to no scaling."""
    return ", ".join(
        f"{str(r['group']).removeprefix('model.layers.')} {r['alpha']:.2f}{'w' * bool(r['weighted'])} {r['error']:.3f}"
        for r in chosen
    )


def neighbours(genome: Genome, choices: int, files: int) -> list[Genome]:
    rng = random.Random(0)
    found = []
    for _ in range(files):
        child = list(genome)
        for gene in rng.sample(range(len(child)), CHANGED):
            child[gene] = rng.randrange(choices)
        found.append(tuple(child))
    return found


def measure_activations(arguments: argparse.Namespace, console: Console) -> None:
    """KL of files around uniform W4 by both simulations and by llama.cpp, with rank correlations and cost."""
    setup, *_ = prepared(arguments, "none")
    evaluators = [GenomeEvaluator(replace(setup, activations=kind)) for kind in ("float", "q8")]
    folder, bank = ModelFolder(setup.model), Bank(setup.bank)
    text = evaluators[0].windows
    text = replace(text, windows={"test": text.take("test", arguments.tokens)})
    rows, seconds = [], ([], [])
    for genome in neighbours((LEVELS.index("W4"),) * len(setup.space.genes), len(LEVELS), arguments.files):
        formats = setup.space.formats_of(genome)
        for evaluator, taken in zip(evaluators, seconds, strict=True):
            taken.append(evaluator.evaluate([genome], Fidelity("test", arguments.tokens))[0].seconds)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "file.gguf"
            export_gguf(folder, lambda name: (formats[name], bank.packed(name, formats[name]).numpy()), path)  # noqa: B023
            rows.append(prove(path, folder, text, "q8"))
    table = Table(title=f"{arguments.tokens:,} tokens of test text", title_justify="left")
    for column in ("KL float", "KL 8-bit", "KL llama.cpp", "float to llama.cpp", "8-bit to llama.cpp"):
        table.add_column(column, justify="right")
    for p in rows:
        gaps = f"{p.simulated_to_runtime_kl:.2e}", f"{p.eight_bit_to_runtime_kl:.2e}"
        table.add_row(f"{p.simulated_kl:.5f}", f"{p.eight_bit_kl:.5f}", f"{p.figures.mean_kl.value:.5f}", *gaps)
    console.print(table)
    runtime = [p.figures.mean_kl.value for p in rows]
    for name, values in (("float", [p.simulated_kl for p in rows]), ("8-bit", [p.eight_bit_kl for p in rows])):
        console.print(f"rank correlation of {name} with llama.cpp: {spearmanr(values, runtime).statistic:.4f}")
    console.print(f"seconds an evaluation, 8-bit over float: {sum(seconds[1][1:]) / sum(seconds[0][1:]):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--parts", nargs="+", choices=(*VARIANTS, "activations"), default=(*VARIANTS, "activations"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--files", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160, highlight=False)
    if set(arguments.parts) & set(VARIANTS):
        measure_scaling(arguments, console)
    if "activations" in arguments.parts:
        measure_activations(arguments, console)


if __name__ == "__main__":
    main()
