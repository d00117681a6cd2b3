"""Held-out KL of the embedded model before and after healing, for uniform levels and a mixed genome.

    python -m benchmarks.healing [--config configs/stdlib-6m.yaml] [--genomes W2 W3 W4 mixed] [--set steps=96 ...]

Every ``--set`` gives settings of HealingSettings (evaluators.healing); several settings are measured one after another
on each genome. ``learning_rate`` is by default the pipeline's own rule. Text and bank are those of the configuration.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from bitgenome.config.run import load_config
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate
from bitgenome.run.healing import float_tensors
from bitgenome.run.prepare import evaluator_setup, record_inputs
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.evaluator import EvaluateGenomes, EvaluatorSetup
from evaluators.healing.blocks import HealBlock
from evaluators.healing.scales import multipliers
from evaluators.healing.tuner import HealingCheckpoint
from evaluators.healing.whole import Healed, MeasureHealing, WholeHealing
from evaluators.prepare.bank import Bank
from evaluators.settings import RATE_PER_ROOT_KL, HealingSettings
from search.allocation.seeds import pure_uniform
from search.budget import Budget
from search.types import Fidelity, Genome
from workers.cluster.open_pool import close_cluster, open_pool
from workers.cluster.settings import WorkerSettings
from workers.pool.base import Pool

MIXED = {"embed_tokens": "W6", "lm_head": "W6", "mlp": "W2", "self_attn": "W3"}  # an allocation as searches find them


def mixed(plan: Plan) -> Genome:
    """The level that MIXED gives each tensor by a part of its name."""
    levels = [next(level for part, level in MIXED.items() if part in gene.name) for gene in plan.space.genes]
    return tuple([f.level for f in g.formats].index(level) for g, level in zip(plan.space.genes, levels, strict=True))


def measure(plan: Plan, setup: EvaluatorSetup, genome: Genome, settings: HealingSettings, pool: Pool) -> list[Healed]:
    """Figures on validation and test text."""
    tokens = plan.config.text.tokens
    fidelities = (Fidelity("validation", tokens.validation), Fidelity("test", tokens.test))
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = HealingCheckpoint(Path(directory) / "checkpoint.safetensors", "benchmark")
        if settings.variant == "blockwise":
            parts = range(int(plan.folder.config["num_hidden_layers"]) + 1)
            names = float_tensors(plan)
            tasks = [HealBlock(setup, genome, names, settings, checkpoint, fidelities, part) for part in parts]
            *_, figures = (result for task in tasks for result in pool.map([task]))
            return [figures[fidelity.split] for fidelity in fidelities]
        values = {name: plan.folder.read(name).float() for name in float_tensors(plan)}
        if settings.scales:
            values |= multipliers(Bank(setup.bank), plan.space.formats_of(genome))
        shape = (tokens.calibration // plan.config.text.window, plan.config.text.window)
        training = WholeHealing(setup, genome, values, settings, shape, checkpoint)
        for _ in training.train(pool.map):
            pass
        saved = checkpoint.load()
        assert saved is not None
        tuned = {name: saved[0][name] for name in values}
    return list(pool.map([MeasureHealing(setup, genome, tuned, fidelity) for fidelity in fidelities]))


def change(healed: Healed) -> str:
    if healed.after is None:
        return "not finite"
    return f"{healed.before.kl:.5f} to {healed.after.kl:.5f} ({100 * (healed.after.kl / healed.before.kl - 1):+.1f} %)"


def parsed(text: str) -> dict[str, Any]:
    """Settings of one --set, such as "steps=60,variant=blockwise"."""
    return {key: yaml.safe_load(value) for key, _, value in (part.partition("=") for part in text.split(",") if part)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--genomes", nargs="+", default=["W2", "W3", "W4", "mixed"])
    parser.add_argument("--set", nargs="+", dest="settings", default=["", "variant=blockwise"])
    parser.add_argument("--workers", type=int, default=0, help="Ray workers; 0 is this process")
    args = parser.parse_args()
    plan = make_plan(load_config(args.config, [f"storage_path={args.storage}", "name=benchmark-healing"]))
    run, windows = RunDirectory.create(plan.config), read_windows(plan)
    workers = WorkerSettings(ray="local", count=args.workers) if args.workers else WorkerSettings(ray="off")
    console, table = Console(width=160), Table(title="KL before and after healing", title_justify="left")
    for column in ("genome", "settings", "learning rate", "validation", "test", "seconds"):
        table.add_column(column)
    with open_pool(workers) as pool:
        record_inputs(plan, windows, run)
        calibration, groups = calibrate(plan, windows, pool, lambda items, total, what: iter(items))
        bank = build_bank(plan, calibration, groups, pool, lambda items, total, what: iter(items))
        setup = evaluator_setup(plan, run, bank)
        levels = pure_uniform(plan.space, Budget(plan.space.file_bytes(plan.space.largest())))
        validation = Fidelity("validation", plan.config.text.tokens.validation)
        for name in args.genomes:
            genome = mixed(plan) if name == "mixed" else levels[name]
            ((plain,),) = pool.map([EvaluateGenomes(setup, (genome,), validation, name)])
            for text in args.settings:
                rate = {"learning_rate": RATE_PER_ROOT_KL * math.sqrt(plain.kl)}
                settings = HealingSettings(**(rate | parsed(text)))
                started = time.perf_counter()
                found = [change(healed) for healed in measure(plan, setup, genome, settings, pool)]
                seconds = f"{time.perf_counter() - started:.0f}"
                table.add_row(name, text or "default", f"{settings.learning_rate:.4f}", *found, seconds)
                console.print(name, text, f"{settings.learning_rate:.4f}", *found, seconds, soft_wrap=True)
    close_cluster()
    console.print(table)


if __name__ == "__main__":
    main()
