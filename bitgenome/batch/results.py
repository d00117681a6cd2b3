"""Writes the results of a batch, one row per run, as Parquet, CSV, an HTML page and a table in the terminal."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
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
    """Show the closing table of a batch."""
    table = Table(
        title="Held-out test text, by model and budget", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("run", overflow="fold")
    for column in ("MB", "bits", "KL", "llama.cpp", "perplexity", "tried", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for row in frame.to_dict("records"):
        group = (row["model"], row["budget_bytes"])
        if last not in (None, group):
            table.add_section()
        last = group
        if row["stage"] != Stage.FINISHED:
            table.add_row(row["name"], str(row["stage"]), style="red" if row["stage"] == Stage.FAILED else "dim")
            continue
        figures = (f"{row['bits_per_weight']:.3f}", f"{row['simulated_kl']:.5f}", f"{row['mean_kl']:.5f}")
        more = (perplexity_text(row["perplexity"]), str(row["evaluations"]), f"{row['seconds']:.0f}")
        table.add_row(row["name"], size(row["file_bytes"]).removesuffix(" MB"), *figures, *more)
    console.print(table)
    for what, file in (("table", layout.RESULTS_CSV), ("page", layout.LEADERBOARD)):
        console.print(f"{what:>6}  {path / file}", soft_wrap=True)
