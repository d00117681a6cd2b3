"""How much memory a sweep takes, by what, and how a worker divides its own: what `bitgenome plan` and workers ask.

Bytes throughout. B windows, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from bitgenome.common.errors import UserError
from evaluators.engine.divergence import CACHE_BYTES as LOGIT_BYTES
from evaluators.engine.divergence import chunk_size
from evaluators.model.block_arguments import attention_of
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import BATCH_TOKENS
from quantizers.formats.table import QuantFormat

FLOAT_BYTES = 4
KEPT_TEXTS = 3  # whose full-precision outputs stay: the rungs of a ladder
STATE_SHARE = 0.25  # of a worker's memory, for the hidden states of one sweep: longer text goes through in parts
CACHE_SHARE = 0.125  # for the prefixes of elites, as much for logits, and for the activations of a batch
FIXED_BYTES = 64 << 20  # decoding, some rows at a time (evaluators/prepare/bank.py), and what matrix libraries keep


@dataclass(frozen=True)
class Load:
    """The largest sweep of a run: candidates at once, tokens of its text, and genomes whose prefixes are kept."""

    candidates: int
    tokens: int
    kept: int


TYPICAL_LOAD = Load(candidates=32, tokens=16384, kept=4)


@dataclass(frozen=True)
class SweepMemory:
    """Shares of one worker's ``limit``."""

    limit: int
    windows: int  # of text that go through a block at once
    states: int  # hidden states of the candidates
    cache: int  # prefixes of elites
    reference: int  # full-precision outputs of the last texts
    logits: int  # of the full-precision model, where there is room to keep them for all candidates
    work: int  # activations of a batch in a block, logits of a chunk, decoding; reading ahead where it is streamed
    weights: int  # full-precision and decoded tensors: all of them, or what is left
    reserve: int  # of the weights' share, for those of the block at work that do not stay
    all_weights: int

    @property
    def resident(self) -> bool:
        """Whether every tensor stays in every format."""
        return self.weights >= self.all_weights

    @property
    def peak(self) -> int:
        """Of everything, above what the process takes by itself."""
        return self.states + self.cache + self.reference + self.logits + self.work + self.weights


@dataclass(frozen=True)
class Needs:
    """What a sweep takes beside weights, in bytes but for ``windows``."""

    windows: int  # of text that go through a block at once
    states: int
    cache: int
    reference: int
    logits: int
    in_block: int  # activations of a batch
    in_head: int  # logits of a chunk


def sweep_needs(folder: ModelFolder, window: int, load: Load, limit: int) -> Needs:
    """Return what the sweep of ``load`` over windows of ``window`` tokens takes of ``limit`` bytes beside weights."""
    config = folder.config
    state = int(config["hidden_size"]) * FLOAT_BYTES  # of one position
    positions = max(window, load.tokens // window * window)
    activations = activations_of(folder, window) * FLOAT_BYTES  # of one position
    windows = max(1, min(BATCH_TOKENS, positions, int(limit * CACHE_SHARE) // activations) // window)
    vocabulary = folder.shapes[folder.head_tensor][0]
    logits = 2 * positions * vocabulary * FLOAT_BYTES
    states = min((load.candidates + 2) * positions * state, int(limit * STATE_SHARE))
    kept = load.kept * (int(config["num_hidden_layers"]) + 1) * positions * state
    return Needs(
        windows=windows,
        states=max(states, (load.candidates + 2) * window * state),
        cache=min(kept, int(limit * CACHE_SHARE)),
        reference=KEPT_TEXTS * positions * state,
        logits=logits if logits <= min(LOGIT_BYTES, int(limit * CACHE_SHARE)) else 0,
        in_block=windows * window * activations,
        in_head=4 * chunk_size(vocabulary) * FLOAT_BYTES,
    )


def sweep_memory(
    folder: ModelFolder, formats: Mapping[str, Sequence[QuantFormat]], window: int, load: Load, limit: int
) -> SweepMemory:
    """Divide ``limit`` bytes for a model whose tensors (Hugging Face names) may take ``formats``.

    Raises UserError, with the least that would do, if not even one block fits.
    """
    needs = sweep_needs(folder, window, load, limit)
    floats = {name: prod(shape) * FLOAT_BYTES for name, shape in folder.shapes.items()}
    everything = sum(size * (1 + len(formats.get(name, ()))) for name, size in floats.items())

    def memory(work: int, weights: int, reserve: int) -> SweepMemory:
        shares = (needs.windows, needs.states, needs.cache, needs.reference, needs.logits)
        return SweepMemory(limit, *shares, work, weights, reserve, everything)

    beside = needs.states + needs.cache + needs.reference + needs.logits
    work = needs.in_block + needs.in_head + FIXED_BYTES  # allocators keep what they had for the one beside the other
    if everything <= limit - beside - work:
        return memory(work, everything, 0)
    block, heads = largest_block(floats, int(folder.config["num_hidden_layers"])), 2 * floats[folder.head_tensor]
    work = max(needs.in_block + block, needs.in_head) + FIXED_BYTES  # the next block is read meanwhile, as it is stored
    left, least = limit - beside - work, max(block, heads)
    if left < least:
        raise UserError(
            f"expected at least {(limit - left + least) / 2**30:.2f} GiB of memory for a worker, of which "
            f"{least / 2**30:.2f} GiB are one block or the two heads, found {limit / 2**30:.2f} GiB: use fewer workers "
            "on a machine, a shorter text.window, or less text"
        )
    levels = 1 + max(map(len, formats.values()), default=0)
    return memory(work, left, reserve=min(left, max(block * levels, heads)))


def largest_block(floats: Mapping[str, int], layers: int) -> int:
    """Bytes of the decoder block with the most, from ``floats`` by name."""
    blocks = [0] * layers
    for name, size in floats.items():
        _, found, rest = name.partition(".layers.")
        if found:
            blocks[int(rest.split(".")[0])] += size
    return max(blocks)


def activations_of(folder: ModelFolder, window: int) -> int:
    """Floats of one position that are alive at once within a block: the MLP's three inner vectors, six of D beside.

    Where attention is not fused, its scores too: three matrices (window, window) a head.
    """
    config = folder.config
    scores = 3 * window * int(config["num_attention_heads"]) if attention_of(folder) == "eager" else 0
    return 6 * int(config["hidden_size"]) + 3 * int(config["intermediate_size"]) + scores
