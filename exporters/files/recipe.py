"""Writes and reads recipes for llama.cpp's quantizer: ``llama-quantize --tensor-type-file recipe.txt``.

llama-quantize then quantizes the weights itself: types and size are the same, but without error compensation.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gguf import GGMLQuantizationType

from bitgenome.common.errors import UserError
from quantizers.formats.table import QuantFormat

# Two tensors have their own options, which take precedence over the file (llama-quantize --help).
OWN_OPTIONS = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}


def recipe_lines(formats: Mapping[str, QuantFormat], kept: Mapping[str, str] | None = None) -> list[str]:
    """Return one line ``^name$=type`` for each GGUF tensor name, so that no default rule of llama.cpp applies.

    ``kept`` are the types of the matrices that no gene decides, by GGUF name.

    The file must contain only these lines: llama-quantize refuses comments.
    """
    types = {name: _ggml_name(chosen) for name, chosen in formats.items()}
    types |= {name: kind.lower() for name, kind in (kept or {}).items()}
    return [f"^{re.escape(name)}$={kind}" for name, kind in types.items()]


def recipe_command(formats: Mapping[str, QuantFormat]) -> str:
    """Return the llama-quantize command that applies the recipe to f16.gguf and writes out.gguf."""
    options = [f"{OWN_OPTIONS[name]} {_ggml_name(chosen)}" for name, chosen in formats.items() if name in OWN_OPTIONS]
    if "output.weight" not in formats and "token_embd.weight" in formats:  # tied: the embedding is the output too
        options.append(f"--output-tensor-type {_ggml_name(formats['token_embd.weight'])}")
    return " ".join(
        [
            "llama-quantize",
            *options,
            "--imatrix imatrix.gguf",
            "--tensor-type-file recipe.txt",
            "f16.gguf",
            "out.gguf",
            "q4_k_m",
        ]
    )


def _ggml_name(chosen: QuantFormat) -> str:
    """Return ggml's spelling of a type, e.g. q4_K, q8_0, f16."""
    return chosen.name.lower().replace("_k", "_K")


@dataclass(frozen=True)
class RecipeEntry:
    """Gives one type to the tensors whose GGUF names ``pattern`` finds; ``line`` is its line in the recipe."""

    line: int
    text: str
    pattern: re.Pattern[str]
    type_name: str  # GGUF's own spelling, such as Q4_K


class Chosen(NamedTuple):
    """Holds the type that a recipe gives a tensor, and the line that gives it."""

    type_name: str
    line: int


def read_recipe(text: str, source: str) -> list[RecipeEntry]:
    """Return the entries ``NAME=TYPE`` of a recipe, as llama-quantize reads it: NAME is a regular expression.

    Blank lines and those that begin with # are left out. ``source`` names the recipe in errors. Raises UserError, with
    the line, for anything else, and for a recipe without entries.
    """
    entries = [
        _entry(word, number, source)
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.lstrip().startswith("#")
        for word in line.split()
    ]
    if not entries:
        raise UserError(f"expected lines NAME=TYPE in {source}, found none")
    return entries


def chosen_types(entries: Sequence[RecipeEntry], tensors: Iterable[str], source: str) -> dict[str, Chosen]:
    """Return what a recipe gives each of ``tensors``, GGUF names of a model; the first entry that finds a name counts.

    A tensor that no entry finds is left out. Raises UserError for an entry that finds no tensor.
    """
    names = list(tensors)
    for entry in entries:
        if not any(entry.pattern.search(name) for name in names):
            raise UserError(
                f"expected the name of a tensor of the model in line {entry.line} of {source}, found {entry.text!r}, "
                "which is in none of them"
            )
    found = ((name, next((e for e in entries if e.pattern.search(name)), None)) for name in names)
    return {name: Chosen(entry.type_name, entry.line) for name, entry in found if entry}


def _entry(word: str, line: int, source: str) -> RecipeEntry:
    """Return one entry. Raises UserError if ``word`` is none."""
    name, _, kind = word.partition("=")
    if not name or not kind:
        raise UserError(f"expected NAME=TYPE in line {line} of {source}, found {word!r}")
    if kind.upper() not in GGMLQuantizationType.__members__:
        raise UserError(f"expected a type of GGUF, such as q4_K, in line {line} of {source}, found {kind!r}")
    try:
        pattern = re.compile(name.lower())  # as llama-quantize does
    except re.error as error:
        raise UserError(f"expected a regular expression in line {line} of {source}, found {name!r} ({error})") from None
    return RecipeEntry(line, word, pattern, kind.upper())
