"""Defines what the commands share: consoles, sentences and JSON on them, and arguments that several of them take."""

import json
import re
import textwrap
from dataclasses import asdict, is_dataclass
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitgenome.common import layout

console = Console(highlight=False)
errors = Console(stderr=True)

RUNS = "runs"  # the default of --storage, and of storage_path in a configuration


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the runs below --storage whose names begin so, for a shell to complete."""
    storage = Path(ctx.params.get("storage") or RUNS).expanduser()
    names = sorted(file.parent.name for file in storage.glob(f"*/{layout.RECORD}")) if storage.is_dir() else []
    return [name for name in names if name.startswith(incomplete)]


def config_files(incomplete: str) -> list[str]:
    """Return the folders and YAML files whose paths begin so, for a shell to complete."""
    folder, _, start = incomplete.rpartition("/")
    place = Path(folder or ("/" if incomplete.startswith("/") else ".")).expanduser()
    prefix = incomplete[: len(incomplete) - len(start)]
    found = sorted(place.glob("*")) if place.is_dir() else []
    kept = [path for path in found if path.name.startswith(start) and not path.name.startswith(".")]
    folders = [f"{prefix}{path.name}/" for path in kept if path.is_dir()]
    return [f"{prefix}{path.name}" for path in kept if path.suffix in (".yaml", ".yml")] + folders


ConfigFile = Annotated[
    Path,
    typer.Argument(help="YAML configuration; - reads standard input", show_default=False, autocompletion=config_files),
]
RUN_ARGUMENT = typer.Argument(
    help="A run directory or its URL, or a run's name under --storage", show_default=False, autocompletion=run_names
)
RunPath = Annotated[str, RUN_ARGUMENT]
Storage = Annotated[str, typer.Option(help="Where named runs lie: a folder or URL")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, an object a line")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: search.generations=20")]

UNIT = re.compile(r"(?<=[\d)]) (?=(?:%|±|GB|MB|KL|GiB|MiB|bytes|bits|s|min|h|tokens|windows?)(?![\w.]))|(?<=±) ")
KEPT = "\u00a0"  # a space at which textwrap does not break a line


def say(to: Console, sentence: str, style: str = "", indent: str = "") -> None:
    """Print ``sentence`` in lines of the console's width; a number and its unit stay together, paths stay whole.

    ``indent`` stands before the first line already, and is put before the others.
    """
    width = to.width - len(indent)
    lines = textwrap.wrap(UNIT.sub(KEPT, sentence), width, break_long_words=False, break_on_hyphens=False)
    text = f"\n{indent}".join(lines).replace(KEPT, " ")
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
    if isinstance(found, Integral) and not isinstance(found, bool):  # numpy's too
        return int(found)
    if isinstance(found, Real) and not isinstance(found, bool):
        return float(found) if isfinite(found) else None
    return found if found is None or isinstance(found, bool | str) else str(found)
