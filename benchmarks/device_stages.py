"""The stages of a run as the workers' own pool tasks, for benchmarks of a device: subjects, and what to run on each.

A subject is a model folder with token windows. Tasks run in this process, on the device that bitgenome picks.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from bitgenome.common.devices import best_device
from bitgenome.common.errors import UserError
from bitgenome.plan.template import multiplied
from evaluators.data.stdlib import SPLITS, load_held_out, read_modules
from evaluators.data.windows import TokenWindows
from evaluators.engine.divergence import Reference
from evaluators.engine.evaluator import EvaluateGenomes, EvaluatorSetup, GenomeEvaluator, MeasureSensitivity, warm
from evaluators.engine.memory import Load
from evaluators.gradient.output_factors import FACTOR_TOKENS, MeasureOutputs
from evaluators.gradient.sensitivity import gradient_losses, gradient_tasks
from evaluators.healing.blocks import HealBlock
from evaluators.healing.scales import multipliers
from evaluators.healing.tuner import HealingCheckpoint
from evaluators.healing.whole import WholeHealing
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import final_hidden
from evaluators.prepare.bank import Bank, BuildBankGroup, group_tensors, tensor_file
from evaluators.prepare.calibration import Calibrate
from evaluators.prepare.input_group import group_file
from evaluators.prepare.output_factor import factor_file
from evaluators.prepare.row_hessians import ROLES, sums_name
from evaluators.settings import Compute, HealingSettings
from quantizers.settings import CompensationSettings
from search.fitness import FitnessSettings
from search.types import Fidelity, Genome, SearchSpace

EMBEDDED = Path(__file__).parents[1] / "models" / "stdlib-6m"
MIB = 1 << 20
LLAMA_8B = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv": 8}
TINY = {"hidden": 256, "ffn": 256, "heads": 4, "kv": 2, "vocabulary": 512}
LITTLE_WORK = {"window": 128, "tokens": 512, "genomes": 3, "steps": 1}
DEFAULTS = CompensationSettings()
Figures = dict[str, Any]


@dataclass
class Subject:
    """A model with text, levels and work sizes; ``groups`` are filled by calibration."""

    name: str
    model: Path
    folder: Path  # of everything that is made
    levels: tuple[str, ...]
    codebooks: tuple[str, ...]  # levels of the bank of codebook types, of one input group
    window: int = 512
    tokens: int = 8192  # calibration takes twice as many
    genomes: int = 16
    steps: int = 4  # of healing
    groups: list[str] = field(default_factory=list)
    state: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.windows = self.folder / "windows.safetensors"
        model = ModelFolder(self.model)
        self.shapes = {name: model.shapes[name] for name in sorted(multiplied(model))}
        self.floats = tuple(name for name, shape in model.shapes.items() if len(shape) == 1)
        self.layers = int(model.config["num_hidden_layers"])
        self.space = SearchSpace.per_tensor(self.shapes, self.levels, 0)
        if not self.windows.is_file():
            self.windows.write_bytes(TokenWindows(self._text(model), "").to_bytes())

    def _text(self, model: ModelFolder) -> dict[str, np.ndarray]:
        """Windows of held-out library modules; random tokens for a model without a tokenizer."""
        rows = dict.fromkeys(SPLITS, self.tokens // self.window)
        rows["calibration"] *= 2
        if not (self.model / "tokenizer.json").is_file():
            draw = np.random.default_rng(0)
            return {s: draw.integers(0, model.config["vocab_size"], (n, self.window)) for s, n in rows.items()}
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        found = {}
        for split, modules in load_held_out(EMBEDDED / "splits.json").items():
            ids = [i for text in read_modules(modules).values() for i in tokenizer.encode(text).ids]
            wanted = rows[split] * self.window
            ids = (ids * (1 + wanted // len(ids)))[:wanted]
            found[split] = np.array(ids, dtype=np.int64).reshape(-1, self.window)
        return found

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration"

    @property
    def bank(self) -> Path:
        return self.folder / "bank"

    @property
    def weights(self) -> int:
        return sum(map(prod, self.shapes.values()))

    def setup(self, compute: str = "float32", memory: int | None = None) -> EvaluatorSetup:
        load = Load(self.genomes, self.tokens, 0)
        key = f"{self.name} {compute} {memory}"
        return EvaluatorSetup(
            self.model, self.bank, self.windows, self.space, FitnessSettings(), key,
            memory=memory, load=load, compute=compute,
        )  # fmt: skip

    def genome(self, seed: int) -> Genome:
        draw = random.Random(seed)
        return tuple(draw.randrange(len(gene.formats)) for gene in self.space.genes)

    def run(self, tasks: Sequence[Any]) -> Iterator[Any]:
        for task in tasks:
            yield task.run(self.state)


def block_model(path: Path, *, hidden: int, ffn: int, heads: int, kv: int, vocabulary: int = 4096) -> Path:
    """One random decoder block, bfloat16, with a small tied embedding; no tokenizer."""
    if not (path / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1,
            num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def calibrate(subject: Subject) -> Figures:
    subject.calibration.mkdir(exist_ok=True)
    subject.groups = Calibrate(subject.model, subject.windows, subject.calibration).run({})
    return {"work": 2 * subject.tokens, "unit": "tokens"}


def bank_tasks(
    subject: Subject, directory: Path, levels: Sequence[str], settings: CompensationSettings = DEFAULTS
) -> list[BuildBankGroup]:
    """One task for each input group, the smallest first, so that a stage that is cut short has some."""
    directory.mkdir(exist_ok=True)
    names = {}
    for gene in SearchSpace.per_tensor(subject.shapes, levels, 0).genes:
        names[gene.name] = tuple(fmt.name for fmt in gene.formats)
    tasks = []
    for group in subject.groups:
        file = group_file(subject.calibration, group)
        work = sum(prod(subject.shapes[tensor]) for tensor in group_tensors(file))
        tasks.append(BuildBankGroup(subject.model, file, directory, names, settings, work=work))
    return sorted(tasks, key=lambda task: task.work)


def build_bank(subject: Subject, note: Callable[[Figures], None]) -> Figures:
    return build_groups(bank_tasks(subject, subject.bank, subject.levels), len(subject.levels), note)


def build_groups(tasks: Sequence[BuildBankGroup], levels: int, note: Callable[[Figures], None]) -> Figures:
    """Run ``tasks``; after each the seconds by group are noted, so that a stage that is cut short has some."""
    done = 0.0
    groups: dict[str, float] = {}
    for task in tasks:
        started = time.perf_counter()
        task.run({})
        done += task.work
        groups[task.label] = time.perf_counter() - started
        note({"work": done * levels, "unit": "weights x levels", "groups": groups})
    return {}


def fill_bank(subject: Subject) -> Figures:
    """Round what a bank that was cut short lacks, without compensation, so that later stages can run."""
    plain = CompensationSettings(compensation=False)
    missing = [t for t in bank_tasks(subject, subject.bank, subject.levels, plain) if not whole(subject, t)]
    for task in missing:
        task.run({})
    return {"work": sum(task.work for task in missing), "unit": "weights"}


def whole(subject: Subject, task: BuildBankGroup) -> bool:
    """Whether the bank holds the tensors of the task's group."""
    return all(tensor_file(subject.bank, tensor).is_file() for tensor in group_tensors(task.group))


def codebook_task(subject: Subject) -> BuildBankGroup:
    """Of the smallest group inside a block: attention's output, or queries, keys and values."""
    inside = [t for t in bank_tasks(subject, subject.folder / "codebooks", subject.codebooks) if ".layers." in t.label]
    return inside[0]


def build_codebooks(subject: Subject) -> Figures:
    task = codebook_task(subject)
    task.run({})
    return {"work": task.work * len(subject.codebooks), "unit": "weights x levels"}


def measure_outputs(subject: Subject) -> Figures:
    """Measure what the loss says of all tensors."""
    outputs = subject.folder / "outputs"
    outputs.mkdir(exist_ok=True)
    found = MeasureOutputs(subject.model, subject.windows, outputs, frozenset(subject.shapes)).run({})
    return {"work": min(FACTOR_TOKENS, 2 * subject.tokens), "unit": "tokens", "factors": len(found)}


def two_sided_tasks(subject: Subject, levels: Sequence[str] = ()) -> list[BuildBankGroup]:
    """Tasks that round by the loss: the groups inside blocks on both sides, head and embedding by their rows."""
    tasks = []
    for task in bank_tasks(subject, subject.folder / "two-sided", levels or subject.levels):
        names, outputs = group_tensors(task.group), subject.folder / "outputs"
        files = [factor_file(outputs, name) for name in names]
        sums = [factor_file(outputs, sums_name(name, role)) for name in names for role in ROLES]
        there = [tuple(file for file in found if file.is_file()) for found in (files, sums)]
        tasks.append(replace(task, outputs=there[0], sums=there[1]))
    return tasks


def scalar_task(subject: Subject, levels: Sequence[str] = ()) -> BuildBankGroup:
    """The group of ``codebook_task`` in scalar formats, in a directory of its own."""
    group = codebook_task(subject).group
    found = bank_tasks(subject, subject.folder / "again", levels or subject.levels)
    return next(task for task in found if task.group == group)


def gradient(subject: Subject) -> Figures:
    shape = (subject.tokens // subject.window, subject.window)
    tasks = gradient_tasks(subject.setup(), Fidelity("search", subject.tokens), shape)
    losses = gradient_losses(list(subject.run(tasks)), shape)
    return {"work": subject.tokens, "unit": "tokens", "largest": float(max(map(np.max, losses)))}


def exact(subject: Subject, genes: int) -> Figures:
    chosen = np.linspace(0, len(subject.space.genes) - 1, min(genes, len(subject.space.genes))).round().astype(int)
    task = MeasureSensitivity(subject.setup("auto"), tuple(chosen.tolist()), Fidelity("search", 2048))
    (records,) = subject.run([task])
    return {"work": sum(map(len, records)), "unit": "genes x levels"}


def sweep_task(subject: Subject, compute: str = "auto", memory: int | None = None) -> EvaluateGenomes:
    genomes = tuple(subject.genome(seed) for seed in range(subject.genomes))
    return EvaluateGenomes(subject.setup(compute, memory), genomes, Fidelity("search", subject.tokens), "sweep")


def sweep(subject: Subject, compute: str = "auto", memory: int | None = None) -> Figures:
    """The second sweep of two: in the first, weights are decoded."""
    task = sweep_task(subject, compute, memory)
    list(subject.run([replace(task, fidelity=Fidelity("search", subject.window))]))
    found = subject.state[next(iter(subject.state))]
    (evaluations,) = subject.run([task])
    kls = [e.kl for e in evaluations]
    seconds = sum(e.seconds for e in evaluations)
    share = {"resident": found.memory.resident, "planned_mib": round(found.memory.peak / MIB)}
    work = len(kls) * subject.tokens
    return {"work": work, "unit": "tokens x genomes", "sweep_seconds": seconds, "kl": kls[:4], **share}


def least_memory(subject: Subject, compute: Compute = "auto") -> int:
    """The least memory that a worker accepts whose blocks multiply in ``compute``, within a mebibyte."""

    def accepted(limit: int) -> bool:
        try:
            GenomeEvaluator(subject.setup(compute, limit))
        except UserError:
            return False
        return True

    too_little, enough = 0, 16 * MIB
    while not accepted(enough):
        too_little, enough = enough, 2 * enough
    while enough - too_little > MIB:
        middle = (too_little + enough) // 2
        too_little, enough = (too_little, middle) if accepted(middle) else (middle, enough)
    return enough


def heal_whole(subject: Subject) -> Figures:
    checkpoint = HealingCheckpoint(subject.folder / "whole.safetensors", "bench")
    checkpoint.path.unlink(missing_ok=True)
    settings = HealingSettings(steps=subject.steps).with_rate_for(0.05)
    model = ModelFolder(subject.model)
    setup, genome = subject.setup(), subject.genome(0)
    values = {name: model.read(name).float() for name in subject.floats}
    values |= multipliers(Bank(setup.bank), setup.space.formats_of(genome))
    shape = (2 * subject.tokens // subject.window, subject.window)
    training = WholeHealing(setup, genome, values, settings, shape, checkpoint)
    for _ in training.train(subject.run):
        pass
    return {"work": subject.steps * settings.batch_tokens, "unit": "tokens"}


def heal_blocks(subject: Subject, parts: int) -> Figures:
    checkpoint = HealingCheckpoint(subject.folder / "blocks.safetensors", "bench")
    checkpoint.path.unlink(missing_ok=True)
    settings = HealingSettings(steps=subject.steps, variant="blockwise").with_rate_for(0.05)
    shared = (subject.setup(), subject.genome(0), subject.floats, settings, checkpoint, (Fidelity("test", 2048),))
    parts = min(parts, subject.layers + 1)
    figures = list(subject.run([HealBlock(*shared, part) for part in range(parts)]))[-1]
    kls = {split: [f.before.kl, f.after and f.after.kl] for split, f in figures.items()}
    return {"work": parts * subject.steps * settings.batch_tokens, "unit": "tokens x blocks", "kl": kls}


@torch.inference_mode()
def simulated_proof(subject: Subject) -> Figures:
    """The simulated half of the proof: every tensor decoded, both models whole, on test text."""
    model, bank = BlockModel(ModelFolder(subject.model), best_device()), Bank(subject.bank)
    model.load_all()
    ids = torch.from_numpy(TokenWindows.load(subject.windows).windows["test"])
    reference = Reference(final_hidden(model, ids), model.head_with(model.head.weight.clone()), ids)
    for name, fmt in subject.space.formats_of(subject.genome(0)).items():
        model.weight(name).data = bank.weights(name, fmt, subject.shapes[name][1], model.device)
    found = reference.compare(final_hidden(model, ids), model.head)
    return {"work": 2 * subject.tokens, "unit": "tokens", "kl": found.kl, "perplexity": found.perplexity}


def evaluated(subject: Subject, compute: str, genomes: int, split: str = "search") -> list[float]:
    """KL of the first genomes on 2,048 tokens of a split."""
    evaluator = warm(GenomeEvaluator, subject.setup(compute), subject.state)
    genes = [subject.genome(seed) for seed in range(genomes)]
    return [e.kl for e in evaluator.evaluate(genes, Fidelity(split, 2048))]
