"""Says how long each stage of a run will take: its work in positions, weights and columns, times measured rates.

What none of the rates covers (a cluster's start, files of a few megabytes) has constants with their measurement.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from bitgenome.common.cpus import usable_cpus
from bitgenome.plan.memory import GENES_TOGETHER, MOST_TOGETHER, REFERENCES, healing_variant
from bitgenome.plan.objective import factored_tensors, rounds_by_loss, tensors_by_rows
from bitgenome.plan.plan import Plan
from bitgenome.plan.text import written_counts
from evaluators.gradient.output_factors import FACTOR_TOKENS
from evaluators.healing.tuner import MICRO_TOKENS
from evaluators.model.outline import text_config
from evaluators.model.sizes import ModelShape, block_of
from evaluators.prepare.memory import input_groups as groups_of
from evaluators.prepare.writing import BATCH, batches
from evaluators.probes.rates import Rates, Rounding
from exporters.runtime.nearest import SECONDS_A_WEIGHT, mix_wanted
from quantizers.rounding.row_order import ROW_STEPS
from quantizers.statistics.row_groups import number_of_groups, row_entries

CLUSTER_SECONDS = 6.0  # for a local cluster and its first worker to be there (2 cores; 4 to 12 measured)
RUNTIME_SECONDS = 4.0  # for llama.cpp to load a file and generate its first tokens
STEP_SECONDS = 0.01  # of transformers' generation beside the model, for each token of a batch
STREAM_BYTES = 1e9  # a second, from a disk or the page cache
SHARED = 0.6  # of the blocks of a generation's genomes run; the rest is shared with neighbours (benchmarks/README.md)
SCALES = 1.6  # times a step of healing where block scales are tuned, which takes the gradients of weights (2 cores)
BRANCH = 0.5  # of the blocks run for a sensitivity: those behind its gene


@dataclass(frozen=True)
class Group:
    """Stands for the tensors that read one input: one Hessian, one factor."""

    rounding: Rounding
    weights: int
    block: bool  # in a decoder block; else embedding or head
    parts: int = 1  # groups of rows with a Hessian and a factor of their own

    @property
    def columns(self) -> int:
        """Columns of the input."""
        return self.rounding.columns


def input_groups(plan: Plan) -> list[Group]:
    """Return the input groups of the tensors that are quantized."""
    shape = ModelShape.of(plan.folder)
    formats = {name: gene.formats for gene in plan.space.genes for name in gene.tensors}
    by_loss = rounds_by_loss(plan)
    both, by_rows = (set(names(plan)) if by_loss else set() for names in (factored_tensors, tensors_by_rows))
    found = []
    for names in groups_of(shape):
        if members := [name for name in names if name in formats]:
            first = members[0]
            choices = tuple(fmt.name for fmt in formats[first])
            kind = Rounding(shape.tensors[first][-1], choices, plan.sparsity.get(first), first in both)
            parts = number_of_groups(*shape.tensors[first]) if first in by_rows else 1
            found.append(Group(kind, sum(map(shape.weights, members)), block_of(first) is not None, parts))
    return found


def roundings(plan: Plan) -> tuple[Rounding, ...]:
    """Return the kinds of rounding in the bank of ``plan``, which its rates must hold."""
    return tuple(dict.fromkeys(group.rounding for group in input_groups(plan)))


@dataclass(frozen=True)
class Work:
    """Turns the work of stages into seconds on ``workers`` workers with the same rates."""

    plan: Plan
    rates: Rates
    workers: int
    resident: bool  # every tensor stays decoded in every format; else tensors are decoded anew for every sweep

    @cached_property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return int(text_config(self.plan.folder.path).num_hidden_layers)

    @property
    def decoding(self) -> float:
        """Seconds of decoding every tensor at every level once."""
        levels = sum(len(gene.formats) * gene.weights for gene in self.plan.space.genes)
        return levels * self.rates.decode

    def passes(self, genomes: float, tokens: int, *, share: float = 1.0, exact: bool = False) -> float:
        """Return the seconds in which one worker compares genomes with the reference on ``tokens`` tokens of text each.

        ``share`` of each genome's blocks run; ``exact``: in float32.
        """
        block = self.rates.block_float32 if exact else self.rates.block
        return genomes * tokens * (share * self.layers * block + self.rates.head)

    def sweeps(self, genomes: int, tokens: int, together: int, *, share: float = 1.0, exact: bool = False) -> float:
        """Return the seconds in which all workers evaluate ``genomes`` genomes in tasks of up to ``together``."""
        tasks = max(1, ceil(genomes / together))
        busy = min(self.workers, max(1, genomes))
        decoding = self.decoding * (min(tasks, busy) if self.resident else tasks)
        references = busy * self.passes(1, tokens, exact=exact)
        return (self.passes(genomes, tokens, share=share, exact=exact) + references + decoding) / busy

    def text(self) -> float:
        """Return the seconds in which the model writes its text: whole batches of windows, a share for each worker."""
        text = self.plan.config.text
        count = len(batches(sum(written_counts(text).values())))
        a_step = BATCH * (self.layers * self.rates.written + self.rates.head)
        return ceil(count / self.workers) * text.window * (a_step + STEP_SECONDS)

    def calibration(self) -> float:
        """Return the seconds of the Hessians, a single task on all cores."""
        tokens = self.plan.config.text.tokens.calibration
        groups = input_groups(self.plan)
        hessians = sum(self.rates.hessian[str(group.columns)] for group in groups if group.block)
        factors = self.output_factors() if rounds_by_loss(self.plan) else 0.0
        return tokens * (self.layers * self.rates.block_calibration + hessians) + factors

    def output_factors(self) -> float:
        """Return the seconds of the output factors: a pass forward and one with gradients, and a product each."""
        tokens = min(FACTOR_TOKENS, self.plan.config.text.tokens.calibration)
        shape, rates = ModelShape.of(self.plan.folder), self.rates
        products = sum(2 * shape.tensors[name][0] ** 2 for name in factored_tensors(self.plan))
        products += sum(2 * row_entries(*shape.tensors[name]) for name in tensors_by_rows(self.plan))
        a_token = self.layers * (rates.block_calibration + rates.block_gradient) + 2 * rates.head + rates.head_gradient
        return tokens * (a_token + products / rates.host_flops)

    def bank(self) -> float:
        """Return the seconds of rounding every tensor to every level; input groups are the tasks."""
        times = [self.group_seconds(group) for group in input_groups(self.plan)]
        return max(sum(times) / self.workers, *times)

    def group_seconds(self, group: Group) -> float:
        """Return the seconds of rounding the tensors of one input group."""
        rate = self.rates.rounding[group.rounding.key]
        steps = ROW_STEPS if group.rounding.two_sided else 1
        batches = group.parts * ceil(group.weights / group.columns / steps / group.parts / rate.rows)
        rounding = batches * group.columns * rate.column + group.weights * rate.weight
        return rounding + group.parts * self.rates.factor * group.columns**3

    def sensitivity(self) -> float:
        """Return the seconds of the configured measure."""
        plan, tokens = self.plan, self.plan.config.text.tokens.sensitivity
        levels = plan.sensitivity_evaluations
        if plan.config.sensitivity.measure == "gradient":
            # two passes forward, one backward, and at every tensor a product for each of its levels
            products = self.layers * self.rates.block_float32 * levels / len(plan.space.genes)
            a_token = self.layers * (self.rates.block_float32 + self.rates.block_gradient) + products
            return tokens * (a_token + self.rates.head + self.rates.head_gradient) + self.decoding
        return self.sweeps(levels, tokens, GENES_TOGETHER * levels // len(plan.space.genes), share=BRANCH)

    def search(self) -> float:
        """Return the seconds of all generations."""
        together = min(MOST_TOGETHER, max(1, ceil(self.plan.config.search.population / self.workers)))
        return sum(
            self.sweeps(genomes, tokens, together, share=SHARED) for tokens, genomes in self.plan.search_rungs if tokens
        )

    def validation(self) -> float:
        """Return the seconds of the finalists on validation text."""
        genomes = self.plan.config.search.validation_candidates + REFERENCES
        return self.sweeps(genomes, self.plan.config.text.tokens.validation, MOST_TOGETHER)

    def healing(self) -> float:
        """Return the seconds of tuning and of measuring what it did."""
        config, text = self.plan.config.healing, self.plan.config.text
        if config.enabled == "off":
            return 0.0
        rates, batch = self.rates, config.batch_windows(text.window) * text.window
        trained = config.steps * batch
        measured = 3 * (text.tokens.validation + text.tokens.search)
        forward = self.layers * rates.block_float32
        read = min(trained, text.tokens.calibration)
        steps = trained * (self.layers * rates.block_gradient + rates.head_gradient) * (SCALES if config.scales else 1)
        if healing_variant(self.plan) == "full":
            busy = min(self.workers, max(1, batch // MICRO_TOKENS))
            return (steps + read * forward) / busy + measured * (forward + rates.head) / min(self.workers, 2)
        return steps + 3 * (read + measured / 3) * forward + measured * rates.head

    def test(self) -> float:
        """Return the seconds of the closing table's genomes on test text, in float32."""
        return self.sweeps(REFERENCES, self.plan.config.text.tokens.test, MOST_TOGETHER, exact=True)

    def proof(self) -> float:
        """Return the seconds of simulating the file and of running it in llama.cpp, on the host."""
        tokens = self.plan.config.text.tokens.test
        passes = 3 if self.plan.config.evaluation.activations == "q8" else 2
        runtime = 2 * self.plan.space.weights * tokens / self.rates.host_flops
        compared = 3 * tokens * self.rates.head
        mix = 0.0
        if mix_wanted(self.plan.config.llamacpp_mix, self.plan.space.weights):  # llama.cpp's own file of that size
            quantized = SECONDS_A_WEIGHT * self.plan.space.weights / usable_cpus()
            mix = quantized + runtime + tokens * self.rates.head + RUNTIME_SECONDS / 2
        return self.passes(passes, tokens, exact=True) + compared + runtime + RUNTIME_SECONDS + mix

    def export(self) -> float:
        """Return the seconds of writing the file and reading it back, and of writing it in shards from it."""
        passes = 2 if self.plan.config.export.split_max_size is None else 4
        return passes * self.plan.budget.file_bytes / STREAM_BYTES

    def stages(self) -> Iterator[tuple[str, float]]:
        """Yield the stages of a run in order, named as in run.json, with their seconds."""
        yield "workers", 0.0 if self.plan.config.workers.ray == "off" else CLUSTER_SECONDS
        if written_counts(self.plan.config.text):
            yield "text", self.text()
        yield "calibration", self.calibration()
        yield "bank", self.bank()
        yield "sensitivity", self.sensitivity()
        yield "search", self.search()
        yield "validation", self.validation()
        yield "healing", self.healing()
        yield "test", self.test()
        yield "export", self.export()
        yield "proof", self.proof()
