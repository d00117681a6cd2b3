"""This module estimates the memory of a sweep and divides a worker's memory, for `bitgenome plan` and for workers.

Sizes are in bytes. D is the hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bitgenome.common.devices import best_device, chunk_bytes
from bitgenome.common.errors import UserError
from evaluators.engine.divergence import CACHE_BYTES as LOGIT_BYTES
from evaluators.engine.divergence import chunk_size
from evaluators.model.forward import BATCH_TOKENS
from evaluators.model.sizes import FLOAT_BYTES, ModelShape, StageMemory
from quantizers.formats.table import QuantFormat

KEPT_TEXTS = 3  # texts whose full-precision outputs are kept: the rungs of a ladder
STATE_SHARE = 0.25  # of a worker's memory, for the hidden states of one sweep; longer text is read in parts
CACHE_SHARE = 0.125  # each for the prefixes of elites, for logits and for the activations of a batch
FIXED_BYTES = 40 << 20  # for decoding some rows at a time (evaluators/prepare/bank.py) and for matrix libraries
DECODING_COPIES = 8  # temporaries of decoding, each as large as the weights decoded at once


@dataclass(frozen=True)
class Load:
    """Describes the largest sweep of a run.

    It runs ``candidates`` at once on a text of ``tokens`` tokens, and caches the prefixes of ``kept`` genomes.
    """

    candidates: int
    tokens: int
    kept: int


TYPICAL_LOAD = Load(candidates=32, tokens=16384, kept=4)


@dataclass(frozen=True)
class SweepMemory:
    """Holds the shares of one worker's ``limit``, in bytes except for ``windows``."""

    limit: int
    windows: int  # of text that go through a block at once
    states: int  # hidden states of the candidates
    cache: int  # prefixes of elites
    reference: int  # full-precision outputs of the last texts
    logits: int  # of the full-precision model, if there is room to keep them for all candidates
    work: int  # activations of a batch, logits of a chunk, decoding; if streamed, also reading ahead
    weights: int  # full-precision and decoded tensors: all of them, or as many as fit
    reserve: int  # part of ``weights`` for tensors of the running block that are not kept
    all_weights: int  # of every tensor in full precision and in every format

    @property
    def resident(self) -> bool:
        """Whether every tensor stays in memory in every format, so that nothing is streamed."""
        return self.weights >= self.all_weights

    def stage(self, device: torch.device) -> StageMemory:
        """Return the shares as a stage's memory; hidden states between blocks are on the device if all weights are."""
        there = {"weights": self.weights, "work": self.work, "reference logits": self.logits}
        states = {"hidden states": self.states + self.cache + self.reference}
        return StageMemory.on(device, there | states, {}) if self.resident else StageMemory.on(device, there, states)

    @property
    def peak(self) -> int:
        """Bytes of all shares together, without what the process itself takes."""
        return self.states + self.cache + self.reference + self.logits + self.work + self.weights


@dataclass(frozen=True)
class Needs:
    """Holds what a sweep takes besides weights, in bytes except for ``windows``."""

    windows: int  # of text that go through a block at once
    states: int
    cache: int
    reference: int
    logits: int
    in_block: int  # activations of a batch
    in_head: int  # logits of a chunk


def sweep_needs(shape: ModelShape, window: int, load: Load, limit: int, device: torch.device) -> Needs:
    """Return what the sweep of ``load`` over windows of ``window`` tokens takes of ``limit`` bytes besides weights."""
    state = shape.state_bytes
    positions = max(window, load.tokens // window * window)
    activations = shape.activation_bytes(window)
    windows = windows_at_once(shape, window, positions, limit)
    logits = 2 * positions * shape.vocabulary * FLOAT_BYTES
    states = min((load.candidates + 2) * positions * state, int(limit * STATE_SHARE))
    kept = load.kept * (shape.layers + 1) * positions * state
    return Needs(
        windows=windows,
        states=max(states, (load.candidates + 2) * window * state),
        cache=min(kept, int(limit * CACHE_SHARE)),
        reference=KEPT_TEXTS * positions * state,
        logits=logits if logits <= min(LOGIT_BYTES, int(limit * CACHE_SHARE)) else 0,
        in_block=windows * window * activations,
        in_head=4 * chunk_size(shape.vocabulary, device) * FLOAT_BYTES,
    )


def windows_at_once(shape: ModelShape, window: int, positions: int, limit: int) -> int:
    """Return how many windows of ``window`` tokens go through a block at once, of a text of ``positions`` tokens."""
    fitting = int(limit * CACHE_SHARE) // shape.activation_bytes(window)
    return max(1, min(BATCH_TOKENS, positions, fitting) // window)


def lighter(division: SweepMemory, shape: ModelShape, window: int, load: Load, device: torch.device) -> SweepMemory:
    """Return what the sweep of ``load`` uses of a ``division`` that was made for a heavier one: all of its weights."""
    needs = sweep_needs(shape, window, load, division.limit, device)
    unused = max(0, division.windows - needs.windows) * window * shape.activation_bytes(window)
    return replace(
        division,
        windows=min(division.windows, needs.windows),
        states=needs.states,
        cache=needs.cache,
        reference=needs.reference,
        logits=needs.logits,
        work=division.work - unused,
    )


def sweep_memory(
    shape: ModelShape,
    formats: Mapping[str, Sequence[QuantFormat]],
    window: int,
    load: Load,
    limit: int,
    compute: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> SweepMemory:
    """Divide ``limit`` bytes of ``device``, by default this machine's, for the sweep of ``load``.

    ``window`` is the number of tokens of a window. ``formats`` holds the candidate formats by Hugging Face name;
    tensors without any stay in full precision. Blocks multiply in ``compute``. Raises UserError, which says the least
    that is enough, if not even one block fits.
    """
    device = device or best_device()
    needs = sweep_needs(shape, window, load, limit, device)
    floats = {name: shape.bytes_of(name, compute) for name in shape.tensors}
    everything = sum(size * (1 + len(formats.get(name, ()))) for name, size in floats.items())

    def memory(work: int, weights: int, reserve: int) -> SweepMemory:
        shares = (needs.windows, needs.states, needs.cache, needs.reference, needs.logits)
        return SweepMemory(limit, *shares, work, weights, reserve, everything)

    beside = needs.states + needs.cache + needs.reference + needs.logits
    fixed = max(FIXED_BYTES, DECODING_COPIES * chunk_bytes(device, 0))
    work = needs.in_block + needs.in_head + fixed  # both: allocators keep the one's memory during the other
    if everything <= limit - beside - work:
        return memory(work, everything, 0)
    block, heads = shape.block_bytes(compute), 2 * shape.head_bytes
    work = max(needs.in_block + block, needs.in_head) + fixed  # reading ahead holds the next block, as stored
    left, least = limit - beside - work, max(block, heads)
    if left < least:
        raise UserError(
            f"expected at least {(limit - left + least) / 2**30:.2f} GiB of memory for a worker, of which "
            f"{least / 2**30:.2f} GiB are one block or the two heads, found {limit / 2**30:.2f} GiB: use fewer workers "
            "on a machine, a shorter text.window, or less text"
        )
    levels = 1 + max(map(len, formats.values()), default=0)
    return memory(work, left, reserve=min(left, max(block * levels, heads)))
