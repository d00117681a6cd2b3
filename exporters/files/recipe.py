"""Writes a choice of types as a recipe for llama.cpp's quantizer: ``llama-quantize --tensor-type-file recipe.txt``.

llama-quantize then quantizes the weights itself: types and size are the same, but without error compensation.
"""

import re
from collections.abc import Mapping

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
