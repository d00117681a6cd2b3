"""Traces of plotly.js that several figures are made of, and what their layouts share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitgenome.report.names import plain

KL = "KL, nats per token"
ROOM = 1.35  # of the longest bar and its text
BITS = ["--few", "--some", "--many"]
LOSS = ["--cool", "--warm", "--hot"]


def points(
    name: str, rows: Sequence[Mapping[str, Any]], color: str, symbol: str, size: int = 9, text: Sequence[Any] = ()
) -> dict[str, Any]:
    """Return files as points of KL against MB.

    ``rows`` have ``file_bytes``, ``kl`` and maybe a ``name``. With ``text`` beside them they are joined by a line.
    """
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if text else "markers",
        "name": name,
        "x": [row["file_bytes"] / 1e6 for row in rows],
        "y": [row["kl"] for row in rows],
        "text": list(text),
        "textposition": "top right",
        "textfont": {"color": "--soft"},
        "cliponaxis": False,
        "line": {"color": color, "width": 1.5, "dash": "dot"},
        "marker": {"color": color, "symbol": symbol, "size": size, "line": {"width": 2, "color": color}},
        "customdata": [plain(row.get("name", name)) for row in rows],
        "hovertemplate": "%{customdata}<br>%{x:.3f} MB, KL %{y}<extra></extra>",
    }


def bars(
    names: Sequence[str], values: Sequence[float], text: Sequence[str], color: str | Sequence[str]
) -> dict[str, Any]:
    """Return horizontal bars, the first at the top, with their values as ``text``."""
    colors = color if isinstance(color, str) else list(color)[::-1]
    return {
        "type": "bar",
        "orientation": "h",
        "x": list(values)[::-1],
        "y": list(names)[::-1],
        "text": list(text)[::-1],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": colors},
        "hovertemplate": "%{y}<br>%{text}<extra></extra>",
    }


def bars_layout(title: str, values: Iterable[float], **more: Any) -> dict[str, Any]:
    """Return the layout of horizontal bars of ``values``, from zero on, with room for the text behind them."""
    axis = {"title": {"text": title}, "range": [0, ROOM * max(values)]}
    return {"xaxis": axis, "yaxis": {"showgrid": False}, "bargap": 0.3, **more}


def heat_map(
    columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[Any]], colors: Sequence[str], scale: str
) -> dict[str, Any]:
    """Return a map of ``cells``, one list for each of ``rows``, from the bottom up; ``scale`` names what they are."""
    return {
        "type": "heatmap",
        "x": list(columns),
        "y": list(rows),
        "z": cells,
        "xgap": 2,
        "ygap": 2,
        "hoverongaps": False,
        "colorscale": [[n / (len(colors) - 1), color] for n, color in enumerate(colors)],
        "colorbar": {
            "title": {"text": scale, "font": {"size": 13, "color": "--soft"}},
            "thickness": 12,
            "outlinewidth": 0,
            "tickfont": {"color": "--soft"},
        },
    }


def map_layout() -> dict[str, Any]:
    """Return the layout of a map by layer and kind."""
    axis = {"type": "category", "showgrid": False}
    return {"xaxis": {**axis, "title": {"text": "layer"}, "tickangle": 0}, "yaxis": axis}
