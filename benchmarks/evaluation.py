"""Genomes per second: a generation in one sweep against each genome alone, warm and by a plain load-and-forward.

The same genomes, text and thread in one process. Those measured alone are a sample of each generation, spread over it
and measured between sweeps, because a plain evaluation of 128 genomes takes minutes. Cases: children of four elites
with one to three changed genes, children by crossover of two elites, and the exact table of sensitivities.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation [--tokens 2048] [--sample 4] [--generations 8 32 128]
    python -m benchmarks.evaluation --exponents
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.prepare import prepare
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.evaluator import EvaluatorSetup, GenomeEvaluator
from evaluators.engine.sweep import Candidate
from evaluators.prepare.bank import Bank
from search.types import Fidelity, Genome, SearchSpace
from workers.pool.base import SerialPool

ELITES = 4


class PlainEvaluation:
    """KL by loading the model, decoding every tensor, a whole forward and textbook log-softmax.

    The full-precision model's log-probabilities are made once, and not counted.
    """

    def __init__(self, setup: EvaluatorSetup, ids: torch.Tensor):
        self.setup = setup
        self.ids = ids
        self.bank = Bank(setup.bank)
        self.log_p = self.log_probs({})

    @torch.inference_mode()
    def log_probs(self, candidate: Candidate) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(self.setup.model, dtype=torch.float32, trust_remote_code=False)
        for name, fmt in candidate.items():
            parameter = model.get_parameter(name)
            parameter.data = self.bank.weights(name, fmt, parameter.shape[1], torch.device("cpu"))
        return model(self.ids).logits.log_softmax(-1)

    def __call__(self, candidate: Candidate) -> float:
        log_q = self.log_probs(candidate)
        return float((self.log_p.exp() * (self.log_p - log_q)).sum(-1).mean())


def elites_of(space: SearchSpace, rng: random.Random) -> list[Genome]:
    """Genomes three genes away from one another's parent, as a converged search holds them."""
    parent = tuple(rng.randrange(len(gene.formats)) for gene in space.genes)
    return [parent, *(changed(parent, space, rng, 3) for _ in range(ELITES - 1))]


def changed(genome: Genome, space: SearchSpace, rng: random.Random, genes: int) -> Genome:
    """``genome`` with ``genes`` random genes at another choice."""
    child = list(genome)
    for gene in rng.sample([g for g, found in enumerate(space.genes) if len(found.formats) > 1], genes):
        child[gene] = rng.choice([c for c in range(len(space.genes[gene].formats)) if c != child[gene]])
    return tuple(child)


def mutated(elites: Sequence[Genome], space: SearchSpace, rng: random.Random) -> Genome:
    return changed(rng.choice(elites), space, rng, rng.randint(1, 3))


def crossed(elites: Sequence[Genome], space: SearchSpace, rng: random.Random) -> Genome:
    """Uniform crossover of two elites, then one changed gene."""
    pairs = zip(*rng.sample(list(elites), 2), strict=True)
    return changed(tuple(rng.choice(pair) for pair in pairs), space, rng, 1)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Comparison:
    """One evaluator and one plain evaluation on the same text; each case is a row of the table."""

    def __init__(self, setup: EvaluatorSetup, tokens: int, sample: int):
        self.setup, self.sample = setup, sample
        self.fidelity = Fidelity("search", tokens)
        self.evaluator = GenomeEvaluator(setup)
        self.plain = PlainEvaluation(setup, self.evaluator.ids(self.fidelity))
        self.table = Table(title=f"{tokens:,} tokens, {torch.get_num_threads()} thread(s)", title_justify="left")
        for column in ("", "sweep genomes/s", "tokens/s", "alone", "plain", "sweep/alone", "sweep/plain"):
            self.table.add_column(column, justify="right" if column else "left")

    def add(self, name: str, candidates: Sequence[Candidate], keep: Sequence[Candidate]) -> None:
        """``keep`` are elites of an earlier generation, whose prefixes the evaluator remembers from it."""
        self.evaluator.sweep.cache.clear()
        if keep != [{}]:
            self.evaluator.divergences(keep, self.fidelity, keep)
        picked = [candidates[i] for i in np.linspace(0, len(candidates) - 1, self.sample).round().astype(int)]
        alone, plain = [], []
        fresh = GenomeEvaluator(self.setup)  # remembers no prefixes, and holds the full-precision outputs
        fresh.divergences(picked[:1], self.fidelity)
        for candidate in picked[: self.sample // 2]:
            alone.append(seconds(lambda c=candidate: fresh.divergences([c], self.fidelity)))
            plain.append(seconds(lambda c=candidate: self.plain(c)))
        swept = seconds(lambda: self.evaluator.divergences(candidates, self.fidelity, keep)) / len(candidates)
        for candidate in picked[self.sample // 2 :]:
            alone.append(seconds(lambda c=candidate: fresh.divergences([c], self.fidelity)))
            plain.append(seconds(lambda c=candidate: self.plain(c)))
        rates = [1 / swept, 1 / statistics.median(alone), 1 / statistics.median(plain)]
        self.table.add_row(
            name, f"{rates[0]:.2f}", f"{rates[0] * self.fidelity.tokens:,.0f}", f"{rates[1]:.2f}", f"{rates[2]:.2f}",
            f"{rates[0] / rates[1]:.2f}", f"{rates[0] / rates[2]:.2f}",
        )  # fmt: skip


def compare(setup: EvaluatorSetup, arguments: argparse.Namespace, console: Console) -> None:
    space, rng = setup.space, random.Random(0)
    comparison = Comparison(setup, arguments.tokens, arguments.sample)
    elites = elites_of(space, rng)
    kept = [space.formats_of(genome) for genome in elites]
    for breed, name in ((mutated, "1 to 3 changed genes"), (crossed, "crossover")):
        for size in arguments.generations:
            children = sorted({breed(elites, space, rng) for _ in range(size)})
            comparison.add(f"{len(children)} by {name}", [space.formats_of(child) for child in children], kept)
    single = [dict.fromkeys(gene.tensors, fmt) for gene in space.genes for fmt in gene.formats]
    comparison.add(f"sensitivities, {len(single)}", single, [{}])
    console.print(comparison.table)


def exponents(setup: EvaluatorSetup, console: Console) -> None:
    """Slope of log seconds over log tokens, and over log genomes of a generation of offspring."""
    space, rng = setup.space, random.Random(0)
    elites = elites_of(space, rng)
    children = [space.formats_of(g) for g in sorted({mutated(elites, space, rng) for _ in range(64)})]
    evaluator = GenomeEvaluator(setup)

    def slope(name: str, cases: Sequence[tuple[int, int, int]]) -> None:
        sizes, taken = [], []
        for size, genomes, tokens in cases:
            fidelity = Fidelity("search", tokens)
            evaluator.divergences(children[:1], fidelity)
            evaluator.sweep.cache.clear()
            part = [children[i] for i in np.linspace(0, len(children) - 1, genomes).round().astype(int)]
            sizes.append(size)
            taken.append(min(seconds(lambda p=part, f=fidelity: evaluator.divergences(p, f)) for _ in range(2)))
        fitted = float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])
        listed = ", ".join(f"{size}: {time_:.2f} s" for size, time_ in zip(sizes, taken, strict=True))
        console.print(f"{name}: exponent {fitted:.2f} ({listed})")

    slope("tokens", [(tokens, 8, tokens) for tokens in (512, 1024, 2048, 4096)])
    slope("genomes", [(genomes, genomes, 1024) for genomes in (4, 8, 16, 32, 64)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sample", type=int, default=4)
    parser.add_argument("--generations", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--exponents", action="store_true")
    arguments = parser.parse_args()
    overrides = [f"storage_path={arguments.storage}", "text.tokens.search=8192"]
    plan = make_plan(load_config(arguments.config, overrides))
    run = RunDirectory.create(plan.config)
    setup = prepare(plan, read_windows(plan), run, SerialPool(), lambda items, total, what: iter(items)).setup
    torch.set_num_threads(1)
    console = Console(width=120)
    if arguments.exponents:
        exponents(setup, console)
    else:
        compare(setup, arguments, console)


if __name__ == "__main__":
    main()
