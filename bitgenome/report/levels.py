"""Makes the figures of which type each tensor got, beside what each tensor costs."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any

from bitgenome.report.names import MEASURES, bits_of, kl_text
from bitgenome.report.page import Figure, Section, Table
from bitgenome.report.source import RunView, Sensitivities
from bitgenome.report.traces import BITS, LOSS, heat_map, map_layout
from search.gene_groups import BLOCK

LAYER = re.compile(r"\.(\d+)$")
MOST_LABELLED = 32  # layers whose cells hold the name of their type, where there is room


@dataclass(frozen=True)
class Tensor:
    """Holds one tensor's place in the model, its type, and its costs by type, from the smallest on."""

    name: str
    layer: int | None  # None outside the blocks
    kind: str
    type_name: str
    costs: Sequence[tuple[str, float]]

    @property
    def lowest(self) -> float | None:
        """What the tensor costs alone at the smallest of its types, in nats per token."""
        return self.costs[0][1] if self.costs else None

    @property
    def chosen(self) -> float | None:
        """What it costs alone at the type that it got."""
        return dict(self.costs).get(self.type_name)


def tensors_of(view: RunView) -> list[Tensor]:
    """Return the searched tensors, in the order of the model, with the types of the winner, "" while there is none."""
    costs = view.sensitivities.costs if view.sensitivities else {}  # by gene, which may be of several tensors
    found = []
    for name, type_name in (view.best.get("formats") or dict.fromkeys(costs, "")).items():
        match = BLOCK.match(name)
        layer = int(LAYER.search(match[1])[1]) if match else None  # type: ignore[index]
        kind = match[2].removesuffix(".weight") if match else name.removesuffix(".weight")
        found.append(Tensor(name, layer, kind, type_name, costs.get(name, ())))
    short = short_names(list(dict.fromkeys(one.kind for one in found)))
    return [replace(one, kind=short[one.kind]) for one in found]


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """Return for each kind the shortest ending of its dotted name that no other kind has."""
    endings = {kind: [kind.split(".", n)[-1] for n in range(kind.count(".") + 1)][::-1] for kind in kinds}
    counts = Counter(ending for found in endings.values() for ending in found)
    return {kind: next((one for one in found if counts[one] == 1), kind) for kind, found in endings.items()}


def type_map(view: RunView) -> Section | None:
    """Show the bits of each tensor by layer and kind."""
    tensors = tensors_of(view)
    blocks = [one for one in tensors if one.layer is not None]
    if not blocks or not view.best:
        return None
    layers, kinds = axes(blocks)
    names = grid(blocks, lambda one: one.type_name)
    trace = heat_map(layers, kinds, grid(blocks, lambda one: bits_of(one.type_name)), BITS, "bits")
    trace |= {"customdata": names, "text": names}
    trace["hovertemplate"] = "layer %{x}, %{y}<br>%{text}, %{z} bits per weight<extra></extra>"
    if len(layers) <= MOST_LABELLED:
        trace |= {"texttemplate": "%{text}", "textfont": {"size": 12, "weight": 600}}
    outside = ", ".join(f"{one.kind} {one.type_name}" for one in tensors if one.layer is None)
    says = [
        "The type that each tensor got: the stronger the colour, the more bits."
        + (f" Outside the layers: {outside}." if outside else "")
    ]
    figure = Figure(f"Type of {len(blocks)} tensors by layer and kind", [trace], map_layout(), map_height(kinds))
    return Section("types", "Bits by layer and kind", says, figure, table_of(tensors, view.sensitivities))


def cost_map(view: RunView) -> Section | None:
    """Show what each tensor costs alone at its smallest type, by layer and kind."""
    blocks = [one for one in tensors_of(view) if one.layer is not None and one.lowest is not None]
    cells = grid(blocks, lambda one: one.lowest) if blocks else []
    positive = [value for row in cells for value in row if value is not None and value > 0]
    if view.sensitivities is None or not positive:
        return None
    layers, kinds = axes(blocks)
    least = min(positive)
    logs = [[None if value is None else log10(max(value, least)) for value in row] for row in cells]
    trace = heat_map(layers, kinds, logs, LOSS, "KL")
    ticks = [n for n in range(-12, 4) if log10(least) <= n <= log10(max(positive))]
    if ticks:
        trace["colorbar"] |= {"tickvals": ticks, "ticktext": [f"{10.0**n:g}" for n in ticks]}
    else:
        trace["colorbar"] |= {"tickvals": [log10(least)], "ticktext": [f"{least:.1g}"]}
    trace |= {"customdata": cells, "text": grid(blocks, lambda one: one.costs[0][0])}
    trace["hovertemplate"] = "layer %{x}, %{y}<br>at %{text} alone KL %{customdata}<extra></extra>"
    says = [
        "What each tensor costs at its smallest type alone: the stronger the colour, the more, on a scale of powers of "
        f"ten ({MEASURES[view.sensitivities.measure]})."
    ]
    ranked = sorted(blocks, key=lambda one: -(one.lowest or 0.0))
    rows = [(one.name, one.costs[0][0], kl_text(one.lowest or 0.0)) for one in ranked]
    figure = Figure(f"Sensitivity of {len(blocks)} tensors by layer and kind", [trace], map_layout(), map_height(kinds))
    table = Table(("tensor, the most sensitive first", "type", "KL alone"), rows, words=2)
    return Section("sensitivity", "Sensitivity by layer and kind", says, figure, table)


def types_by_kind(view: RunView) -> Section | None:
    """Show how often each kind of tensor got each type."""
    tensors = tensors_of(view)
    if not tensors or not view.best:
        return None
    kinds = list(dict.fromkeys(one.kind for one in tensors))[::-1]
    counts = {kind: Counter(one.type_name for one in tensors if one.kind == kind) for kind in kinds}
    types = sorted({one.type_name for one in tensors}, key=lambda name: (bits_of(name) or 0, name))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": kinds,
            "x": [counts[kind][name] / counts[kind].total() for kind in kinds],
            "text": [name if counts[kind][name] else "" for kind in kinds],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "customdata": [counts[kind][name] for kind in kinds],
            "marker": {"color": f"--bits {n / max(1, len(types) - 1):.3f}", "line": {"color": "--page", "width": 1.5}},
            "hovertemplate": f"%{{y}}<br>{name}: %{{customdata}} tensors<extra></extra>",
        }
        for n, name in enumerate(types)
    ]
    rows = [
        (kind, mean_bits(kind, tensors), *(str(counts[kind][name] or "") for name in types)) for kind in kinds[::-1]
    ]
    layout = {
        "barmode": "stack",
        "xaxis": {"tickformat": ".0%", "title": {"text": "share of the kind's tensors"}, "range": [0, 1]},
        "yaxis": {"showgrid": False},
        "bargap": 0.25,
        "showlegend": True,
        "uniformtext": {"minsize": 9, "mode": "hide"},
    }
    figure = Figure("Shares of types by kind of tensor", traces, layout, 100 + 34 * len(kinds))
    table = Table(("kind", "bits, mean over tensors", *types), rows)
    says = ["Which types the tensors of each kind got, over all layers: the stronger the colour, the more bits."]
    return Section("kinds", "Bits by kind", says, figure, table, half=True)


def mean_bits(kind: str, tensors: Sequence[Tensor]) -> str:
    """Return the mean bits per weight of the tensors of a kind as text."""
    found = [bits for one in tensors if one.kind == kind and (bits := bits_of(one.type_name)) is not None]
    return f"{sum(found) / len(found):.2f}" if found else ""


def table_of(tensors: Sequence[Tensor], known: Sensitivities | None) -> Table:
    """Return a row for each tensor."""
    columns: tuple[str, ...] = ("tensor", "type", "bits")
    rows = [(one.name, one.type_name, number(bits_of(one.type_name), "{:.4g}".format)) for one in tensors]
    if known is None:
        return Table(columns, rows, words=2)
    with_costs = [(*row, number(one.chosen, kl_text)) for row, one in zip(rows, tensors, strict=True)]
    return Table((*columns, "KL alone at this type"), with_costs, words=2)


def number(value: float | None, text: Callable[[float], str]) -> str:
    """Return ``text`` of a value, "" where it is not known."""
    return "" if value is None else text(value)


def axes(blocks: Sequence[Tensor]) -> tuple[list[str], list[str]]:
    """Return layers from left to right and kinds from the bottom up, the first at the top."""
    layers = [str(layer) for layer in range(max(one.layer or 0 for one in blocks) + 1)]
    return layers, list(dict.fromkeys(one.kind for one in blocks))[::-1]


def grid(blocks: Sequence[Tensor], value: Callable[[Tensor], Any]) -> list[list[Any]]:
    """Return ``value`` of the tensor in each place, kinds by layers as in ``axes``; None where there is none."""
    layers, kinds = axes(blocks)
    places = {(one.kind, str(one.layer)): value(one) for one in blocks}
    return [[places.get((kind, layer)) for layer in layers] for kind in kinds]


def map_height(kinds: Sequence[str]) -> int:
    """Return the height of a map in pixels."""
    return max(240, 80 + 34 * len(kinds))
