"""The command ``compare``: files beside their original and llama.cpp's own, in llama.cpp."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bitgenome.cli.terminal import RUNS, AsJson, Storage, console, print_json, say
from bitgenome.common.numbers import perplexity_text
from bitgenome.observe.progress import tracker

if TYPE_CHECKING:
    from bitgenome.compare.compare import Compared, Measured

GB, MB = 1e9, 1e6


def compare(
    named: Annotated[
        list[str], typer.Argument(metavar="RUN|FILE...", help="Finished runs, and GGUF files", show_default=False)
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Shows the answers to it; may be given again")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer")] = 64,
    skip_original: Annotated[
        bool, typer.Option("--skip-original", help="Do not run the original, which may not fit into memory")
    ] = False,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="One of llama.cpp's, such as Q4_K_M; by default those of about the run's size"),
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="Of files without a run: what they are compared with", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Of files without a run: llama.cpp's mixes are made with it", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Of files without a run: a UTF-8 text; else held-out Python", show_default=False)
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder in which the original and llama.cpp's files stay", show_default=False)
    ] = None,
    storage: Storage = RUNS,
    as_json: AsJson = False,
) -> None:
    """Measure runs and GGUF files beside their original and llama.cpp's own files of about their size.

    llama.cpp's mixes are quantized by its own C functions, with the types that llama-quantize gives each tensor and the
    run's importance matrix. llama.cpp runs one file at a time, each in a process of its own.
    """
    from bitgenome.compare.compare import Wanted  # noqa: PLC0415 - imported when called
    from bitgenome.compare.compare import compare as compare_files  # noqa: PLC0415

    wanted = Wanted(
        tuple(prompt or ()), prompts, max_tokens, skip_original, original, tuple(mix or ()), imatrix, text, keep
    )
    found = compare_files(named, wanted, storage, tracker(console))
    if as_json:
        print_json(found.to_json())
    else:
        show_compared(found, console)


def show_compared(found: "Compared", out: Console) -> None:
    """Show a table with a column for each file, and the answers of all to each prompt."""
    from bitgenome.cli.tables import one_line  # noqa: PLC0415

    table = Table(title=f"llama.cpp on {found.windows} windows of {found.window} tokens", title_justify="left")
    table.add_column("")
    for measured in found.files:
        style = "bold" if measured.kind == "ours" else ""
        table.add_column(measured.name, justify="right", style=style, overflow="fold")
    for name, cells in rows_of(found.files):
        table.add_row(name, *cells)
    out.print(table)
    for line in legend(found):
        say(out, line)
    for place, prompt in enumerate(found.prompts):
        out.print()
        say(out, f"> {one_line(prompt)}", style="italic")
        for measured in found.files:
            say(out, f"{measured.name}: {one_line(measured.written.answers[place])}")


def rows_of(files: "tuple[Measured, ...]") -> list[tuple[str, list[str]]]:
    """Return the name of each row, and its text for each file; rows that no file has are left out."""
    rows: dict[str, list[str]] = {}
    for measured in files:
        for name, cell in _cells(measured).items():
            rows.setdefault(name, []).append(cell)
    return [(name, cells) for name, cells in rows.items() if any(cells)]


def _cells(measured: "Measured") -> dict[str, str]:
    written, figures, divergence = measured.written, measured.figures, measured.divergence
    peak = "" if written.peak_bytes is None else f"{written.peak_bytes / MB:,.0f} MB"
    size = measured.file_bytes
    return {
        "size": f"{size / GB:,.3f} GB" if size >= GB else f"{size / MB:,.3f} MB",
        "bits per weight": f"{measured.bits_per_weight:.3f}",
        "load": f"{written.load_seconds:.2f} s",
        "prompt tokens/s": f"{written.prompt_tokens_per_second:,.0f}",
        "output tokens/s": f"{written.generated_tokens_per_second:,.1f}",
        "peak memory": peak,
        "KL: mean": "" if figures is None else f"{figures.mean_kl.value:.5f}",
        "  ±": "" if figures is None else f"{figures.mean_kl.standard_error or 0:.5f}",
        "  99 %": "" if figures is None else f"{figures.kl_99.value:.4f}",
        "  99.9 %": "" if figures is None else f"{figures.kl_99_9.value:.4f}",
        "RMS delta p": "" if figures is None else f"{100 * figures.rms_delta_p.value:.2f} %",
        "same top token": "" if figures is None else f"{100 * figures.same_top.value:.2f} %",
        "perplexity": "" if figures is None else perplexity_text(figures.perplexity.value),
        "  over original": "" if figures is None else f"{figures.perplexity_ratio.value:.4f}",
        "greedy: the same": "" if divergence is None else f"{100 * divergence.same:.0f} %",
        "  tokens before": "" if divergence is None else f"{divergence.median_first:g}",
    }


def legend(found: "Compared") -> list[str]:
    """Return what the table's words mean, a line each."""
    lines = [
        f"Text: {found.text}. KL, delta p, top token and perplexity are beside the original.",
        "Load: until llama.cpp is ready, from the page cache. Peak memory: of its process, with the file that it maps.",
    ]
    if divergences := [measured.divergence for measured in found.files if measured.divergence]:
        tokens, prompts = divergences[0].tokens, len(divergences[0].first)
        lines.append(
            f"Greedy: share of {prompts} beginnings of windows after which the {tokens} likeliest tokens are the "
            "original's to the end; median number of tokens before the first that differs."
        )
    if any(measured.kind == "llama.cpp" for measured in found.files):
        how = f"importance matrix {found.imatrix}" if found.imatrix else "no importance matrix"
        lines.append(f"llama.cpp's files: made by its own C quantizer, types as by llama-quantize, {how}.")
    return lines
