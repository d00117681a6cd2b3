"""Holds a converter's F32 file in llama.cpp against the model in transformers, on the same tokens.

Shapes: n windows, T positions, D hidden size.
"""

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from evaluators.data.tokenizer import load_tokenizer
from exporters.runtime.llamacpp import LlamaCppRuntime
from exporters.runtime.tokens import difference

CONVERT = Path(__file__).with_name("convert.py")
WINDOWS, POSITIONS = 2, 128  # more than the windows and the original contexts of the cases
TEXT = "heapq.py"  # of the interpreter's library
ODD = "  Größe 日本語 🚀 don't  \t 12345\r\n\n  x=1"  # what splittings and normalizations differ in
SHOWN = 200  # characters of a converter's last line


class ConverterError(RuntimeError):
    """Raised if the converter makes no file; the message is its last line."""


@dataclass(frozen=True)
class Wiring:
    """Holds how far llama.cpp is from transformers: ``error`` of final hidden states, relative, and of tokens."""

    error: float
    tokens: str  # "same", or where they first differ


def convert(model: Path, file: Path, converter: Path, options: tuple[str, ...] = ()) -> None:
    """Write the F32 file of a model folder by the converter in the folder ``converter``. Raises ConverterError."""
    command = [sys.executable, str(CONVERT), str(model), "--outtype", "f32", "--outfile", str(file), *options]
    environment = {**os.environ, "PYTHONPATH": str(converter)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ConverterError(lines[-1].removeprefix("ERROR:hf-to-gguf:")[:SHOWN] if lines else "no word")


def compare(model: PreTrainedModel, folder: Path, file: Path, threads: int = 1) -> Wiring:
    """Run ``file`` in llama.cpp, and compare final hidden states and tokens with ``model``, which is in ``folder``.

    Raises LlamaCppError if llama.cpp refuses the file or dies, FloatingPointError for states that are not finite.
    """
    text = (Path(sysconfig.get_path("stdlib")) / TEXT).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    windows = np.array(tokenizer.encode([text])[0][: WINDOWS * POSITIONS]).reshape(WINDOWS, POSITIONS)
    expected = final_states(model, windows)
    with LlamaCppRuntime(file, POSITIONS, threads) as runtime:
        found = runtime.hidden_states(windows)
        ours, theirs = tokenizer.ids(text[:2000] + ODD), runtime.tokenize(text[:2000] + ODD)
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise FloatingPointError("hidden states are not finite")
    return Wiring(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)), _tokens(ours, theirs))


@torch.no_grad()
def final_states(model: PreTrainedModel, windows: np.ndarray) -> np.ndarray:
    """Return what the head multiplies, float32 (n, T, D), for token ids ``windows`` (n, T)."""
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.from_numpy(windows), use_cache=False)
    hook.remove()
    return seen[0].numpy()


def _tokens(ours: list[int], theirs: list[int]) -> str:
    if (found := difference(ours, theirs)) is None:
        return "same"
    start, one, other = found
    return f"{len(ours)} here, {len(theirs)} there, from the {start + 1}-th on {one[:3]} and {other[:3]}"
