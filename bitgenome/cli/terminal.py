"""Defines what the commands share: the consoles they write to, and arguments that several of them take."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration; - reads standard input", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: search.generations=20")]
