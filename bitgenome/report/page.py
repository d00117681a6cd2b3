"""Puts sections of words, figures and tables into one HTML page that loads nothing from elsewhere.

Figures are plotly's: traces and a layout as plain dictionaries, drawn by plotly.js, which the page holds once. Colours
are names of the style sheet's variables ("--blue"), so that a figure changes with the page between light and dark. The
plotly package is only asked where its plotly.js lies: to import it takes longer than to write a page.
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bitgenome.common.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
DIGITS = 6  # significant, of the numbers of figures


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads elsewhere."""

    text: str
    href: str  # relative to the page


@dataclass(frozen=True)
class Table:
    """Holds a table of text, of which all but the first ``words`` columns are numbers."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str | Link]]
    words: int = 1
    marked: frozenset[int] = frozenset()  # rows to be seen first


@dataclass(frozen=True)
class Figure:
    """Holds what plotly.js draws. ``label`` says for those who do not see it what it shows."""

    label: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    height: int = 320  # pixels


@dataclass(frozen=True)
class Section:
    """Holds a heading, what it says, and what stands below it; ``name`` is its anchor, unique on the page."""

    name: str
    heading: str
    says: Sequence[str] = ()  # paragraphs
    figure: Figure | None = None
    table: Table | None = None  # of the figure's numbers; folded away where there is a figure
    text: str | None = None  # shown as it is, such as YAML; folded away
    half: bool = False  # two such sections stand side by side where there is room


@dataclass(frozen=True)
class Tile:
    """Holds one number of the headline: ``value`` exactly, ``shown`` for people."""

    label: str
    value: float | int
    shown: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """Holds all that a page shows."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = ()
    says: Sequence[str] = ()  # the headline's sentences, the most important first
    commands: Sequence[str] = ()
    state: str = ""  # of a run that is not finished
    progress: float | None = None  # from 0 to 1


def render(page: Page, live: str = "") -> str:
    """Return the page as HTML. ``live`` is the address of its ``fresh`` parts, of a page that renews itself."""
    template = environment().get_template("page.html")
    return template.render(
        page=page, live=live, plotly=plotly_js(), figures=as_json(figures_of(page)), main=main_of(page)
    )


def fresh(page: Page) -> str:
    """Return as JSON what a live page asks for: its title, its main part as HTML, and its figures."""
    return as_json({"title": page.title, "main": main_of(page), "figures": figures_of(page)})


def main_of(page: Page) -> str:
    """Return the page's main part as HTML."""
    return environment().get_template("main.html").render(page=page)


def figures_of(page: Page) -> dict[str, Any]:
    """Return what plotly.js draws, by the section's name."""
    return {
        section.name: {"data": section.figure.traces, "layout": section.figure.layout}
        for section in page.sections
        if section.figure
    }


def as_json(value: Any) -> str:
    """Return strict JSON that may stand within a script element, with numbers of DIGITS digits."""
    return json.dumps(rounded(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def rounded(value: Any) -> Any:
    """Return ``value`` with floats of DIGITS digits, and null for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(one) for one in value]
    return value


@cache
def environment() -> Environment:
    """Return the templates of this room."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.globals["style"] = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    found.globals["script"] = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    return found


@cache
def plotly_js() -> str:
    """Return plotly.js, minified, from the plotly package, without importing it. Raises UserError if it is missing."""
    found = importlib.util.find_spec("plotly")
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / "package_data" / "plotly.min.js"
        if file.is_file():
            return file.read_text(encoding="utf-8").replace("</script", "<\\/script")
    raise UserError("expected plotly.js in the plotly package, found none: pip install plotly")
