"""Genomes per second: the warm evaluator, which swaps changed tensors, against a plain load-and-forward per genome.

Both on one thread, the same genomes and text, alternating in one process.

    python -m benchmarks.evaluation [--config configs/stdlib-6m.yaml] [--genomes 6] [--tokens 2048]
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bitgenome.artefacts import prepare, read_windows
from bitgenome.config import load_config
from bitgenome.plan import make_plan
from bitgenome.run_directory import RunDirectory
from evaluators.bank import Bank
from evaluators.evaluator import EvaluatorSetup, GenomeEvaluator
from evaluators.simulated import genome_formats
from search.types import Fidelity, Genome
from workers.pool import SerialPool


@torch.inference_mode()
def plain_evaluation(setup: EvaluatorSetup, genome: Genome, ids: torch.Tensor) -> float:
    """KL by loading both models, decoding every tensor, two whole forwards and textbook log-softmax."""
    full = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
    bank = Bank(setup.bank)
    for name, fmt in genome_formats(setup.space, genome).items():
        parameter = quantized.get_parameter(name)
        parameter.data = bank.weights(name, fmt, parameter.shape[1], torch.device("cpu"))
    p, q = (model(ids).logits.log_softmax(-1) for model in (full, quantized))
    return float((p.exp() * (p - q)).sum(-1).mean())


def offspring(genome: Genome, setup: EvaluatorSetup, rng: random.Random, changed: int) -> Genome:
    """``genome`` with ``changed`` random genes redrawn."""
    child = list(genome)
    for gene in rng.sample(range(len(child)), changed):
        child[gene] = rng.randrange(len(setup.space.genes[gene].formats))
    return tuple(child)


def seconds(work: "object", *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--genomes", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    plan = make_plan(load_config(args.config))
    run = RunDirectory.create(plan.config)
    setup = prepare(plan, read_windows(plan), run, SerialPool(), lambda items, total, what: iter(items)).setup
    torch.set_num_threads(1)
    fidelity, rng = Fidelity("search", args.tokens), random.Random(0)
    evaluator = GenomeEvaluator(setup)
    parent = tuple(rng.randrange(len(gene.formats)) for gene in setup.space.genes)
    evaluator.evaluate(parent, fidelity)
    warm, plain = [], []
    for _ in range(args.genomes):
        child = offspring(parent, setup, rng, 3)
        warm.append(seconds(evaluator.evaluate, child, fidelity))
        plain.append(seconds(plain_evaluation, setup, child, evaluator.ids(fidelity)))
    table = Table(
        title=f"{args.genomes} genomes, 3 changed genes, {args.tokens} tokens, 1 thread", title_justify="left"
    )
    for column in ("", "s a genome (median)", "genomes/s", "tokens/s"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in (("warm evaluator", warm), ("plain load-and-forward", plain)):
        median = statistics.median(times)
        table.add_row(name, f"{median:.3f}", f"{1 / median:.2f}", f"{args.tokens / median:.0f}")
    console = Console()
    console.print(table)
    ratio = statistics.median(p / w for p, w in zip(plain, warm, strict=True))
    console.print(f"ratio of plain to warm, median of pairs: {ratio:.2f}")


if __name__ == "__main__":
    main()
