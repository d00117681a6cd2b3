"""Compares llama.cpp's output for the exported file with the original model and with the search's simulation.

Shapes: n windows, T positions, P = n * T, D hidden size, V vocabulary. Logits exist for a chunk of positions at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from bitgenome.common.numbers import perplexity_of
from exporters.files.gguf_reader import read_gguf
from exporters.runtime.figures import Figures, PositionErrors
from exporters.runtime.llamacpp import LlamaCppRuntime
from quantizers.formats.activations import quantized_input

CHUNK_BYTES = 1 << 26  # of the logits of one chunk

# (start, stop) of flattened positions -> log probabilities float32 (stop - start, V)
LogProbs = Callable[[int, int], torch.Tensor]
# final hidden states (P, D) -> logits (P, V)
LogitsOf = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """Compares a model with the runtime; ``kl`` is KL(model || runtime) in nats per position."""

    kl: float
    top1_agreement: float  # share of positions whose most likely token is the same
    perplexity: float  # of the model itself
    figures: Figures | None = None  # of the runtime beside the model, which is the base; of the reference alone


@dataclass(frozen=True)
class RuntimeFigures:
    """Perplexity of the runtime over ``positions`` positions, and its comparisons with other models."""

    perplexity: float
    positions: int
    reference: Comparison | None = None  # the full-precision model
    simulated: Comparison | None = None  # the dequantized weights, evaluated as in the search
    eight_bit: Comparison | None = None  # the same, with llama.cpp's 8-bit inputs


def log_probs(hidden: np.ndarray | torch.Tensor, head: LogitsOf) -> LogProbs:
    """Return a function that computes log probabilities for a range of the P flattened positions.

    ``hidden`` are final hidden states (n, T, D), ``head`` works on their device. Results are on the CPU.
    """
    states = torch.as_tensor(hidden, dtype=torch.float32).flatten(0, -2)

    def chunk(start: int, stop: int) -> torch.Tensor:
        return torch.log_softmax(head(states[start:stop]), dim=-1).cpu()

    return chunk


def rounded(head: LogitsOf, kind: str) -> LogitsOf:
    """Return ``head`` with its input rounded to the ggml type ``kind``, as llama.cpp does before its products."""
    return lambda hidden: head(quantized_input(kind, hidden))


def plain_head(weight: np.ndarray | torch.Tensor) -> LogitsOf:
    """Return the head that multiplies hidden states by ``weight`` (V, D), without a soft cap."""
    return partial(functional.linear, weight=torch.as_tensor(weight, dtype=torch.float32))


def compare(
    runtime: LogProbs,
    windows: np.ndarray,
    vocabulary: int,
    reference: LogProbs | None = None,
    simulated: LogProbs | None = None,
    eight_bit: LogProbs | None = None,
    unscored: int = 0,
    followed: bool = False,
    before_rounding: LogProbs | None = None,
) -> RuntimeFigures:
    """Return the figures of ``runtime`` on token ids ``windows`` (n, T), compared with each model that is given.

    ``vocabulary`` is V, which sets the size of a chunk. The first ``unscored`` positions of each window do not count,
    nor does the last if only those count that are ``followed`` by a token of the window. ``before_rounding`` is what
    the runtime's hidden states predict through the head in floats: simulated and eight_bit, whose heads are in floats
    too, are held against that. By default it is the runtime.

    Raises FloatingPointError if log probabilities of the runtime are not finite.
    """
    targets = _targets(windows)
    counted = _counted(windows, unscored) & (targets >= 0 if followed else True)
    models = {"reference": reference, "simulated": simulated, "eight_bit": eight_bit}
    sums = {name: _Sums(len(windows), each=name == "reference") for name in ("runtime", *models)}
    for start, stop in _chunks(len(targets), vocabulary):
        rows, next_ids = counted[start:stop], targets[start:stop][counted[start:stop]]
        ours = runtime(start, stop)[rows]
        if not bool(torch.isfinite(ours).all()):
            raise FloatingPointError("llama.cpp's logits are not finite")
        sums["runtime"].add(ours, ours, next_ids)
        floats = ours if before_rounding is None else before_rounding(start, stop)[rows]
        for name, model in models.items():
            if model is not None:
                sums[name].add(model(start, stop)[rows], ours if name == "reference" else floats, next_ids)
    return RuntimeFigures(
        sums["runtime"].comparison().perplexity,
        int(counted.sum()),
        **{name: sums[name].comparison() if model else None for name, model in models.items()},
    )


def measure_file(
    path: str | Path,
    windows: np.ndarray,
    reference: LogProbs | None = None,
    simulated: LogProbs | None = None,
    eight_bit: LogProbs | None = None,
    threads: int | None = None,
    unscored: int = 0,
) -> RuntimeFigures:
    """Run the file in llama.cpp on token ids ``windows`` (n, T), and compare it with each model that is given.

    The first ``unscored`` positions of each window do not count.

    llama.cpp returns hidden states, so the logits are computed here, with the file's dequantized head. Raises
    ValueError for a damaged file, LlamaCppError if llama.cpp cannot run it, and FloatingPointError as ``compare``.
    """
    head = read_gguf(path).head()
    with LlamaCppRuntime(path, windows.shape[1], threads) as runtime:
        hidden = runtime.hidden_states(windows)
    ours = log_probs(hidden, plain_head(head))
    return compare(ours, windows, head.shape[0], reference, simulated, eight_bit, unscored)


class _Sums:
    """Accumulates one model's sums over positions of n windows, in float64; with ``each`` also each position."""

    def __init__(self, windows: int, each: bool = False) -> None:
        self.kl = self.agreed = self.loss = 0.0
        self.positions = self.predicted = 0
        self._windows = windows
        self._each: list[torch.Tensor] | None = [] if each else None

    def add(self, model: torch.Tensor, runtime: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a chunk: log probabilities ``model``, ``runtime`` (chunk, V); next tokens ``targets`` (chunk,) or -1."""
        followed, terms = targets >= 0, model.exp() * (model - runtime)
        agreed = model.argmax(-1) == runtime.argmax(-1)
        self.kl += float(terms.sum(dtype=torch.float64))
        self.agreed += int(agreed.sum())
        self.loss -= float(model[followed].gather(1, targets[followed, None]).sum(dtype=torch.float64))
        self.positions += len(targets)
        self.predicted += int(followed.sum())
        if self._each is not None:
            self._each.append(_each_position(model, runtime, targets))

    def comparison(self) -> Comparison:
        """Return the means of the sums."""
        figures = None
        if self._each:
            kl, agreed, base, own = torch.cat(self._each, 1).view(4, self._windows, -1).numpy()
            figures = Figures.of(PositionErrors(kl, agreed > 0, base, own))
        loss = self.loss / max(1, self.predicted)
        return Comparison(self.kl / self.positions, self.agreed / self.positions, perplexity_of(loss), figures)


def _each_position(base: torch.Tensor, model: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return KL, agreement, and the base's and the model's log probability of the next token, float64 (4, chunk)."""
    kl = (base.exp() * (base - model)).sum(-1, dtype=torch.float64)
    agreed = base.argmax(-1) == model.argmax(-1)
    return torch.stack([kl, agreed.double(), *(_of_targets(values, targets) for values in (base, model))])


def _of_targets(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log probability of each of ``targets`` (chunk,), float64, NaN for -1; ``log_probs`` is (chunk, V)."""
    found = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0].double()
    return found.masked_fill(targets < 0, float("nan"))


def _targets(windows: np.ndarray) -> torch.Tensor:
    """Return the token after each position, int64 (P,), or -1 at the end of a window."""
    targets = torch.full(windows.shape, -1, dtype=torch.int64)
    targets[:, :-1] = torch.from_numpy(np.ascontiguousarray(windows[:, 1:], dtype=np.int64))
    return targets.flatten()


def _counted(windows: np.ndarray, unscored: int) -> torch.Tensor:
    """Return which positions count, bool (P,)."""
    counted = torch.ones(windows.shape, dtype=torch.bool)
    counted[:, :unscored] = False
    return counted.flatten()


def _chunks(positions: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    return ((start, min(start + step, positions)) for start in range(0, positions, step))
