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
from exporters.runtime.llamacpp import LlamaCppRuntime, Server
from exporters.runtime.tokens import difference

CONVERT = Path(__file__).with_name("convert.py")
WINDOWS, POSITIONS = 2, 128  # more than the windows and the original contexts of the cases
LIMIT_S = 120.0  # of one answer
TEXT = "heapq.py"  # of the interpreter's library
ODD = "  Größe 日本語 🚀 don't  \t 12345\r\n\n  x=1"  # what splittings and normalizations differ in
SHOWN_TOKENS = 64
SHOWN = 200  # characters of a converter's last line


class ConverterError(RuntimeError):
    """Raised if the converter makes no file; the message is its last line."""


@dataclass(frozen=True)
class Wiring:
    """Holds how far llama.cpp is from transformers in final hidden states and tokens."""

    error: float  # of final hidden states, relative, computed in float32 by both
    tokens: str  # "same", or where they first differ
    window: np.ndarray  # ids (T,)
    logits: torch.Tensor  # of transformers after it, (V,)


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
    expected, logits = final_states(model, windows)
    with LlamaCppRuntime(file, POSITIONS, threads) as runtime:
        found = runtime.hidden_states(windows)
        ours, theirs = tokenizer.ids(text[:2000] + ODD), runtime.tokenize(text[:2000] + ODD)
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise FloatingPointError("hidden states are not finite")
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return Wiring(error, _tokens(ours, theirs), windows[0], logits)


def logits_error(file: Path, wiring: Wiring, threads: int = 1) -> float:
    """Return how far llama.cpp's logits after a window are from transformers', by the head, its scale, bias and cap.

    That is the mean difference of the SHOWN_TOKENS likeliest tokens' log probabilities, over the logits' deviation.
    llama.cpp generates with a KV cache in half precision, so that a thousandth is left. Raises LlamaCppError.
    """
    expected = torch.log_softmax(wiring.logits, dim=-1)
    request = {
        "prompt": wiring.window.tolist(),
        "n_predict": 4,  # a token may be part of a character, which is waited for
        "ignore_eos": True,  # of the token drawn; the probabilities are those before
        "n_probs": SHOWN_TOKENS,
        "cache_prompt": False,
        "temperature": 0.0,
    }
    with Server(file, POSITIONS + 8, threads, LIMIT_S, states=False) as server:
        likeliest = server.ask("/completion", request)["completion_probabilities"][0]["top_logprobs"]
    differences = [abs(token["logprob"] - float(expected[token["id"]])) for token in likeliest]
    return float(np.mean(differences)) / float(wiring.logits.std())


@torch.no_grad()
def final_states(model: PreTrainedModel, windows: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Return what the head multiplies, float32 (n, T, D), for token ids ``windows`` (n, T).

    Also returns the logits (V,) after the first window.
    """
    seen: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = model(torch.from_numpy(windows), use_cache=False).logits[0, -1]
    hook.remove()
    return seen[0].numpy(), logits


def _tokens(ours: list[int], theirs: list[int]) -> str:
    if (found := difference(ours, theirs)) is None:
        return "same"
    start, one, other = found
    return f"{len(ours)} here, {len(theirs)} there, from the {start + 1}-th on {one[:3]} and {other[:3]}"
