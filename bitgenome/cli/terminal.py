"""Defines what the commands share: the consoles they write to, and arguments that several of them take."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration; - reads standard input", show_default=False)]
RUN_ARGUMENT = typer.Argument(help="A run directory or its URL, or a run's name under --storage", show_default=False)
RunPath = Annotated[str, RUN_ARGUMENT]
Storage = Annotated[str, typer.Option(help="Where named runs lie: a folder or URL")]
RUNS = "runs"  # the default of --storage, and of storage_path in a configuration
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: search.generations=20")]
