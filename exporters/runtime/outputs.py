"""What a GGUF file predicts at every position of given windows, as llama.cpp runs it; nothing but the file is needed.

llama.cpp returns hidden states, which are kept in a temporary file, so that memory holds the logits of some positions
and one head. The logits are made of them here, with the 8-bit inputs that llama.cpp multiplies a quantized head with,
and held against llama.cpp's own at one position: what a model does with the products of its head (a scale, a soft cap)
is in its key-values, but not how it is meant. Shapes: n windows of T token ids, D hidden size, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from torch.nn import functional

from bitgenome.common.devices import best_device
from exporters.files.gguf_reader import StoredTensor
from exporters.opening.source import GgufModel, read_model
from exporters.runtime.comparison import LogitsOf, LogProbs, compare, log_probs, rounded
from exporters.runtime.figures import Figures
from exporters.runtime.llamacpp import LlamaCppRuntime
from quantizers.formats.table import SUPER_BLOCK

SHOWN_TOKENS = 20  # whose log probabilities llama.cpp is asked for
TRIES = 8  # positions at which it is asked, until it generates a whole character
TOLERANCE = (
    0.1  # mean difference of theirs in nats, measured 2e-6 on a CPU; accelerators round a head's inputs otherwise
)


@dataclass(frozen=True)
class Outputs:
    """Holds the log probabilities of a file's model at the flattened positions of windows, of ``vocabulary`` tokens."""

    path: Path
    log_probs: LogProbs
    vocabulary: int


@contextmanager
def outputs_of(path: str | Path, windows: np.ndarray, threads: int | None = None) -> Iterator[Outputs]:
    """Run a file in llama.cpp on token ids ``windows`` (n, T); what it predicts can be read while the context lasts.

    Raises ValueError for a damaged file or one whose logits are not found, LlamaCppError if llama.cpp cannot run it.
    """
    model, device = read_model(Path(path)), best_device()
    weight = torch.from_numpy(model.floats(head_name(model.tensors))).to(device)
    bias = torch.from_numpy(model.floats("output.bias")).to(device) if "output.bias" in model.tensors else None
    with TemporaryFile(prefix="bitgenome-states-") as kept:
        states = np.memmap(kept, np.float32, "w+", shape=(*windows.shape, weight.shape[1]))
        with LlamaCppRuntime(path, windows.shape[1], threads) as runtime:
            runtime.hidden_states(windows, out=states)
            head = _proved_head(runtime, model, weight, bias, windows[0], states[0])
        yield Outputs(Path(path), log_probs(torch.from_numpy(states), head), len(weight))


def head_name(tensors: Collection[str]) -> str:
    """Return the GGUF name of the head's weight (V, D): that of the output or, if tied, of the embedding."""
    return "output.weight" if "output.weight" in tensors else "token_embd.weight"


def head_input_type(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the ggml type to which llama.cpp rounds what the head of a file's ``tensors`` multiplies.

    See ``quantizers.formats.activations.input_type``.
    """
    name = tensors[head_name(tensors)].type_name
    block = GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]
    return name if block == 1 else "Q8_K" if block == SUPER_BLOCK else "Q8_0"


def figures_of(model: Outputs, base: Outputs, windows: np.ndarray, unscored: int, followed: bool = False) -> Figures:
    """Return the figures of ``model`` beside ``base``, both of the token ids ``windows`` (n, T).

    The first ``unscored`` positions of each window do not count, nor does the last if only those count that are
    ``followed`` by a token of the window. With T // 2 and True they are the positions that llama-perplexity scores.
    Raises ValueError for files of different vocabularies, FloatingPointError for logits that are not finite.
    """
    if model.vocabulary != base.vocabulary:
        raise ValueError(
            f"expected a vocabulary of {base.vocabulary:,} tokens in {model.path}, as in {base.path}, "
            f"found {model.vocabulary:,}"
        )
    found = compare(
        model.log_probs, windows, base.vocabulary, base.log_probs, unscored=unscored, followed=followed
    ).reference
    assert found is not None and found.figures is not None
    return found.figures


def text_windows(runtime: LlamaCppRuntime, text: str, window: int, tokens: int) -> tuple[np.ndarray, bool]:
    """Return the first windows (n, ``window``) of ``text``, of at most ``tokens`` tokens, and whether each has a BOS.

    They are cut as by llama-perplexity: llama.cpp's own tokens of the whole text, in windows one behind the other, of
    which each first token is replaced by BOS where the model wants one. Raises ValueError for a text that is too short.
    """
    ids = runtime.tokenize(text, parse_special=False)
    if len(ids) < window:
        raise ValueError(f"expected text of at least one window, {window:,} tokens, found {len(ids):,}")
    count = max(1, min(tokens, len(ids)) // window)
    windows = np.array(ids[: count * window], dtype=np.int64).reshape(count, window)
    plain, special = (runtime.tokenize("a", add_special=wanted) for wanted in (False, True))
    bos = len(special) > len(plain) and special[1 : 1 + len(plain)] == plain  # not EOS alone, which comes behind
    if bos:
        windows[:, 0] = special[0]
    return windows, bos


@dataclass(frozen=True)
class _Head:
    """Makes logits of hidden states: products with the weight, then a factor, then a soft cap."""

    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = functional.linear(hidden.to(weight.device), weight, bias).mul_(self.factor)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


def _proved_head(
    runtime: LlamaCppRuntime, model: GgufModel, weight: Tensor, bias: Tensor | None, window: np.ndarray, states: Any
) -> LogitsOf:
    """Return the head of ``model`` that gives llama.cpp's own probabilities at a position of ``window`` (T,).

    ``states`` (T, D) are the window's. Raises ValueError if none does.
    """
    asked = ((stop, runtime.next_token(window[:stop], SHOWN_TOKENS)) for stop in range(len(window) // 2, 0, -1)[:TRIES])
    stop, theirs = next((found for found in asked if found[1]), (0, {}))
    if not theirs:
        raise ValueError(f"expected llama.cpp to generate text with {model.path}, found no whole character")
    state, ids = torch.from_numpy(np.array(states[stop - 1 : stop])), torch.tensor(list(theirs), device=weight.device)
    expected = torch.tensor(list(theirs.values()), device=weight.device)
    keys, inputs = model.hyperparameters(), head_input_type(model.tensors)
    scale, cap = keys.get("logit_scale") or 1.0, keys.get("final_logit_softcapping") or None
    heads = [_Head(factor, softcap) for factor, softcap in product((1.0, scale, 1.0 / scale), {cap, None})]

    def made_by(head: _Head) -> LogitsOf:
        return rounded(partial(head, weight=weight, bias=bias), inputs)

    def error(head: _Head) -> float:
        return float((made_by(head)(state).log_softmax(-1)[0, ids] - expected).abs().mean())

    best = min(heads, key=error)
    if not (found := error(best)) <= TOLERANCE:
        raise ValueError(
            f"expected llama.cpp's probabilities of tokens from the hidden states and the head of {model.path}, found "
            f"others ({found:.2g} nats): models of {model.architecture} do more with them than scale and cap"
        )
    return made_by(best)
