"""What bfloat16 and float16 cost and gain against float32: speed of the forward pass, and what they do to the KL.

    python -m benchmarks.compute_types [--config configs/stdlib-6m.yaml] [--storage runs] [--tokens 2048]
                                       [--genomes 20] [--parts speed bias] [--hidden 1024 1536 2048]

speed: tokens a second of random Llama blocks and of the configured model. bias: KL of genomes from 2 to 8 bits, and of
neighbours of one genome, by each computation (reference and candidate alike) against the same in float32. Floor: KL
from the full-precision model in float32 to the full-precision model in that computation, which should be 0. "products"
is what evaluation.compute does: hidden states, norms, embedding and head stay float32.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bitgenome.common.devices import best_device
from bitgenome.config.run import load_config
from bitgenome.plan.plan import make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate
from bitgenome.run.prepare import evaluator_setup, record_inputs
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from evaluators.engine.divergence import Reference
from evaluators.engine.evaluator import EvaluatorSetup
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.head import Head
from evaluators.prepare.bank import Bank
from quantizers.formats.table import QuantFormat
from search.types import Genome
from workers.pool.base import SerialPool

BLOCKS, WINDOW = 2, 512
CHANGED = 3  # genes in which neighbours differ


@dataclass(frozen=True)
class Computation:
    """``blocks`` is the type of weights and products; the others are those of what stands between and behind."""

    name: str
    blocks: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32  # of hidden states, norms and embedding
    head: torch.dtype = torch.float32  # of the final norm and of what the head multiplies, into float32 logits

    def place(self, model: BlockModel) -> None:
        """Give a loaded model these types."""
        model.model.to(self.residual)
        for block in range(len(model.blocks)):
            for _, linear in model.linears(block):
                linear.to(self.blocks)
        model.decoder.norm.to(self.head)

    def products(self, device: torch.device) -> AbstractContextManager[object]:
        if self.blocks == self.residual:
            return nullcontext()
        return torch.autocast(device.type, self.blocks, cache_enabled=False)

    @torch.inference_mode()
    def final(self, model: BlockModel, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), of a model placed so."""
        hidden = model.embed(ids)
        with self.products(model.device):
            for block in range(len(model.blocks)):
                hidden = model.run_block(block, hidden)
        normed: Tensor = model.decoder.norm(hidden.to(self.head))
        return normed


COMPUTATIONS = [
    Computation("float32"),
    Computation("bfloat16", torch.bfloat16, torch.bfloat16),
    Computation("bfloat16, head too", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    Computation("bfloat16 products", torch.bfloat16),
    Computation("float16", torch.float16, torch.float16),
    Computation("float16, head too", torch.float16, torch.float16, torch.float16),
    Computation("float16 products", torch.float16),
]


class Simulation:
    """Reference and candidates of one computation."""

    def __init__(self, setup: EvaluatorSetup, computation: Computation, ids: Tensor):
        self.setup, self.computation, self.ids = setup, computation, ids
        self.bank = Bank(setup.bank)
        self.hidden, self.head = self.outputs({})
        self.reference = Reference(self.hidden, self.head, ids)

    @torch.inference_mode()
    def outputs(self, formats: dict[str, QuantFormat]) -> tuple[Tensor, Head]:
        """Final hidden states (B, T, D) and head with these tensors quantized, float32 that the head's type holds."""
        model = BlockModel(ModelFolder(self.setup.model), best_device())
        model.load_all()
        for name, fmt in formats.items():
            parameter = model.weight(name)
            parameter.data = self.bank.weights(name, fmt, parameter.shape[1], model.device)
        head = model.head
        self.computation.place(model)
        rows = self.ids.split(max(1, 2048 // self.ids.shape[1]))
        hidden = torch.cat([self.computation.final(model, chunk) for chunk in rows])
        return hidden.float(), model.head_with(head.weight.to(self.computation.head).float())

    def kl(self, genome: Genome) -> float:
        return self.reference.compare(*self.outputs(self.setup.space.formats_of(genome))).kl


def prepared(arguments: argparse.Namespace) -> EvaluatorSetup:
    """Setup with a bank from little calibration text."""
    overrides = [f"storage_path={arguments.storage}", "name=compute-types", "text.tokens.calibration=16384"]
    plan = make_plan(load_config(arguments.config, overrides))
    run, pool = RunDirectory.create(plan.config), SerialPool()
    windows = read_windows(plan)
    record_inputs(plan, windows, run)
    calibration, groups = calibrate(plan, windows, pool, lambda items, *_: iter(items))
    return evaluator_setup(plan, run, build_bank(plan, calibration, groups, pool, lambda items, *_: iter(items)))


def spread(setup: EvaluatorSetup, count: int) -> list[Genome]:
    """Random genomes whose genes lie around levels from the coarsest to the finest, in turn."""
    rng, choices = random.Random(0), len(setup.space.genes[0].formats)
    bases = [i % (choices - 1) for i in range(count)]
    return [tuple(base + rng.randrange(2) for _ in setup.space.genes) for base in bases]


def neighbours(setup: EvaluatorSetup, count: int) -> list[Genome]:
    """A genome in the middle with CHANGED genes redrawn."""
    rng, choices = random.Random(1), len(setup.space.genes[0].formats)
    found = []
    for _ in range(count):
        child = [choices // 2] * len(setup.space.genes)
        for gene in rng.sample(range(len(child)), CHANGED):
            child[gene] = rng.randrange(choices)
        found.append(tuple(child))
    return found


def measure_bias(arguments: argparse.Namespace, console: Console) -> None:
    setup = prepared(arguments)
    ids = torch.from_numpy(TokenWindows.load(setup.windows).take("search", arguments.tokens))
    genomes, children = spread(setup, arguments.genomes), neighbours(setup, arguments.genomes)
    finest = (len(setup.space.genes[0].formats) - 1,) * len(setup.space.genes)
    table = Table(
        title=f"{arguments.genomes} genomes each, {ids.numel():,} tokens of search text", title_justify="left"
    )
    for column in ("", "floor", "finest genome", "mean bias", "max bias", "max relative", "rank", "rank of neighbours"):
        table.add_column(column, justify="right" if column else "left")
    exact: list[list[float]] = []
    for computation in COMPUTATIONS:
        simulation = Simulation(setup, computation, ids)
        kls = [[simulation.kl(genome) for genome in group] for group in (genomes, children, [finest])]
        exact = exact or kls
        if computation is COMPUTATIONS[0]:
            full = simulation.reference
        biases = [found - expected for found, expected in zip(kls[0], exact[0], strict=True)]
        table.add_row(
            computation.name,
            f"{full.compare(simulation.hidden, simulation.head).kl:.2e}",
            f"{kls[2][0]:.3e}",
            f"{sum(map(abs, biases)) / len(biases):.2e}",
            f"{max(map(abs, biases)):.2e}",
            f"{max(abs(b) / e for b, e in zip(biases, exact[0], strict=True)):.2%}",
            *(
                f"{spearmanr(found, expected).statistic:.4f}"
                for found, expected in zip(kls[:2], exact[:2], strict=True)
            ),
        )
    console.print(table)
    lines = (f"{min(group):.5f} to {max(group):.5f}" for group in exact[:2])
    console.print(f"KL in float32: genomes {next(lines)}, neighbours {next(lines)}")


def save_blocks(path: Path, hidden: int) -> Path:
    """Random Llama of BLOCKS blocks and a small vocabulary."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def seconds(models: Sequence[tuple[Computation, BlockModel]], ids: Tensor, repeats: int) -> list[float]:
    """Of one forward each, the best of turns, blocks and final norm."""
    best = [float("inf")] * len(models)
    for _ in range(repeats):
        for index, (computation, model) in enumerate(models):
            started = time.perf_counter()
            computation.final(model, ids)
            if model.device.type != "cpu":
                torch.accelerator.synchronize()
            best[index] = min(best[index], time.perf_counter() - started)
    return best


def measure_speed(arguments: argparse.Namespace, console: Console) -> None:
    """A line for each model, as it is measured."""
    computations = [c for c in COMPUTATIONS if c.head == torch.float32]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {f"{BLOCKS} blocks, hidden {h}": save_blocks(Path(scratch) / str(h), h) for h in arguments.hidden}
        folders[str(arguments.config)] = make_plan(load_config(arguments.config)).folder.path
        for label, folder in folders.items():
            models = [(c, BlockModel(ModelFolder(folder), best_device())) for c in computations]
            for computation, model in models:
                model.load_all()
                computation.place(model)
            ids = torch.randint(0, 1000, (2, WINDOW), generator=torch.Generator().manual_seed(0))
            taken = seconds(models, ids, arguments.repeats)
            figures = zip(computations, taken, strict=True)
            line = ", ".join(f"{c.name} {ids.numel() / s:,.0f} ({taken[0] / s:.2f})" for c, s in figures)
            console.print(f"{label}: tokens/s (over float32): {line}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/stdlib-6m.yaml"))
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--parts", nargs="+", choices=("speed", "bias"), default=("speed", "bias"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--genomes", type=int, default=20)
    parser.add_argument("--hidden", nargs="+", type=int, default=(1024, 1536, 2048))
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160, highlight=False)
    if "speed" in arguments.parts:
        measure_speed(arguments, console)
    if "bias" in arguments.parts:
        measure_bias(arguments, console)


if __name__ == "__main__":
    main()
