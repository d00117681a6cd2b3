"""The command ``verify``: a file's figures in llama.cpp, beside its run's simulation or beside another file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bitgenome.cli.terminal import RUNS, AsJson, Storage, console, print_json, say
from bitgenome.common.errors import UserError
from bitgenome.observe.progress import tracked, tracker

if TYPE_CHECKING:
    from bitgenome.run.verify import Beside

WINDOW, TOKENS = 512, 16384  # as llama-perplexity's context, and as text.tokens.test


def verify(
    file: Annotated[str, typer.Argument(help="A run, or a GGUF file in its directory or URL", show_default=False)],
    run: Annotated[str | None, typer.Option(help="The file's run, if the file has left its directory")] = None,
    storage: Storage = RUNS,
    base: Annotated[
        Path | None, typer.Option(help="Measure FILE beside this GGUF file; no run is needed", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="With --base: a UTF-8 text; else held-out Python code", show_default=False)
    ] = None,
    window: Annotated[int | None, typer.Option(min=16, help=f"With --base: tokens of a window; {WINDOW}")] = None,
    tokens: Annotated[int | None, typer.Option(min=16, help=f"With --base: tokens at most; {TOKENS}")] = None,
    scored: Annotated[
        Literal["half", "all"] | None,
        typer.Option(help="With --base: half, the second half of each window as llama-perplexity does, or all"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a run's file is as it was shipped, and measure it in llama.cpp beside the simulated figures.

    With --base, measure any GGUF file beside another of the same vocabulary, such as its original.
    """
    from bitgenome.cli.tables import show_figures, show_proof  # noqa: PLC0415
    from bitgenome.run.verify import verify_beside, verify_file  # noqa: PLC0415
    from bitgenome.storage.run_names import run_and_file  # noqa: PLC0415

    if base is None:
        given = {"--text": text, "--window": window, "--tokens": tokens, "--scored": scored}
        if named := [name for name, value in given.items() if value is not None]:
            raise UserError(f"expected {named[0]} with --base, found a run, which is measured on its own test text")
        location, gguf = run_and_file(file, storage, run)
        proof = tracked(tracker(console), "measuring", lambda: verify_file(gguf, location))
        if as_json:
            print_json(proof)
        else:
            show_proof(proof, console)
            show_figures(proof.figures, console)
        return
    if run is not None:
        raise UserError("expected --run or --base, found both: with --base no run is needed")
    path, length = Path(file).expanduser(), window or WINDOW

    def measure() -> "Beside":
        return verify_beside(base.expanduser(), path, text, length, tokens or TOKENS, scored == "all")

    found = tracked(tracker(console), "measuring", measure)
    if as_json:
        print_json(found)
        return
    figures = found.figures
    say(
        console,
        f"{found.file} ({found.file_bytes:,} bytes) beside {found.base} ({found.base_bytes:,} bytes): "
        f"{figures.positions:,} positions of {figures.windows:,} windows of {length:,} tokens, {found.text}",
    )
    show_figures(figures, console)
