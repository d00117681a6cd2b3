"""The command ``convert``: a template by llama.cpp's converter."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bitgenome.cli.terminal import console
from bitgenome.common.errors import UserError
from bitgenome.observe.progress import tracked, tracker


def convert(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or id", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; MODEL-OUTTYPE.gguf by default", show_default=False)
    ] = None,
    outtype: Annotated[Literal["bf16", "f16", "f32"], typer.Option(help="Type of the weights")] = "bf16",
    converter: Annotated[
        Path | None,
        typer.Option(
            envvar="BITGENOME_CONVERTER", help="llama.cpp's convert_hf_to_gguf.py, or its folder", show_default=False
        ),
    ] = None,
) -> None:
    """Make a template for a run: the model as a GGUF file, by llama.cpp's converter."""
    from evaluators.model.folder import ModelFolder, is_gguf, resolve_model  # noqa: PLC0415
    from exporters.runtime import converter as converters  # noqa: PLC0415

    if is_gguf(model):
        raise UserError(
            f"expected a Hugging Face folder or id, found {model}: a GGUF model in floats is its own template"
        )
    script = converters.find_converter(converter)
    folder = ModelFolder(resolve_model(model))
    path = output or Path(f"{folder.name}-{outtype}.gguf")
    if not path.absolute().parent.is_dir():
        raise UserError(f"expected a folder for the file, found none at {path.absolute().parent}")
    tracked(
        tracker(console), f"converting {folder.name}", lambda: converters.convert(script, folder.path, path, outtype)
    )
    console.print(f"wrote {path}; in the configuration of a run: template: {path}", soft_wrap=True)
