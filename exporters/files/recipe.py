"""The same choice of types for llama.cpp's own quantizer: ``llama-quantize --tensor-type-file recipe.txt``.

That quantizes anew: the same types and size, without the search's compensation.
"""

import re
from collections.abc import Mapping

from quantizers.formats.table import QuantFormat

# Two tensors have options of their own, which win over the file (llama-quantize --help).
OWN_OPTIONS = {"token_embd.weight": "--token-embedding-type", "output.weight": "--output-tensor-type"}


def recipe_lines(formats: Mapping[str, QuantFormat]) -> list[str]:
    """One ``^name$=type`` line for each GGUF tensor name, so that no default rule of llama.cpp applies to any.

    The file must hold nothing else: llama-quantize refuses comments.
    """
    return [f"^{re.escape(name)}$={_ggml_name(chosen)}" for name, chosen in formats.items()]


def recipe_command(formats: Mapping[str, QuantFormat]) -> str:
    """The command line that goes with the file, from f16.gguf to out.gguf."""
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
    """ggml's own spelling, e.g. q4_K, q8_0, f16."""
    return chosen.name.lower().replace("_k", "_K")
