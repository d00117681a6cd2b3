"""Defines what the commands share: consoles, sentences and JSON on them, and arguments that several of them take."""

import json
import re
import textwrap
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration; - reads standard input", show_default=False)]
RUN_ARGUMENT = typer.Argument(help="A run directory or its URL, or a run's name under --storage", show_default=False)
RunPath = Annotated[str, RUN_ARGUMENT]
Storage = Annotated[str, typer.Option(help="Where named runs lie: a folder or URL")]
RUNS = "runs"  # the default of --storage, and of storage_path in a configuration
AsJson = Annotated[bool, typer.Option("--json", help="JSON, an object a line")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: search.generations=20")]

UNIT = re.compile(r"(?<=[\d)]) (?=(?:%|±|GB|MB|KL|GiB|MiB|bytes|bits|s|min|h|tokens|windows?)(?![\w.]))|(?<=±) ")
KEPT = "\u00a0"  # a space at which textwrap does not break a line


def say(to: Console, sentence: str, style: str = "") -> None:
    """Print ``sentence`` in lines of the console's width; a number and its unit stay together, paths stay whole."""
    lines = textwrap.wrap(UNIT.sub(KEPT, sentence), to.width, break_long_words=False, break_on_hyphens=False)
    text = "\n".join(lines).replace(KEPT, " ")
    to.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(found: Any) -> None:
    """Print ``found`` as one line of JSON on standard output; a number that JSON does not have is null.

    Dataclasses become objects, paths strings, sets and tuples arrays.
    """
    typer.echo(json.dumps(jsonable(found), ensure_ascii=False, allow_nan=False))


def jsonable(found: Any) -> Any:
    """Return ``found`` in the types of JSON."""
    if is_dataclass(found) and not isinstance(found, type):
        return jsonable(asdict(found))
    if isinstance(found, dict):
        return {str(key): jsonable(value) for key, value in found.items()}
    if isinstance(found, list | tuple | set | frozenset):
        return [jsonable(value) for value in found]
    if isinstance(found, float):
        return found if isfinite(found) else None
    return found if found is None or isinstance(found, bool | int | str) else str(found)
