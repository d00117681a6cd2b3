"""Prints the plan of a run: its tensors by kind, sizes, budget, and what each stage will take."""

from collections import Counter, defaultdict

from rich.console import Console
from rich.table import Table

from bitgenome.cli.report import megabytes
from bitgenome.plan.forecast import StageForecast, duration, too_large
from bitgenome.plan.memory import memory_line
from bitgenome.plan.plan import Plan
from evaluators.model.sizes import StageMemory
from evaluators.probes.rates import Rates
from search.gene_groups import kind_labels
from search.types import Gene


def show_plan(
    plan: Plan, rates: Rates, stages: list[StageForecast], workers: int, full: bool, console: Console
) -> None:
    """Show tensors (``full``: gene by gene), sizes, budget, evaluations and the forecast of every stage."""
    console.print(genes_table(plan) if full else kinds_table(plan))
    space, config = plan.space, plan.config
    bounds = [space.file_bytes(genome) for genome in (space.smallest(), space.largest())]
    console.print(
        f"{len(space.genes)} genes, {space.weights:,} weights; files from {bounds[0]:,} to {bounds[1]:,} bytes, "
        f"{space.fixed_bytes:,} of them fixed"
    )
    if plan.folder.parts:
        size = megabytes(plan.folder.weights_bytes, 0)
        console.print(f"the run opens {plan.folder.parts[0]} as a folder of {size}, below {config.storage_path}/shared")
    if plan.folder.full_precision:
        console.print(f"full precision here is {plan.folder.full_precision}")
    budget = plan.budget.file_bytes
    console.print(f"budget {budget:,} bytes = {8 * budget / space.weights:.4f} bits per weight")
    if plan.sparsity:
        counts = Counter(map(str, plan.sparsity.values()))
        console.print("pruned: " + ", ".join(f"{sparsity} of {count} tensors" for sparsity, count in counts.items()))
    console.print(
        f"{plan.sensitivity_evaluations} sensitivities ({config.sensitivity.measure}) of "
        f"{config.text.tokens.sensitivity:,} tokens, {searched(plan.search_rungs)} ({config.search.strategy})"
    )
    console.print(memory_line(plan))
    console.print(stages_table(rates, stages, workers))
    if found := too_large(plan, stages):
        console.print(f"more memory than there is: {', '.join(found)}", style="bold red")
    console.print(
        "times are from short probes of the kernels on this machine, beside whatever else runs on it; memory is a "
        "process's peak, beside what its libraries take"
    )


def genes_table(plan: Plan) -> Table:
    """Return a table of all genes."""
    table = Table(title=f"{plan.config.name}: {plan.config.model}", title_justify="left")
    for column in ("gene", "shape", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "gene" else "right")
    for gene in plan.space.genes:
        shapes = " ".join("x".join(map(str, shape)) for shape in gene.shapes)
        table.add_row(gene.name.removesuffix(".weight"), shapes, *ends(gene, 1))
    return table


def kinds_table(plan: Plan) -> Table:
    """Return a table of the kinds of genes, such as all self_attn.q_proj of one shape."""
    table = Table(title=f"{plan.config.name}: {plan.config.model}", title_justify="left")
    for column in ("kind", "genes", "shape", "levels", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "kind" else "right")
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


def ends(gene: Gene, count: int) -> list[str]:
    """Return the smallest and the largest format of ``gene``, with the size of ``count`` such genes."""
    return [f"{gene.formats[c].name} {megabytes(count * gene.size_bytes(c))}" for c in (0, len(gene.formats) - 1)]


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
