"""Defines ``bitgenome batch``, which runs several searches at once."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitgenome.cli.terminal import Overrides, console, errors
from bitgenome.common.errors import UserError

if TYPE_CHECKING:
    from bitgenome.batch.batch import BatchOrder


def batch(
    configs: Annotated[list[Path], typer.Argument(help="YAML files of a run each, or with a matrix of runs")],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Of the batch; by default its file's, or its files' folder's")
    ] = None,
    most: Annotated[int | None, typer.Option("--max-parallel", min=1, help="Runs at a time")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a batch; what is finished stays")] = False,
) -> None:
    """Run several searches on one cluster: they share banks, sensitivities and workers, and end in one table."""
    from bitgenome.batch.batch import BatchOrder, directory_of, run_batch  # noqa: PLC0415 - a fast start
    from bitgenome.batch.config import load_batch  # noqa: PLC0415
    from bitgenome.batch.results import show_results  # noqa: PLC0415

    called = name or batch_name(configs)
    order = BatchOrder(called, most, resume)
    try:
        runs = load_batch(configs, overrides or ())
        path, frame = run_batch(runs, order, console)
    except KeyboardInterrupt:
        again = continuation(configs, overrides or (), order)
        errors.print(f"interrupted; nothing is lost. Continue with: {again}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    show_results(frame, path, console)
    if runs[0].config.storage_url:
        console.print(f"stored  {directory_of(runs, called)[1]}", soft_wrap=True, highlight=False)
    failed = frame[frame.stage == "failed"].name.tolist()
    if failed:
        errors.print(f"{len(failed)} of {len(frame)} runs failed: {', '.join(failed)}", soft_wrap=True, markup=False)
        raise typer.Exit(1)


def continuation(configs: Sequence[Path], overrides: Sequence[str], order: "BatchOrder") -> str:
    """Return the shell command that continues a batch."""
    settings = [word for override in overrides for word in ("--set", override)]
    bound = [] if order.most is None else ["--max-parallel", str(order.most)]
    command = ["bitgenome", "batch", *map(str, configs), *settings, "--name", order.name, *bound, "--resume"]
    return shlex.join(command)


def batch_name(configs: list[Path]) -> str:
    """Return the default name of a batch: that of its only file, or of the directory of its files.

    Raises UserError if the files are in several directories.
    """
    if len(configs) == 1:
        return configs[0].stem
    folders = {path.absolute().parent for path in configs}
    if len(folders) > 1:
        raise UserError(f"expected --name for files of several folders, found {', '.join(map(str, sorted(folders)))}")
    return folders.pop().name
