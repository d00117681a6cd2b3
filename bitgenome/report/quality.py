"""Makes the figures of what a run's file is worth, each with the table of its numbers."""

from collections.abc import Mapping
from typing import Any

from bitgenome.report.names import figures_text, is_ours, kl_text, level_of, megabytes, plain
from bitgenome.report.page import Figure, Section, Table
from bitgenome.report.source import RunView
from bitgenome.report.traces import KL, bars, bars_layout, points

LOG_KL = {"title": {"text": KL}, "type": "log", "dtick": 1, "exponentformat": "none"}


def front(view: RunView) -> Section | None:
    """Show KL against file size: what was searched, all tensors at one type, simple mixes, and llama.cpp's figures."""
    rows, proof = view.best.get("rows", []), view.proof
    if not rows:
        return None
    levels = sorted((row for row in rows if level_of(row["name"])), key=lambda row: row["file_bytes"])
    simple = [row for row in rows if not is_ours(row["name"]) and row not in levels]
    ours = [row for row in rows if is_ours(row["name"])]
    labels = [level_of(row["name"]) for row in levels]
    searched = "searched, and healed" if len(ours) > 1 else "searched"
    traces = [
        points("one type for all tensors", levels, "--grey", "square-open", text=labels),
        points("simple mixes of this size", simple, "--purple", "circle-open"),
        points(searched, ours, "--blue", "diamond", size=11),
    ]
    table = [(plain(row["name"]), "simulated", *cells(view, row)) for row in rows]
    for name, mark, color, symbol, size in runtime_points(proof):
        traces.append(points(name, [mark], color, symbol, size))
        table.append((name, "llama.cpp", *cells(view, mark)))
    says = [
        "Down and to the left is better. All figures are of the same held-out test text, simulated from the bytes that "
        "a file would hold" + ("; the star and the triangle are what llama.cpp computes." if proof.get("mix") else "")
        + ("; the star is what llama.cpp computes." if proof and not proof.get("mix") else "")
        + ("." if not proof else "")
    ]  # fmt: skip
    if not proof:
        says.append("llama.cpp has not run the file yet.")
    elif not proof.get("mix"):
        says.append("No file of llama.cpp's own was measured in this run.")
    size = view.best["budget_bytes"] / 1e6
    line = {"type": "line", "x0": size, "x1": size, "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    place = {"x": size, "yref": "paper", "y": 0, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
    layout = {
        "xaxis": {"title": {"text": "file, MB"}},
        "yaxis": LOG_KL,
        "showlegend": True,
        "shapes": [{**line, "line": {"color": "--faint", "width": 1.5, "dash": "dash"}}],
        "annotations": [{**place, "text": "budget", "font": {"color": "--soft"}}],
    }  # fmt: skip
    figure = Figure(f"KL against file size of {len(rows)} mixes", [one for one in traces if one["x"]], layout, 420)
    columns = ("mix", "by", "size", "bits/weight", "KL", "perplexity")
    return Section("front", "Quality against size", says, figure, Table(columns, table, words=2))


def at_this_size(view: RunView) -> Section | None:
    """Show the mixes of about the file's size side by side, the best first."""
    rows = [row for row in view.best.get("rows", []) if is_ours(row["name"]) or not level_of(row["name"])]
    if len(rows) < 2:
        return None
    rows = sorted(rows, key=lambda row: row["kl"])
    names, values = [plain(row["name"]).replace(" = ", " =<br>") for row in rows], [row["kl"] for row in rows]
    colors = ["--blue" if is_ours(row["name"]) else "--grey" for row in rows]
    lines = sum(1 + row["name"].count(" = ") for row in rows)
    figure = Figure(
        "KL of the mixes of this size",
        [bars(names, values, list(map(kl_text, values)), colors)],
        bars_layout(KL, values),
        70 + 22 * len(rows) + 20 * lines,
    )
    says = [
        "The searched mix beside simple ones of the same budget, simulated on test text: shorter is better. Names "
        "joined by “=” are one and the same mix."
    ]
    marked = frozenset(n for n, row in enumerate(rows) if is_ours(row["name"]))
    table = Table(
        ("mix", "size", "bits/weight", "KL", "perplexity"),
        [(plain(row["name"]), *cells(view, row)) for row in rows],
        marked=marked,
    )
    return Section("mixes", "At this size", says, figure, table, half=True)


def agreement(view: RunView) -> Section | None:
    """Show simulated figures beside those of llama.cpp."""
    proof = view.proof
    if not proof:
        return None
    figures = proof["figures"]
    kl, perplexity = (figures[name]["value"] for name in ("mean_kl", "perplexity"))
    known = [
        ("simulated<br>from the file's bytes", proof["simulated_kl"], proof["simulated_perplexity"], "--grey"),
        ("simulated,<br>8-bit inputs", proof.get("eight_bit_kl"), None, "--grey"),
        ("llama.cpp", kl, perplexity, "--blue"),
        ("from simulation<br>to llama.cpp", proof["simulated_to_runtime_kl"], None, "--orange"),
        ("from 8-bit simulation<br>to llama.cpp", proof.get("eight_bit_to_runtime_kl"), None, "--orange"),
    ]
    rows = [row for row in known if row[1] is not None]
    values = [row[1] for row in rows]
    trace = bars([row[0] for row in rows], values, list(map(kl_text, values)), [row[3] for row in rows])
    figure = Figure("KL simulated and by llama.cpp", [trace], bars_layout(KL, values), 70 + 52 * len(rows))
    nearest = proof.get("eight_bit_to_runtime_kl") or proof["simulated_to_runtime_kl"]
    share = f", {100 * nearest / kl:.1f}\u00a0% of the file's" if kl > 0 else ""
    says = [
        f"What was scored, and what llama.cpp computes of the same file, on {proof['tokens']:,} tokens of test text: "
        f"from the one to the other KL is {kl_text(nearest)}{share}."
    ]
    table = [
        ("full precision", *figures_text(None, figures["base_perplexity"]["value"])),
        *((name.replace("<br>", " "), *figures_text(kl, perplexity)) for name, kl, perplexity, _ in rows),
    ]
    return Section(
        "agreement", "Simulated against llama.cpp", says, figure, Table(("", "KL", "perplexity"), table), half=True
    )


def runtime_points(proof: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str, str, int]]:
    """Return name, figures, colour, symbol and its size of the files that llama.cpp has run."""
    if not proof:
        return []
    mix = proof.get("mix")
    found: list[tuple[str, Mapping[str, Any], str, str, int]] = [
        ("this file by llama.cpp", by_llamacpp(proof), "--orange", "star-open", 16)
    ]
    return [*found, (f"llama.cpp's own {mix['mix']}", by_llamacpp(mix), "--green", "triangle-up", 12)] if mix else found


def by_llamacpp(proved: Mapping[str, Any]) -> dict[str, Any]:
    """Return bytes, KL and perplexity of a proof, or of the mix beside it, as a row of the closing table has them."""
    figures = proved["figures"]
    row = {"kl": figures["mean_kl"]["value"], "perplexity": figures["perplexity"]["value"]}
    return {"file_bytes": proved["file_bytes"], **row}


def cells(view: RunView, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return size, bits per weight, KL and perplexity of a file as cells of a table."""
    weights = view.record.get("weights")
    bits = row.get("bits_per_weight") or (8 * row["file_bytes"] / weights if weights else None)
    shown = "" if bits is None else f"{bits:.3f}"
    return megabytes(row["file_bytes"]), shown, *figures_text(row["kl"], row["perplexity"])
