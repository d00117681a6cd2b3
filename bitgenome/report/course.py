"""Makes the figures of a run's course: its search, its healing, and the time that its stages took."""

from collections.abc import Mapping, Sequence

from bitgenome.report.names import duration, kl_text
from bitgenome.report.page import Figure, Section, Table
from bitgenome.report.source import RunView, Scored
from bitgenome.report.traces import bars, bars_layout

MOST_POINTS = 2000  # of one trace; of longer searches the best and an even share of the others are shown
SHOWN = 0.95  # share of the losses that the figure's height holds: the worst ones would press the others together
VARIANTS = {"blockwise": "block by block", "full": "in the whole model at once"}


def convergence(view: RunView) -> Section | None:
    """Show every evaluation of the search on its longest text, and the best so far."""
    scored = view.scored
    if not scored:
        return None
    shown, steps = thinned(scored), best_so_far(scored)
    losses = sorted(one.loss for one in scored)
    low, high = losses[0], losses[int(SHOWN * (len(losses) - 1))]
    margin = 0.05 * (high - low) or 0.1 * abs(low) or 1.0
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "a genome",
        "x": [n + 1 for n in shown],
        "y": [scored[n].loss for n in shown],
        "marker": {"color": "--grey", "size": 5, "opacity": 0.6},
        "hovertemplate": "genome %{x}<br>loss %{y}<extra></extra>",
    }
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": [n for n, _ in steps],
        "y": [loss for _, loss in steps],
        "line": {"color": "--blue", "width": 2.5, "shape": "hv"},
        "hovertemplate": "after %{x} genomes<br>best loss %{y}<extra></extra>",
    }
    loss = "KL" if view.config.get("fitness", {}).get("kind") == "distortion" else "loss"
    layout = {
        "xaxis": {"title": {"text": "genomes evaluated"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": f"{loss} on search text"}, "range": [low - margin, high + margin]},
        "showlegend": True,
    }
    notes = [
        f"{len(scored):,} genomes on {view.tokens:,} tokens of search text",
        *([f"{view.shorter:,} evaluations on less text are not shown"] if view.shorter else []),
        *([f"{len(shown):,} of them are drawn"] if len(shown) < len(scored) else []),
        *(["the text changes during the search, and each draw of it has its own best"] if scored[-1].draw else []),
        *(["the worst lie above the figure"] if losses[-1] > high + margin else []),
    ]
    rows = [
        (f"{one['generation']}", f"{one['genomes']:,}", kl_text(one["best_loss"]), correlation(one))
        for one in view.generations
        if one.get("best_loss") is not None
    ]
    columns = ("generation", "genomes so far", "best loss", "rank correlation of predictions")
    figure = Figure(f"Loss of {len(scored)} genomes in the order they were evaluated", [dots, line], layout)
    table = Table(columns, rows) if rows else None
    return Section("convergence", "How the search went", ["; ".join(notes) + "."], figure, table, half=True)


def correlation(generation: Mapping[str, float | None]) -> str:
    """Return how well the surrogate had ranked a generation, "" where it did not predict it."""
    found = generation.get("surrogate_correlation")
    return "" if found is None else f"{found:.2f}"


def healing(view: RunView) -> Section | None:
    """Show what healing did to each window of test text; where nothing was taken, a sentence says so."""
    found, heading = view.healing, "What healing did"
    if not found:
        off = ["Healing was off: norms and biases are as in the model, block scales as in the bank."]
        return Section("healing", heading, off, half=True) if view.result else None
    test, validation = found["test"], found["validation"]
    variant = VARIANTS.get(found["variant"], found["variant"])
    if not found["applied"] or not test.get("after"):
        kl = (validation.get("after") or {}).get("kl")
        tried = (
            f": KL on validation text {kl_text(validation['before']['kl'])} before, {kl_text(kl)} after" if kl else ""
        )
        return Section("healing", heading, [f"Healing was tried, {variant}, and not taken{tried}."], half=True)
    before, after = test["before"]["window_kl"], test["after"]["window_kl"]
    better = sum(b > a for b, a in zip(before, after, strict=True))
    low, high = 0.95 * min(*before, *after), 1.05 * max(*before, *after)
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": before,
        "y": after,
        "marker": {"color": "--blue", "size": 8, "opacity": 0.75},
        "hovertemplate": "before %{x}<br>after %{y}<extra></extra>",
    }
    equal = {
        "type": "scatter",
        "mode": "lines",
        "x": [low, high],
        "y": [low, high],
        "hoverinfo": "skip",
        "line": {"color": "--grey", "width": 1.5, "dash": "dot"},
    }
    place = {"x": high, "y": high, "xanchor": "right", "yanchor": "top", "xshift": -28, "showarrow": False}
    layout = {
        "xaxis": {"title": {"text": "KL before"}, "range": [low, high]},
        "yaxis": {"title": {"text": "KL after"}, "range": [low, high]},
        "annotations": [{**place, "text": "no change", "font": {"color": "--soft"}}],
    }
    what = "Norms, biases and scales of blocks" if found.get("scales") else "Norms and biases"
    says = [
        f"{what}, tuned {variant} for no bytes: KL on test text {kl_text(test['before']['kl'])} before, "
        f"{kl_text(test['after']['kl'])} after. A dot is a window of text; {better} of {len(before)} lie below the "
        "line: they gained."
    ]
    rows = [(str(n), kl_text(b), kl_text(a)) for n, (b, a) in enumerate(zip(before, after, strict=True), start=1)]
    figure = Figure(f"KL of {len(before)} windows before and after healing", [equal, dots], layout)
    return Section("healing", heading, says, figure, Table(("window", "KL before", "KL after"), rows), half=True)


def cost(view: RunView) -> Section | None:
    """Show the seconds of every stage, beside those that were expected."""
    seconds = view.status.seconds
    if not seconds:
        return None
    expected: Mapping[str, float] = view.record.get("forecast") or {}
    stages = [stage for stage in seconds if seconds[stage] or expected.get(stage)]
    took = bars(stages, [seconds[stage] for stage in stages], [duration(seconds[stage]) for stage in stages], "--blue")
    known = [stage for stage in stages if stage in expected]
    mark = {"color": "--orange", "symbol": "line-ns", "size": 16, "line": {"width": 3, "color": "--orange"}}
    ticks = {
        "type": "scatter",
        "mode": "markers",
        "name": "expected",
        "y": known,
        "x": [expected[stage] for stage in known],
        "marker": mark,
        "hovertemplate": "%{y}<br>expected %{x:.1f} s<extra></extra>",
    }
    count = view.status.workers
    workers = f" on {count} worker{'s' if count != 1 else ''}" if count else ""
    says = [f"{duration(sum(seconds.values()))} in all{workers}, for {view.status.evaluations:,} genomes."]
    rows = [(one, f"{seconds[one]:.1f}", f"{expected[one]:.1f}" if one in expected else "") for one in stages]
    layout = bars_layout("seconds", [*seconds.values(), *expected.values()], showlegend=bool(known))
    traces = [{**took, "name": "took"}, *([ticks] if known else [])]
    figure = Figure("Seconds by stage", traces, layout, 90 + 30 * len(stages))
    return Section("cost", "What it cost", says, figure, Table(("stage", "seconds", "expected"), rows), half=True)


def best_so_far(scored: Sequence[Scored]) -> list[tuple[int, float | None]]:
    """Return where the lowest loss on the present draw falls, as (genomes, loss); a gap where the draw changes."""
    steps: list[tuple[int, float | None]] = []
    draw, best = None, float("inf")
    for n, one in enumerate(scored, start=1):
        if one.draw != draw:
            if steps:
                steps += [(n - 1, best), (n, None)]
            draw, best = one.draw, float("inf")
        if one.loss < best:
            best = one.loss
            steps.append((n, best))
    return [*steps, (len(scored), best)]


def thinned(scored: Sequence[Scored]) -> list[int]:
    """Return the places of at most about MOST_POINTS evaluations, in order: an even share, and those that were best."""
    if len(scored) <= MOST_POINTS:
        return list(range(len(scored)))
    steps = {n - 1 for n, loss in best_so_far(scored) if loss is not None}
    return sorted(steps | set(range(0, len(scored), -(-len(scored) // MOST_POINTS))))
