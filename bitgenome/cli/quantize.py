"""The commands ``quantize`` and ``init``: a whole run, or its configuration, from a model and a size alone."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bitgenome.cli.terminal import RUNS, Overrides, Storage, console
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_text, replacing

if TYPE_CHECKING:  # imported when a command is called
    from bitgenome.config.run import RunConfig
    from bitgenome.quantize.begin import Beginning
    from bitgenome.quantize.request import Request
    from bitgenome.quantize.size import WantedSize

SIZES, DEVICE = "Size: one of these", "For a device"
TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
SECONDS = {"s": 1, "min": 60, "h": 3600}
STANDARD_OUTPUT = Path("-")
BITS_BY_DEFAULT = 4.5  # of `init`, where no size is given
CONTEXT = 4096  # tokens, where a device's memory is given without any

Model = Annotated[str, typer.Argument(help="A Hugging Face folder or id, or a GGUF file", show_default=False)]
Size = Annotated[str | None, typer.Option(help="Of the file: 4.5GB (10^9 bytes), 4GiB (2^30)", rich_help_panel=SIZES)]
Bits = Annotated[float | None, typer.Option(min=0.1, help="Per weight of the model", rich_help_panel=SIZES)]
Like = Annotated[
    str | None, typer.Option(help="The size of llama-quantize's file of this mix: Q4_K_M", rich_help_panel=SIZES)
]
DeviceMemory = Annotated[
    str | None, typer.Option(help="What fits a device of this memory: 16GiB", rich_help_panel=SIZES)
]
Context = Annotated[int, typer.Option(min=1, help="Tokens of keys and values on the device", rich_help_panel=DEVICE)]
Kv = Annotated[str, typer.Option(help="Type of keys and values, such as q8_0", rich_help_panel=DEVICE)]
Mmproj = Annotated[Path | None, typer.Option(help="Projector that lies there too", rich_help_panel=DEVICE)]
Margin = Annotated[str, typer.Option(help="Left free on the device", rich_help_panel=DEVICE)]
Text = Annotated[
    Path | None,
    typer.Option(help="Text to calibrate and judge by; .jsonl: conversations. By default the model writes it"),
]
Strategy = Annotated[
    Literal["genetic", "optuna", "exact", "random"] | None, typer.Option(help="Who searches; by default by the time")
]
Time = Annotated[str, typer.Option(help="About how long the run may take: 90s, 30min, 2h")]
Name = Annotated[str | None, typer.Option(help="Of the run; by default of model and size")]
Template = Annotated[Path | None, typer.Option(help="The model as a GGUF file in floats, by llama.cpp's converter")]
Converter = Annotated[
    Path | None,
    typer.Option(
        envvar="BITGENOME_CONVERTER",
        help="llama.cpp's convert_hf_to_gguf.py, or its folder: makes a template if needed",
    ),
]


def add_quantize(app: typer.Typer, execute: Callable[["RunConfig"], None]) -> None:
    """Add the commands to ``app``; ``execute`` runs a configuration and shows its outcome."""

    @app.command()
    def quantize(
        model: Model,
        size: Size = None,
        bits: Bits = None,
        like: Like = None,
        device_memory: DeviceMemory = None,
        context: Context = CONTEXT,
        kv: Kv = "f16",
        mmproj: Mmproj = None,
        margin: Margin = "1GiB",
        output: Annotated[Path | None, typer.Option("--output", "-o", help="Also copy the file here")] = None,
        text: Text = None,
        strategy: Strategy = None,
        time: Time = "30min",
        name: Name = None,
        storage: Storage = RUNS,
        template: Template = None,
        converter: Converter = None,
        overrides: Overrides = None,
    ) -> None:
        """Make the best file of a size: a whole run with settings that suit the model and this machine.

        Its settings stay in the run's directory, in run.yaml.

        The same command again goes on where it was interrupted.

        Examples:

        bitgenome quantize Qwen/Qwen3-0.6B --size 450MB -o qwen.gguf

        bitgenome quantize mine-bf16.gguf --like Q4_K_M --text my-chats.jsonl --time 2h

        bitgenome quantize my-finetune/ --device-memory 16GiB --context 65536 --kv q8_0
        """
        from bitgenome.quantize.request import Request  # noqa: PLC0415 - here and below: imported when called

        size_wanted = wanted_size(size, bits, like, device_memory, context, kv, mmproj, margin)
        request = Request(
            model, size_wanted, seconds_in(time), text, strategy, name, storage, template, converter,
            overrides=tuple(overrides or ()),
        )  # fmt: skip
        check_output(output)
        make_file(request, output, execute)

    @app.command()
    def init(
        model: Model,
        size: Size = None,
        bits: Bits = None,
        like: Like = None,
        device_memory: DeviceMemory = None,
        context: Context = CONTEXT,
        kv: Kv = "f16",
        mmproj: Mmproj = None,
        margin: Margin = "1GiB",
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="The file, - for standard output; NAME.yaml by default")
        ] = None,
        text: Text = None,
        strategy: Strategy = None,
        time: Time = "30min",
        name: Name = None,
        storage: Storage = RUNS,
        template: Template = None,
        converter: Converter = None,
        overrides: Overrides = None,
    ) -> None:
        """Write the configuration that quantize would run, as YAML with a comment on every setting.

        Without a size it is one of 4.5 bits per weight.

        Examples:

        bitgenome init Qwen/Qwen3-0.6B --size 450MB -o run.yaml

        bitgenome plan run.yaml; bitgenome run run.yaml
        """
        from bitgenome.quantize.request import Request  # noqa: PLC0415

        if all(given is None for given in (size, bits, like, device_memory)):
            bits = BITS_BY_DEFAULT
        place = output.absolute().parent if output and output != STANDARD_OUTPUT else Path.cwd()
        size_wanted = wanted_size(size, bits, like, device_memory, context, kv, mmproj, margin)
        request = Request(
            model, size_wanted, seconds_in(time), text, strategy, name, storage, template, converter, place,
            tuple(overrides or ()),
        )  # fmt: skip
        write_settings(request, output)


def make_file(request: "Request", output: Path | None, execute: Callable[["RunConfig"], None]) -> None:
    """Do the whole run that ``request`` asks for, or go on with it, and copy its file to ``output``."""
    from bitgenome.common import layout  # noqa: PLC0415
    from bitgenome.config.run import load_config  # noqa: PLC0415
    from bitgenome.quantize.begin import begin  # noqa: PLC0415
    from bitgenome.quantize.request import kept_settings  # noqa: PLC0415
    from bitgenome.storage.run_directory import RunDirectory  # noqa: PLC0415
    from bitgenome.storage.run_result import RunResult  # noqa: PLC0415

    command = f"bitgenome quantize {shlex.join(request.words)}"
    if kept := kept_settings(request, command):
        console.print(f"going on with the settings of {kept}", soft_wrap=True)
        config = load_config(kept)
    else:
        found = begin(request)
        show(found)
        config = found.config
        RunDirectory.find(config)  # another run of that name is refused, and keeps its settings
        directory = config.storage_path / config.name
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write_text(directory / layout.SETTINGS, as_yaml(found, command))
        console.print(f"settings  {directory / layout.SETTINGS}", soft_wrap=True)
    execute(config)
    if output is not None:
        result = RunResult.read(config.storage_path / config.name)
        assert result is not None, "execute has written it"
        copy(config.storage_path / config.name / result.gguf, output)
        console.print(f"wrote {output}", soft_wrap=True)


def write_settings(request: "Request", output: Path | None) -> None:
    """Write the settings that ``request`` asks for to ``output``, which must not be there yet, or show them."""
    from bitgenome.quantize.begin import begin  # noqa: PLC0415

    if output != STANDARD_OUTPUT:
        check_output(output)
        check_new(output)
    found = begin(request)
    content = as_yaml(found, f"bitgenome init {shlex.join(request.words)}")
    if output == STANDARD_OUTPUT:
        typer.echo(content, nl=False)
        return
    path = output or Path(f"{found.config.name}.yaml")
    check_new(path)
    atomic_write_text(path, content)
    show(found)
    console.print(f"wrote {path}; next: bitgenome plan {path}, bitgenome run {path}", soft_wrap=True)


def check_new(path: Path | None) -> None:
    """Raise UserError if there is a file at ``path``."""
    if path is not None and path.exists():
        raise UserError(f"expected no file at {path}, found one: it may hold settings of yours")


def wanted_size(
    size: str | None, bits: float | None, like: str | None, memory: str | None, context: int, kv: str,
    mmproj: Path | None, margin: str,
) -> "WantedSize":  # fmt: skip
    """Return the size that the options name. Raises UserError unless they name one."""
    from bitgenome.quantize.size import Device, WantedSize  # noqa: PLC0415

    given = Device("", context, kv, mmproj, margin)
    if memory is None and given != Device("", CONTEXT):
        raise UserError(
            "expected --device-memory beside --context, --kv, --mmproj or --margin, which say what else lies there, "
            "found none"
        )
    device = replace(given, memory=memory) if memory is not None else None
    wanted = WantedSize(size, bits, like, device)
    wanted.check()
    return wanted


def seconds_in(time: str) -> float:
    """Return a time such as 30min in seconds. Raises UserError for any other text."""
    found = TIME.fullmatch(time.strip())
    if found is None:
        raise UserError(f"expected a time such as 90s, 30min or 2h for --time, found {time!r}")
    return float(found[1]) * SECONDS[found[2]]


def check_output(output: Path | None) -> None:
    """Raise UserError unless a file can be written to ``output``."""
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"expected a folder for the file, found none at {output.absolute().parent}")
    if output is not None and output.is_dir():
        raise UserError(f"expected a file's name for --output, found the folder {output}")


def as_yaml(found: "Beginning", command: str) -> str:
    """Return the settings of a run as YAML, with the command and what was chosen at the top."""
    from bitgenome.quantize.commented import commented_yaml  # noqa: PLC0415

    return commented_yaml(found.settings, [command, "", *(f"{what}: {words}" for what, words in found.notes)])


def show(found: "Beginning") -> None:
    """Show what was chosen, a line each."""
    for what, words in found.notes:
        console.print(f"{what:>8}  {words}", soft_wrap=True)


def copy(file: Path, path: Path) -> None:
    """Copy ``file`` to ``path``, which is replaced once the copy is whole."""
    with replacing(path) as temporary:
        shutil.copyfile(file, temporary)
