"""Defines ``bitgenome publish``, which brings a run's file and its model card to a Hugging Face hub."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bitgenome.cli.terminal import RUNS, RunPath, Storage, console
from bitgenome.common.errors import UserError

if TYPE_CHECKING:
    from bitgenome.publish.facts import Facts
    from bitgenome.publish.hub import Hub

CARD = "README.md"


def publish(
    run: RunPath,
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="USER/NAME on the hub", show_default=False)],
    storage: Storage = RUNS,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made now is private")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the model, where the run does not know it", show_default=False)
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="Its licence, where its card is not at hand", show_default=False)
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="A model card of your own instead of the generated one", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show card and files, and send nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
) -> None:
    """Publish a finished run's file on Hugging Face, with a model card, the recipe and the importance matrix."""
    from contextlib import nullcontext  # noqa: PLC0415 - here and below: imported when called

    from bitgenome.publish.facts import facts_of  # noqa: PLC0415
    from bitgenome.publish.hub import Hub  # noqa: PLC0415
    from bitgenome.storage.run_directory import RunDirectory  # noqa: PLC0415
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415

    directory = RunDirectory.open(run_location(run, storage))
    hub = Hub()
    if card and not card.is_file():
        raise UserError(f"expected a model card, found no file at {card}")
    if not dry_run:
        hub.check(repository)
        if not yes and not sys.stdin.isatty():
            raise UserError("expected --yes or --dry-run where nobody can be asked, found neither")
    with directory.own() if directory.mirror else nullcontext():
        facts = with_base(facts_of(directory), hub, base_model, license_name)
        text = card.read_bytes() if card else card_of(facts, repository)
        files: dict[str, Path | bytes] = {CARD: text, **facts.files}
        if dry_run:
            console.out(text.decode("utf-8", "replace"), highlight=False)
        there = None if dry_run else hub.files(repository)
        show_files(files, there or set())
        if not facts.base.license and not card:
            console.print("the card names no licence: none is in the model's README.md or config.json (--license NAME)")
        if dry_run:
            console.print(f"would publish to {hub.endpoint}/{repository}", soft_wrap=True)
            return
        kind = "existing" if there is not None else "new private" if private else "new public"
        if not yes:
            typer.confirm(f"Publish to the {kind} repository {repository}?", abort=True)
        console.print(f"sending to the {kind} repository {repository}", soft_wrap=True)
        url = hub.publish(repository, files, private, f"{facts.file}, by bitgenome")
    console.print(f"published {url}", soft_wrap=True)


def with_base(facts: "Facts", hub: "Hub", base_model: str | None, license_name: str | None) -> "Facts":
    """Return ``facts`` with what the user says of the base model, and what the hub does where the folder does not."""
    from dataclasses import replace  # noqa: PLC0415

    from bitgenome.publish.base import ABOUT_KEYS, HUB_ID  # noqa: PLC0415

    base = facts.base
    if base_model and not HUB_ID.fullmatch(base_model):
        raise UserError(f"expected --base-model as USER/NAME, found {base_model!r}")
    if base_model:
        base = replace(base, hub_id=base_model, name=base_model.partition("/")[2])
    about = dict(base.about)
    if license_name:
        about |= {"license": license_name}
    elif base.hub_id and "license" not in about:
        found = hub.about(base.hub_id)
        about |= {key: found[key] for key in ABOUT_KEYS if found.get(key)}
    return replace(facts, base=replace(base, about=about))


def card_of(facts: "Facts", repository: str) -> bytes:
    """Return the generated card."""
    from importlib.metadata import version  # noqa: PLC0415

    from bitgenome.publish.card import model_card  # noqa: PLC0415

    return model_card(facts, repository, version("bitgenome")).encode()


def show_files(files: dict[str, Path | bytes], there: set[str]) -> None:
    """Show which files would be sent, their sizes, and which of them are there already."""
    from bitgenome.cli.tables import megabytes  # noqa: PLC0415

    table = Table()
    for column in ("file", "size", *([""] if there else [])):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for name, file in files.items():
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        table.add_row(name, megabytes(size), *(["replaces the one there"] if name in there else []))
    console.print(table)
