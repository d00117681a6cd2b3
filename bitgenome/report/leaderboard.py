"""Makes the page of a batch: its runs by model and budget beside baselines, with ties told as ties."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from bitgenome.common import layout
from bitgenome.common.numbers import perplexity_text
from bitgenome.report.gains import windows_of
from bitgenome.report.names import CLEAR, is_ours, kl_text, level_of, megabytes
from bitgenome.report.page import Figure, Link, Page, Section, Table, render
from bitgenome.report.quality import LOG_KL, by_llamacpp
from bitgenome.report.source import RunView
from bitgenome.report.traces import points
from search.loop.paired import Estimate

COLORS = ("--blue", "--orange", "--green", "--purple", "--red")  # of budgets, in turn
SYMBOLS = ("diamond", "circle", "triangle-up", "cross", "star")
FIGURES = ("rank", "KL, simulated", "KL", "perplexity", "bits/weight", "size")
COLUMNS = ("run", *FIGURES, "strategy", "seed", "evaluations", "seconds")
FINISHED = "finished"  # the stage of a run with a result
Run = Mapping[str, Any]  # a row of a batch's results


@dataclass(frozen=True)
class Standing:
    """Holds what a run is ranked and drawn by, beyond its row of the results."""

    text: str | None = None  # digest of the text that it was measured on
    window_kl: Sequence[float] = ()  # of its file on test text, simulated
    levels: Sequence[Mapping[str, Any]] = field(default_factory=tuple)  # rows of all tensors at one type
    mix: Mapping[str, Any] | None = None  # of llama.cpp's own files the one that was measured beside it
    report: bool = False  # whether it has a page of its own


def standing_of(view: RunView, report: bool) -> Standing:
    """Return what a finished run is ranked and drawn by; ``report`` says whether its page is there."""
    best = view.best
    ours = next((row for row in reversed(best.get("rows", [])) if is_ours(row["name"])), None)
    return Standing(
        view.record.get("digests", {}).get("text"),
        windows_of(ours, view) if ours else (),
        [row for row in best.get("rows", []) if level_of(row["name"])],
        view.proof.get("mix"),
        report,
    )


def ranks(names: Sequence[str], standings: Mapping[str, Standing]) -> list[str]:
    """Return the rank of each run of a group, given best first; those that tie with the best of a rank share it."""
    found: dict[str, str] = {}
    left = list(names)
    while left:
        best = standings.get(left[0], Standing())
        tied = [name for name in left[1:] if ties(standings.get(name, Standing()), best)]
        rank = f"{len(found) + 1}{'=' if tied else ''}"
        found |= dict.fromkeys((left[0], *tied), rank)
        left = [name for name in left if name not in found]
    return [found[name] for name in names]


def ties(one: Standing, other: Standing) -> bool:
    """Return whether the test text leaves open which of two files is nearer to the original.

    It does where their KL differs by less than CLEAR standard errors, window by window.
    """
    a, b = np.array(one.window_kl), np.array(other.window_kl)
    if one.text != other.text or len(a) != len(b) or not len(a):
        return False
    difference = Estimate.of(a - b)
    return difference.mean == 0 or abs(difference.mean) < CLEAR * difference.standard_error


def leaderboard(frame: pd.DataFrame, name: str, standings: Mapping[str, Standing]) -> str:
    """Return the HTML page of a batch's results, the best run of each budget first, then the runs without a result.

    ``frame`` is in that order; ``standings`` are of its finished runs, by name.
    """
    runs = [{str(key): value for key, value in record.items()} for record in frame.to_dict("records")]
    finished, others = ([run for run in runs if (run["stage"] == FINISHED) is wanted] for wanted in (True, False))
    sections: list[Section] = []
    for number, (model, group) in enumerate(grouped(finished, "model").items()):
        sections.append(chart(model, group, standings, f"chart-{number}"))
        for place, (budget, within) in enumerate(grouped(group, "budget_bytes").items()):
            sections.append(
                table_of(f"{model} within {megabytes(budget)}", within, standings, f"table-{number}-{place}")
            )
    if others:
        sentences = ["" if pd.isna(run["sentence"]) else str(run["sentence"]) for run in others]
        links = [Link(run["name"], f"{quote(run['run'])}/") for run in others]
        rows = [(link, run["stage"], why) for link, run, why in zip(links, others, sentences, strict=True)]
        sections.append(Section("rest", "Without a result", table=Table(("run", "state", "why"), rows, words=3)))
    says = [
        f"{len(finished)} of {len(runs)} runs finished. KL (nats per token) and perplexity are what llama.cpp computes "
        "of the shipped file on held-out test text. Runs are ranked by the KL that is simulated from the file's bytes."
    ]
    return render(Page(name, "Batch, by model and budget", sections, says=says))


def grouped(runs: Sequence[Run], key: str) -> dict[Any, list[Run]]:
    """Return the runs by their value of ``key``, in order."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(run[key], []).append(run)
    return found


def chart(model: str, runs: Sequence[Run], standings: Mapping[str, Standing], anchor: str) -> Section:
    """Return KL against size of a model's runs, beside one type for all tensors and llama.cpp's own files."""
    known = [standings.get(run["name"], Standing()) for run in runs]
    levels = sorted({level_of(row["name"]): row for one in known for row in one.levels}.items(), key=_bytes)
    named = [{**by_llamacpp(one.mix), "name": f"llama.cpp's own {one.mix['mix']}"} for one in known if one.mix]
    mixes = list({mix["name"]: mix for mix in named}.values())
    baselines = [row for _, row in levels]
    traces = [
        points("one type for all tensors", baselines, "--grey", "square-open", text=[level for level, _ in levels]),
        points("llama.cpp's own, by llama.cpp", mixes, "--green", "triangle-up-open", size=11),
    ]
    for n, (budget, within) in enumerate(grouped(runs, "budget_bytes").items()):
        color, symbol = COLORS[n % len(COLORS)], SYMBOLS[n % len(SYMBOLS)]
        traces.append(points(f"within {megabytes(budget)}", list(map(simulated, within)), color, symbol, size=10))
    says = ["Down and to the left is better." + (" Squares are all tensors at one type, simulated." if levels else "")]
    layout = {"xaxis": {"title": {"text": "file, MB"}}, "yaxis": LOG_KL, "showlegend": True}
    label = f"KL against file size of {len(runs)} runs of {model}"
    figure = Figure(label, [one for one in traces if one["x"]], layout, 400)
    shown = (*baselines, *mixes, *map(simulated, runs))
    rows = [(row["name"], megabytes(row["file_bytes"]), kl_text(row["kl"])) for row in shown]
    return Section(anchor, f"{model}: quality against size", says, figure, Table(("file", "size", "KL"), rows))


def table_of(heading: str, runs: Sequence[Run], standings: Mapping[str, Standing], anchor: str) -> Section:
    """Return the runs of a model within a budget, the best first."""
    places = ranks([run["name"] for run in runs], standings)
    rows = [
        (
            Link(run["name"], address(run["run"], standings.get(run["name"], Standing()))),
            rank,
            f"{run['simulated_kl']:.5f}",
            f"{run['mean_kl']:.5f}",
            perplexity_text(run["perplexity"]),
            f"{run['bits_per_weight']:.3f}",
            megabytes(run["file_bytes"]),
            run["strategy"],
            str(run["seed"]),
            str(run["evaluations"]),
            f"{run['seconds']:.0f}",
        )
        for run, rank in zip(runs, places, strict=True)
    ]
    says = [f"Perplexity in full precision {perplexity_text(runs[0]['base_perplexity'])}."]
    if tied := sum(rank == "1=" for rank in places):
        says.append(
            f"{tied} runs share the first place: the test text does not tell them apart, by {CLEAR:.0f} standard "
            "errors of their difference, window by window."
        )
    marked = frozenset(n for n, rank in enumerate(places) if rank in ("1", "1="))
    return Section(anchor, heading, says, table=Table(COLUMNS, rows, marked=marked))


def simulated(run: Run) -> dict[str, Any]:
    """Return a run as a row of the closing table has it."""
    return {"name": run["name"], "file_bytes": run["file_bytes"], "kl": run["simulated_kl"]}


def _bytes(item: tuple[Any, Mapping[str, Any]]) -> int:
    """Return the size of a row of the closing table that stands behind its level."""
    size: int = item[1]["file_bytes"]
    return size


def address(run: str, standing: Standing) -> str:
    """Return where a run is shown: its page, or its directory where it has none."""
    return f"{quote(run)}/{layout.REPORT if standing.report else ''}"
