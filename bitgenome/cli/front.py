"""Defines ``bitgenome export`` and ``front``: the file of a finished run again, or of another size, and all sizes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bitgenome.cli.quantize import (
    CONTEXT,
    Bits,
    Context,
    DeviceMemory,
    Kv,
    Like,
    Margin,
    Mmproj,
    Size,
    check_output,
    copy,
    wanted_size,
)
from bitgenome.cli.terminal import RUNS, AsJson, Overrides, RunPath, Storage, console, errors, print_json, say
from bitgenome.common.errors import UserError
from bitgenome.observe.progress import tracked, tracker

if TYPE_CHECKING:
    from bitgenome.front.sizes import Front
    from bitgenome.quantize.size import WantedSize


def export(
    run: RunPath,
    storage: Storage = RUNS,
    size: Size = None,
    bits: Bits = None,
    like: Like = None,
    device_memory: DeviceMemory = None,
    context: Context = CONTEXT,
    kv: Kv = "f16",
    mmproj: Mmproj = None,
    margin: Margin = "1GiB",
    heal: Annotated[bool, typer.Option("--heal", help="Of another size: tune norms and block scales anew")] = False,
    name: Annotated[
        str | None, typer.Option(help="Of another size: name of its run; RUN-SIZE by default", show_default=False)
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also copy the file here", show_default=False)
    ] = None,
    split_max_size: Annotated[
        str | None, typer.Option(help="Also in llama.cpp's shards, whose tensors take at most this, such as 4GB")
    ] = None,
    split_max_tensors: Annotated[int | None, typer.Option(min=1, help="Also in shards of at most as many")] = None,
) -> None:
    """Write the file of a finished run again, or with a size the best file of that size.

    Another size takes minutes: bank, sensitivities and evaluations are those of the run, which stays as it is. The
    result is a run beside it. bitgenome front lists all sizes.

    Examples:

    bitgenome export mine

    bitgenome export mine --size 3.5GB --heal -o mine-small.gguf

    bitgenome export mine --device-memory 8GiB --context 32768
    """
    from bitgenome.config.export import shard_size  # noqa: PLC0415 - here and below: imported when called
    from bitgenome.run.export import export_again, write_shards  # noqa: PLC0415
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415
    from exporters.files.splits import Shards  # noqa: PLC0415

    try:
        shards = Shards(shard_size(split_max_size) if split_max_size else None, split_max_tensors)
    except ValueError as error:
        raise UserError(f"--split-max-size: {error}") from None
    location = run_location(run, storage)
    check_output(output)
    if all(given is None for given in (size, bits, like, device_memory)):
        if heal or name or overrides:
            raise UserError("expected a size, such as --size 3.5GB, with --heal, --name and --set, found none")
        gguf = tracked(tracker(console), "exporting", lambda: export_again(location, shards))
        for what, path in (("GGUF", f"{location}/{gguf.name}"), ("recipe", f"{location}/recipe.txt")):
            console.print(f"{what:>6}  {path}", soft_wrap=True)
    else:
        wanted = wanted_size(size, bits, like, device_memory, context, kv, mmproj, margin)
        gguf = export_size(location, wanted, heal, name, overrides or [])
        if shards.wanted:
            write_shards(gguf, shards)
    if output:
        copy(gguf, output)
        console.print(f"wrote {output}", soft_wrap=True)


def export_size(location: str, wanted: "WantedSize", heal: bool, name: str | None, overrides: list[str]) -> Path:
    """Make and show the file of another size, and return its path."""
    from bitgenome.cli.tables import show_outcome  # noqa: PLC0415
    from bitgenome.front.budgets import export_budget  # noqa: PLC0415
    from workers.storage.folders import is_url  # noqa: PLC0415

    try:
        outcome = export_budget(location, wanted, console, heal=heal, name=name, overrides=overrides)
    except KeyboardInterrupt:
        errors.print("interrupted; nothing is lost: the same command goes on", soft_wrap=True)
        raise typer.Exit(130) from None
    show_outcome(outcome, console)
    if is_url(location):
        console.print(f"stored  {location.rpartition('/')[0]}/{outcome.run.name}", soft_wrap=True, highlight=False)
    return outcome.gguf


def front(
    run: RunPath,
    storage: Storage = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show what every size of a finished run's model would give, from its sensitivities and what it has measured."""
    from bitgenome.front.sizes import front_of  # noqa: PLC0415
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415

    location = run_location(run, storage)
    found = front_of(location)
    if as_json:
        print_json(found)
    else:
        show_front(found, location)


def show_front(found: "Front", location: str) -> None:
    """Show the sizes as a table, and the command that makes one of them."""
    table = Table(title=f"Best file of each size, by what {found.run} knows", title_justify="left")
    for column in ("size", "bits/weight", "KL", "", "which"):
        table.add_column(column, justify="left" if column in ("", "which") else "right")
    for size in found.sizes:
        table.add_row(
            f"{size.file_bytes / 1e6:,.3f} MB",
            f"{size.bits_per_weight:.3f}",
            f"{size.kl:.5f}",
            "measured" if size.measured else "predicted",
            "\n".join(size.notes),
            style="bold" if size.measured else "",
        )
    console.print(table)
    say(
        console,
        "KL in nats per token on test text, before healing. Measured: this very genome, by simulation. Predicted: from "
        f"sensitivities, calibrated on {found.calibrated_on} measured genomes.",
    )
    console.print(
        f"To make one: bitgenome export {location} --bits 3.2, or --size 3.5GB, --like Q4_K_M", soft_wrap=True
    )
