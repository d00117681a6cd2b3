"""Defines ``bitgenome report`` and ``bitgenome watch``: what a run has come to, as a page."""

from typing import Annotated

import typer

from bitgenome.cli.terminal import RUNS, RunPath, Storage, console

PORT = 8270


def report(run: RunPath, storage: Storage = RUNS) -> None:
    """Write a run's report.html again: one page with all figures, that needs no network."""
    from bitgenome.report.run_page import write_report  # noqa: PLC0415 - imported when called
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415

    console.print(f"wrote {write_report(run_location(run, storage))}", soft_wrap=True, markup=False)


def watch(
    run: RunPath,
    storage: Storage = RUNS,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On this machine; 0 takes a free one")] = PORT,
) -> None:
    """Serve a run's report on this machine while the run runs; the page renews itself. Ctrl-C ends it."""
    from bitgenome.report.watch import server_of  # noqa: PLC0415
    from bitgenome.storage.run_names import run_location  # noqa: PLC0415

    with server_of(run_location(run, storage), port) as server:
        console.print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", soft_wrap=True, markup=False)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("ended; this page alone: a run goes on")
