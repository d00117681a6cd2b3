"""Prints the plan of a run: its tensors by kind, sizes, budget, and what each stage will take."""

from collections import Counter, defaultdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bitgenome.cli.tables import megabytes
from bitgenome.cli.terminal import say
from bitgenome.plan.forecast import StageForecast, duration, too_large
from bitgenome.plan.memory import memory_line
from bitgenome.plan.objective import objective_line
from bitgenome.plan.plan import Plan
from evaluators.model.sizes import StageMemory
from evaluators.probes.rates import Rates
from search.gene_groups import kind_labels
from search.types import Gene


def show_plan(
    plan: Plan, rates: Rates, stages: list[StageForecast], workers: int, tensors: bool, console: Console
) -> None:
    """Show kinds of tensors (``tensors``: each), sizes, budget, evaluations and the forecast of every stage."""
    space, config = plan.space, plan.config
    console.print(f"{config.name}: {config.model}", soft_wrap=True)
    console.print(genes_table(plan) if tensors else kinds_table(plan))
    bounds = [space.file_bytes(genome) for genome in (space.smallest(), space.largest())]
    say(
        console,
        f"{len(space.genes)} genes, {space.weights:,} weights; files from {bounds[0]:,} to {bounds[1]:,} bytes, "
        f"{space.fixed_bytes:,} of them fixed",
    )
    if plan.folder.parts:
        size = megabytes(plan.folder.weights_bytes, 0)
        say(console, f"the run opens {plan.folder.parts[0]} as a folder of {size}, below {config.storage_path}/shared")
    if plan.folder.full_precision:
        say(console, f"full precision here is {plan.folder.full_precision}")
    budget = plan.budget.file_bytes
    say(console, f"budget {budget:,} bytes = {8 * budget / space.weights:.4f} bits per weight")
    say(console, objective_line(plan))
    if plan.sparsity:
        counts = Counter(map(str, plan.sparsity.values()))
        say(console, "pruned: " + ", ".join(f"{sparsity} of {count} tensors" for sparsity, count in counts.items()))
    say(
        console,
        f"{plan.sensitivity_evaluations} sensitivities ({config.sensitivity.measure}) of "
        f"{config.text.tokens.sensitivity:,} tokens, {searched(plan.search_rungs)} ({config.search.strategy})",
    )
    say(console, memory_line(plan))
    console.print(stages_table(rates, stages, workers))
    if found := too_large(plan, stages):
        say(console, f"more memory than there is: {', '.join(found)}", style="bold red")
    say(
        console,
        "times are from short probes of the kernels on this machine, beside whatever else runs on it; memory is a "
        "process's peak, beside what its libraries take",
    )


def genes_table(plan: Plan) -> Table:
    """Return a table of all genes."""
    table = lean_table("gene", "shape", "smallest", "MB", "largest", "MB")
    for gene in plan.space.genes:
        shapes = " ".join("x".join(map(str, shape)) for shape in gene.shapes)
        table.add_row(gene.name.removesuffix(".weight"), shapes, *ends(gene, 1))
    return table


def kinds_table(plan: Plan) -> Table:
    """Return a table of the kinds of genes, such as all self_attn.q_proj of one shape."""
    table = lean_table("kind", "genes", "shape", "levels", "smallest", "MB", "largest", "MB")
    kinds: dict[tuple[str, object], list[Gene]] = defaultdict(list)
    labels = kind_labels(plan.space)
    for gene in plan.space.genes:
        shapes = tuple(dict.fromkeys(gene.shapes))
        kinds[labels.get(gene.tensors[0], gene.name), shapes].append(gene)
    for (kind, _), genes in kinds.items():
        first = genes[0]
        shape = " ".join("x".join(map(str, shape)) for shape in dict.fromkeys(first.shapes))
        name = kind.removesuffix(".weight")
        table.add_row(name, str(len(genes)), shape, str(len(first.formats)), *ends(first, len(genes)))
    return table


def lean_table(*columns: str) -> Table:
    """Return a table that names tensors in full in 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    return table


def ends(gene: Gene, count: int) -> list[str]:
    """Return the smallest and the largest format of ``gene``, each with the size of ``count`` such genes in MB."""
    cells = ((gene.formats[c].name, f"{count * gene.size_bytes(c) / 1e6:,.3f}") for c in (0, len(gene.formats) - 1))
    return [cell for pair in cells for cell in pair]


def stages_table(rates: Rates, stages: list[StageForecast], workers: int) -> Table:
    """Return a table of what every stage takes."""
    title = f"On {workers} workers like this machine ({rates.device}, {rates.threads} threads each)"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "time", "host memory", "device memory", "stays on disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in stages:
        memory = stage.memory or StageMemory()
        sizes = (memory.host_bytes, memory.device_bytes, stage.disk)
        table.add_row(stage.stage, duration(stage.seconds), *(megabytes(size, 0) if size else "" for size in sizes))
    table.add_section()
    total, disk = duration(sum(stage.seconds for stage in stages)), megabytes(sum(stage.disk for stage in stages), 0)
    table.add_row("together", total, "", "", disk, style="bold")
    return table


def searched(rungs: list[tuple[int, int]]) -> str:
    """Return the evaluations of a search by the tokens they read, as text; ``rungs`` are (tokens, evaluations)."""
    first, *others = [f"{count} {{}}of {tokens:,}" for tokens, count in rungs]
    return ", ".join([first.format("evaluations "), *(other.format("") for other in others)]) + " tokens"


def plan_record(plan: Plan, rates: Rates, stages: list[StageForecast], workers: int) -> dict[str, Any]:
    """Return what ``show_plan`` shows, every gene included, as values for JSON; sizes in bytes, times in seconds."""
    space, config = plan.space, plan.config
    return {
        "name": config.name,
        "model": config.model,
        "full_precision": plan.folder.full_precision,
        "weights": space.weights,
        "fixed_bytes": space.fixed_bytes,
        "smallest_bytes": space.file_bytes(space.smallest()),
        "largest_bytes": space.file_bytes(space.largest()),
        "budget_bytes": plan.budget.file_bytes,
        "bits_per_weight": 8 * plan.budget.file_bytes / space.weights,
        "sensitivities": {
            "measure": config.sensitivity.measure,
            "evaluations": plan.sensitivity_evaluations,
            "tokens": config.text.tokens.sensitivity,
        },
        "search": {
            "strategy": config.search.strategy,
            "rungs": [{"tokens": tokens, "evaluations": count} for tokens, count in plan.search_rungs],
        },
        "workers": {"count": workers, "device": rates.device, "threads": rates.threads},
        "stages": [
            {"stage": stage.stage, "seconds": stage.seconds, "disk_bytes": stage.disk}
            | {f"{kind}_bytes": getattr(stage.memory or StageMemory(), f"{kind}_bytes") for kind in ("host", "device")}
            for stage in stages
        ],
        "more_memory_than_there_is": too_large(plan, stages),
        "genes": [
            {
                "name": gene.name,
                "tensors": gene.tensors,
                "shapes": gene.shapes,
                "bytes": {fmt.name: gene.size_bytes(choice) for choice, fmt in enumerate(gene.formats)},
            }
            for gene in space.genes
        ],
    }
