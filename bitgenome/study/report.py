"""Writes the report of a study: one table, one picture, and how each method spread its bits."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from rich.console import Console
from rich.table import Table

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.common.numbers import perplexity_text
from bitgenome.config.study import StudyConfig
from evaluators.study.bench import MethodResult
from evaluators.study.statistics import AllocationStatistics, all_frames

mpl.use("Agg")  # pictures are files; no display is needed
from matplotlib import pyplot

FIGURES = (
    "average_bits",
    "stored_bits",
    "kl",
    "perplexity",
    "reconstruction",
    "sparsity",
    "seconds",
    "grouping_seconds",
)
MARKERS = "osD^vP*X<>"


def statistics_of(result: MethodResult) -> AllocationStatistics:
    """Return statistics of how a method spread its bits."""
    return AllocationStatistics(result.label, result.layers)


def results_frame(results: Sequence[MethodResult]) -> pd.DataFrame:
    """Return a frame with a row per method, in the order given: label, line and FIGURES."""
    names = [field.name for field in fields(MethodResult) if field.name in ("line", "label", *FIGURES)]
    return pd.DataFrame([{name: getattr(result, name) for name in names} for result in results])


def write_report(path: Path, config: StudyConfig, results: Sequence[MethodResult], more: str = "") -> None:
    """Write the files of the report into the directory ``path``.

    They are results.parquet, results.csv, allocations.parquet, kl-over-bits.svg and report.md, which ends in ``more``.
    """
    frame = results_frame(results)
    atomic_write_bytes(path / layout.RESULTS_PARQUET, frame.to_parquet(index=False))
    atomic_write_text(path / layout.RESULTS_CSV, frame.to_csv(index=False))
    allocations = all_frames(map(statistics_of, results))
    atomic_write_bytes(path / "allocations.parquet", allocations.to_parquet(index=False))
    draw(path / "kl-over-bits.svg", results)
    atomic_write_text(path / "report.md", markdown(config, results) + more)


def markdown(config: StudyConfig, results: Sequence[MethodResult]) -> str:
    """Return the report as Markdown: the table, and the picture by its name."""
    lines = [
        f"# {config.name}",
        "",
        f"{config.model}, {config.text.tokens.calibration:,} tokens of calibration text, "
        f"{config.text.tokens.test:,} of held-out test text; full precision has perplexity "
        f"{perplexity_text(results[0].full_perplexity)}. Bits are those of the treated tensors ({config.tensors}), "
        "stored bits count scales and zeros too.",
        "",
        "| method | bits | stored bits | KL | perplexity | reconstruction | zeros | channels by bits |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(cells(result))} |" for result in results),
        "",
        "![KL over average bits](kl-over-bits.svg)",
        "",
    ]
    return "\n".join(lines)


def cells(result: MethodResult) -> tuple[str, ...]:
    """Return a method's row of the table as text."""
    return (
        result.label,
        f"{result.average_bits:.3f}",
        f"{result.stored_bits:.3f}",
        f"{result.kl:.5f}",
        perplexity_text(result.perplexity),
        f"{result.reconstruction:.5f}",
        f"{100 * result.sparsity:.1f} %",
        statistics_of(result).shares,
    )


def draw(path: Path, results: Sequence[MethodResult]) -> None:
    """Draw KL over average bits, one curve per ``line``; the picture's bytes do not depend on when it is drawn."""
    with mpl.rc_context({"svg.hashsalt": "bitgenome", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        lines = list(dict.fromkeys(result.line for result in results))
        for index, line in enumerate(lines):
            points = sorted((r.average_bits, r.kl) for r in results if r.line == line)
            axes.plot(*zip(*points, strict=True), marker=MARKERS[index % len(MARKERS)], label=line)
        axes.set(xlabel="bits a weight of the treated tensors", ylabel="KL, nats per token", yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def show_results(results: Sequence[MethodResult], path: Path, console: Console) -> None:
    """Show the closing table of a study."""
    table = Table(
        title=f"Held-out test text; full precision has perplexity {perplexity_text(results[0].full_perplexity)}",
        title_justify="left",
    )
    for name in ("method", "bits", "stored", "KL", "perplexity", "reconstruction", "zeros"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for result in results:
        table.add_row(*cells(result)[:-1])
    console.print(table)
    console.print(f"report  {path / 'report.md'}", soft_wrap=True)


def show_allocation(statistics: AllocationStatistics, console: Console) -> None:
    """Show how one method spread its bits, layer by layer."""
    table = Table(title=f"{statistics.method}: {statistics.average_bits:.3f} bits on average", title_justify="left")
    levels = list(statistics.channels)
    for name in ("layer", "bits", *(f"{bits} bits" for bits in levels), "importance"):
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for layer in statistics.layers:
        total = sum(layer.channels.values())
        shares = [f"{layer.channels.get(b, 0)} ({100 * layer.channels.get(b, 0) / total:.0f} %)" for b in levels]
        low, high = layer.importance_min, layer.importance_max
        importance = "" if low is None or high is None else f"{low:.3g} to {high:.3g}"
        table.add_row(layer.tensor.removesuffix(".weight"), f"{layer.average_bits:.3f}", *shares, importance)
    console.print(table)
