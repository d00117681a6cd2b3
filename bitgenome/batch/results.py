"""Writes the results of a batch, one row per run, as Parquet, CSV, an HTML page and a table in the terminal."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from bitgenome.batch.config import BatchRun
from bitgenome.batch.state import RunState, Stage
from bitgenome.common import layout
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.common.numbers import perplexity_text
from bitgenome.report.leaderboard import leaderboard, standing_of
from bitgenome.report.source import RunSource
from bitgenome.storage.run_files import run_files

STANDING = "standing"  # among the figures of a run, and no column
COLUMNS = {  # of results.parquet and results.csv
    "name": "string",
    "stage": "string",
    "model": "string",
    "budget_bytes": "Int64",
    "file_bytes": "Int64",
    "bits_per_weight": "Float64",
    "simulated_kl": "Float64",  # nats per token on held-out text, simulated from the file's bytes
    "simulated_perplexity": "Float64",
    "mean_kl": "Float64",  # by llama.cpp, as the two below
    "perplexity": "Float64",
    "base_perplexity": "Float64",  # of the original
    "evaluations": "Int64",
    "seconds": "Float64",  # of all attempts, including waits for artefacts of other runs
    "strategy": "string",
    "seed": "Int64",
    "run": "string",  # its directory, relative to the batch's
    "gguf": "string",
    "sentence": "string",  # why it failed
}


def results_frame(states: Sequence[RunState], path: Path) -> pd.DataFrame:
    """Return a frame of COLUMNS with a row per run: by model and budget, the best first, runs without a result last.

    ``path`` is the batch's directory.
    """
    frame = pd.DataFrame([record(state, path) for state in states], columns=list(COLUMNS)).astype(COLUMNS)
    return frame.sort_values(["model", "budget_bytes", "simulated_kl", "name"], na_position="last", ignore_index=True)


def record(state: RunState, path: Path) -> dict[str, Any]:
    """Return what is known of one run; figures only of a finished one."""
    config, directory = state.run.config, state.run.directory
    if state.stage is Stage.FINISHED and state.figures is None:
        state.figures = figures_of(state.run)
    return {
        "name": state.name,
        "stage": str(state.stage),
        "model": state.run.plan.folder.name,
        "budget_bytes": state.run.plan.budget.file_bytes,
        "strategy": config.search.strategy,
        "seed": config.search.seed,
        "run": os.path.relpath(directory, path),
        "sentence": state.sentence or None,
        **(state.figures or {}),
    }


def figures_of(run: BatchRun) -> dict[str, Any]:
    """Return the figures of a finished run from its directory, behind a URL the remote one. Raises StorageError."""
    files = run_files(run.location)
    best = files.record(layout.BEST)
    proof = best["proof"]
    figures = proof["figures"]
    return {
        "file_bytes": proof["file_bytes"],
        "bits_per_weight": best["bits_per_weight"],
        **{key: proof[key] for key in ("simulated_kl", "simulated_perplexity")},
        **{key: figures[key]["value"] for key in ("mean_kl", "perplexity", "base_perplexity")},
        "evaluations": sum(line.endswith(b"\n") for line in files.lines(layout.EVALUATIONS)),
        "seconds": round(sum(files.record(layout.RECORD)["stages"].values()), 1),
        "gguf": best["gguf"],
        STANDING: standing_of(RunSource(run.location).read(), report=files.size(layout.REPORT) > 0),
    }


def write_results(path: Path, name: str, states: Sequence[RunState]) -> pd.DataFrame:
    """Write results.parquet, results.csv and leaderboard.html into ``path``, and return the frame that they show."""
    frame = results_frame(states, path)
    atomic_write_bytes(path / layout.RESULTS_PARQUET, frame.to_parquet(index=False))
    atomic_write_text(path / layout.RESULTS_CSV, frame.to_csv(index=False))
    standings = {state.name: state.figures[STANDING] for state in states if state.figures}
    atomic_write_text(path / layout.LEADERBOARD, leaderboard(frame, name, standings))
    return frame


def size(count: int) -> str:
    """Return a number of bytes as text in MB (10^6 bytes)."""
    return f"{count / 1e6:.3f} MB"


def summary(row: Mapping[Any, Any]) -> str:
    """Return the figures of a finished run in one line, "" for any other run."""
    if row["stage"] != Stage.FINISHED:
        return ""
    return (
        f"KL by llama.cpp {row['mean_kl']:.5f}, simulated {row['simulated_kl']:.5f}, "
        f"perplexity {perplexity_text(row['perplexity'])}, "
        f"{row['bits_per_weight']:.3f} bits per weight, {size(row['file_bytes'])}, {row['evaluations']} evaluations, "
        f"{row['seconds']:.0f} s"
    )


def show_results(frame: pd.DataFrame, path: Path, console: Console) -> None:
    """Show the closing table of a batch, with the columns for which there is room beside the names of all runs."""
    left = list(SHOWN)
    while widest(table := closing_table(frame, left), console) > console.width and len(left) > 1:
        left.remove(next(column for column in LEAST_NEEDED if column in left))
    console.print(table)
    for what, file in (("table", layout.RESULTS_CSV), ("page", layout.LEADERBOARD)):
        console.print(f"{what:>6}  {path / file}", soft_wrap=True)


def closing_table(frame: pd.DataFrame, columns: Sequence[str]) -> Table:
    """Return a table of all runs, those of a model and budget together, with ``columns`` of SHOWN."""
    title = "Held-out test text, by model and budget; KL and perplexity by llama.cpp"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in frame.to_dict("records"):
        group = (row["model"], row["budget_bytes"])
        if last not in (None, group):
            table.add_section()
        last = group
        if row["stage"] == Stage.FINISHED:
            table.add_row(row["name"], *(SHOWN[column](row) for column in columns))
        else:
            table.add_row(row["name"], str(row["stage"]), style="red" if row["stage"] == Stage.FAILED else "dim")
    return table


def widest(table: Table, console: Console) -> int:
    """Return the columns of a terminal that a table takes with nothing folded."""
    return Measurement.get(console, console.options.update(width=UNBOUNDED), table).maximum


UNBOUNDED = 10_000  # columns of a terminal
SHOWN: dict[str, Callable[[Mapping[Any, Any]], str]] = {  # in the closing table, beside the name
    "MB": lambda row: size(row["file_bytes"]).removesuffix(" MB"),
    "bits": lambda row: f"{row['bits_per_weight']:.3f}",
    "simulated": lambda row: f"{row['simulated_kl']:.5f}",
    "KL": lambda row: f"{row['mean_kl']:.5f}",
    "perplexity": lambda row: perplexity_text(row["perplexity"]),
    "tried": lambda row: str(row["evaluations"]),
    "s": lambda row: f"{row['seconds']:.0f}",
}
LEAST_NEEDED = ("s", "tried", "bits", "perplexity", "simulated", "KL")  # all of them are in results.csv
