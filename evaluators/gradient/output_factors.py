"""Measures the output factor S = E[g g^T x^T x] of every linear layer, from one backward pass over calibration text.

x is a layer's input and g the gradient of sampled labels' log-likelihood at its output. Beside the Hessian of the
inputs it is the other Kronecker factor of the Fisher information of the layer's weights, one power iteration from the
identity (sketch A of Tseng, Sun, De Sa 2025, arXiv 2505.22988); see quantizers.rounding.row_order for its use.

Head and lookup tables have a Hessian for each group of their rows instead: quantizers.statistics.row_groups.

One block is in memory at a time: the forward pass leaves the input of every block on disk, and the backward pass reads
and removes them from the last to the first. An interrupted pass goes on at the block that it had reached.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitgenome.common.devices import all_cores, best_device, release_memory
from bitgenome.common.errors import UserError
from bitgenome.common.files import replacing
from bitgenome.common.steps import steps
from bitgenome.common.tensor_files import holds_tensors
from evaluators.data.windows import TokenWindows
from evaluators.gradient.label_scores import LinearUse, at_hand, block_uses, head_scores, row_weights
from evaluators.gradient.sensitivity import PART_TOKENS, label_draws
from evaluators.model.block_model import BlockModel
from evaluators.model.experts import expert_parts
from evaluators.model.folder import ModelFolder
from evaluators.prepare.input_recorder import SHRINKAGE
from evaluators.prepare.output_factor import factor_file, factor_readable, save_factor
from evaluators.prepare.row_hessians import ROLES, load_labels, save_sums, sums_name, sums_readable
from quantizers.rounding.row_order import output_blocks
from quantizers.statistics.hessian import HessianAccumulator, damped, joined, mean_of, shrunk
from quantizers.statistics.output_damping import DAMPINGS, TRIED_ROWS, chosen_damping
from quantizers.statistics.row_clusters import grouped_rows
from quantizers.statistics.row_groups import RowAccumulator, number_of_groups

# Of the calibration text, for all factors. Embedded model, all linear layers alike, 8 steps, KL on 8,192 tokens: from
# 8,192 tokens .0638 (Q2_K) and .00365 (Q4_K), from 32,768 tokens .0649 and .00366; under H alone .0792 and .00452.
FACTOR_TOKENS = 16384
STATES = "states"  # of text at a block, in a file of their own
NAME = re.compile(r"(inputs|scores)-(\d+)\.safetensors")


class FactorAccumulator:
    """Accumulates the output factor of one tensor of ``rows`` rows, in equal blocks of at most MOST_ROWS rows.

    Each block has two sums, of two halves of the text.
    """

    def __init__(self, rows: int, device: torch.device):
        blocks = output_blocks(rows)
        self.blocks = [[HessianAccumulator(rows // blocks, device) for _ in range(2)] for _ in range(blocks)]

    def add(self, use: LinearUse, half: int | None = None) -> None:
        """Add one use of the tensor, by text of one ``half``, 0 or 1; None: its positions are of both."""
        scores = use.scores * use.inputs.square().sum(-1, keepdim=True).sqrt()
        for block, part in zip(self.blocks, scores.chunk(len(self.blocks), -1), strict=True):
            parts = part.tensor_split(2) if half is None else (part,)
            for place, own in enumerate(parts):
                block[place if half is None else half].add(own)

    def factor(self) -> Tensor:
        """Return S float32 (blocks, r, r), damped as its halves say. Raises ValueError before the first use."""
        return torch.stack([damped(mean_of(block), damping_of(block)).float() for block in self.blocks])


def damping_of(halves: Sequence[HessianAccumulator]) -> float:
    """Return the damping of the mean of ``halves``: the largest where one of them has seen nothing."""
    if not all(half.count for half in halves):
        return DAMPINGS[-1]
    first, second = (half.sum[:TRIED_ROWS, :TRIED_ROWS] / half.count for half in halves)
    return chosen_damping(first, second)


def factors(found: Mapping[str, FactorAccumulator], names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the factor (blocks, r, r) of each of ``names`` for which something was ``found``.

    The factor of an expert leans on the mean over the experts of its layer as its Hessian does; an expert that no
    position chose has the mean.
    """
    pools: dict[tuple[str, str], list[FactorAccumulator]] = {}
    for name, own in found.items():
        if parts := expert_parts(name):
            pools.setdefault((parts.mixture, parts.kind), []).append(own)
    means = {key: _pooled(pool) for key, pool in pools.items()}
    for name in names:
        parts = expert_parts(name)
        if parts is None and name in found:
            yield name, found[name].factor()
        elif parts is not None and (mean := means.get((parts.mixture, parts.kind))):
            yield name, _leaning(found.get(name), mean)


Pooled = list[tuple[Tensor, float]]  # by block: the mean factor of a layer's experts, and its damping


def _pooled(pool: Sequence[FactorAccumulator]) -> Pooled:
    found = []
    for index in range(len(pool[0].blocks)):
        halves = [joined(other.blocks[index][half] for other in pool) for half in range(2)]
        found.append((mean_of(halves), damping_of(halves)))
    return found


def _leaning(own: FactorAccumulator | None, pooled: Pooled) -> Tensor:
    blocks = []
    for index, (mean, damping) in enumerate(pooled):
        factor = shrunk(joined(own.blocks[index]) if own else None, mean, SHRINKAGE * len(mean))
        blocks.append(damped(factor, damping).float())
    return torch.stack(blocks)


def part_windows(states: Tensor) -> int:
    """Return how many windows of ``states`` (n, T, ...) go through a block at once."""
    return max(1, PART_TOKENS // states.shape[1])


@dataclass(frozen=True)
class MeasureOutputs:
    """Pool task that writes what the loss says of ``tensors``, on every core: no other task runs then.

    These are the output factors of linear layers in blocks, and Hessians of groups of rows of head and lookup tables.

    Hidden states and scores are in ``directory`` meanwhile.
    """

    model: Path
    windows: Path  # file of TokenWindows
    directory: Path
    tensors: frozenset[str]

    @property
    def label(self) -> str:
        return "output factors"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> list[str]:
        """Write files of the tensors, and return their names: of a tensor, or of its sums in a role."""
        with all_cores():
            model = BlockModel(ModelFolder(self.model), best_device())
            return Pass(model, TokenWindows.load(self.windows), self.directory, self.tensors).run()


@dataclass(frozen=True)
class Pass:
    """Goes through a model forwards and backwards, block by block."""

    model: BlockModel
    windows: TokenWindows
    directory: Path
    tensors: frozenset[str]

    def run(self) -> list[str]:
        """Return the names of what is written; see MeasureOutputs."""
        blocks = len(self.model.blocks)
        begun = min(self._saved("scores"), default=None)
        head = sums_name(self.model.head_name, "head")
        if self.model.head_name in self.tensors and not sums_readable(factor_file(self.directory, head)):
            begun = None
        if begun is None:
            self._forward()
            self._save("scores", blocks, self._head(self._load("inputs", blocks)))
            begun = blocks
        for block in steps(reversed(range(begun)), blocks, "block", done=blocks - begun):
            scores = self._block(block, self._load("scores", block + 1))
            self._save("scores", block, scores)  # before what it was made of is removed
            self._remove(block + 1)
            release_memory()
        self._lookups(self._load("scores", 0))
        self._remove(0)
        sums = [sums_name(name, role) for name in self.tensors for role in ROLES]
        found = [name for name in self.tensors if factor_readable(factor_file(self.directory, name))]
        return sorted(found + [name for name in sums if sums_readable(factor_file(self.directory, name))])

    def _parts(self, states: Tensor) -> Iterator[Tensor]:
        """Yield ``states`` (n, T, ...) in parts of whole windows on the model's device."""
        for part in states.split(part_windows(states)):
            yield part.to(self.model.device)

    @torch.no_grad()
    def _forward(self) -> None:
        """Write the input of every block, and the output of the last as the input of what follows."""
        model, blocks = self.model, len(self.model.blocks)
        reached = max(self._saved("inputs"), default=None)
        if reached is None:
            model.load_embedding()
            self._save("inputs", 0, torch.cat([model.embed(part).cpu() for part in self._parts(self._ids())]))
            for name in model.lookup_names:
                model.place(name, None)
            reached = 0
        for block in range(reached, blocks):
            with at_hand(model, block):
                outputs = [model.run_block(block, part).cpu() for part in self._parts(self._load("inputs", block))]
            self._save("inputs", block + 1, torch.cat(outputs))

    def _ids(self) -> Tensor:
        """Return the token ids (n, T) of the text."""
        text = self.windows.windows["calibration"]
        return torch.from_numpy(text[: -(-FACTOR_TOKENS // text.shape[1])])

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the scores (n, T, D) at the last block's output ``hidden`` (n, T, D); sum for the head's rows."""
        self.model.load_head()
        draws, name = label_draws(0, *hidden.shape[:2]), self.model.head_name
        sums = self._sums(name) if name in self.tensors else None
        found = []
        for part, uniform in zip(self._parts(hidden), self._parts(draws), strict=True):
            use, scores = head_scores(self.model, part, uniform, self.windows.unscored)
            found.append(scores.cpu())
            if sums is not None:
                scored = use.scores.any(-1)
                for states, weights in row_weights(self.model.head, use.inputs[scored]):
                    sums.add_outputs(states, weights)
        if sums is not None:
            save_sums(factor_file(self.directory, sums_name(name, "head")), sums.result())
        return torch.cat(found)

    def _lookups(self, scores: Tensor) -> None:
        """Sum for the rows of the tables that tokens look up; ``scores`` (n, T, D) are at the first block's input."""
        model = self.model
        names = [name for name in model.lookup_names if name in self.tensors]
        if not names:
            return
        model.load_embedding()
        sums = {name: self._sums(name) for name in names}
        for ids, part in zip(self._parts(self._ids()), self._parts(scores), strict=True):
            for name, at_rows in model.lookup_gradients(ids, part).items():
                if name in sums:
                    sums[name].add_rows(ids.flatten(), at_rows.flatten(0, 1))
        for name, found in sums.items():
            save_sums(factor_file(self.directory, sums_name(name, "lookup")), found.result())

    def _sums(self, name: str) -> RowAccumulator:
        """Return an accumulator for the rows of a loaded tensor, in the groups that an earlier use has."""
        weight = self.model.weight(name).data
        for role in ROLES:
            if sums_readable(path := factor_file(self.directory, sums_name(name, role))):
                return RowAccumulator(load_labels(path).to(weight.device), weight.shape[1])
        counts = torch.from_numpy(np.bincount(self.windows.windows["calibration"].ravel(), minlength=len(weight)))
        groups = number_of_groups(*weight.shape)
        return RowAccumulator(grouped_rows(weight, counts.to(weight.device), groups), weight.shape[1])

    def _block(self, block: int, scores: Tensor) -> Tensor:
        """Write the factors of a block's tensors, and return the scores at its input given those at its output."""
        found: dict[str, FactorAccumulator] = {}
        below = []
        inputs = self._load("inputs", block)
        with at_hand(self.model, block):
            names = [name for name, _ in self.model.linears(block) if name in self.tensors]
            count = -(-len(inputs) // part_windows(inputs))
            for index, (part, at_output) in enumerate(zip(self._parts(inputs), self._parts(scores), strict=True)):
                half = None if count == 1 else int(2 * index >= count)
                at_input, uses = block_uses(self.model, block, part, at_output)
                below.append(at_input.cpu())
                for use in (use for use in uses if use.name in self.tensors):
                    if use.name not in found:
                        found[use.name] = FactorAccumulator(use.scores.shape[-1], self.model.device)
                    found[use.name].add(use, half)
        for name, factor in factors(found, names):
            save_factor(factor_file(self.directory, name), factor)
        return torch.cat(below)

    def _file(self, kind: str, block: int) -> Path:
        return self.directory / f"{kind}-{block}.safetensors"

    def _save(self, kind: str, block: int, states: Tensor) -> None:
        with replacing(self._file(kind, block)) as temporary:
            save_file({STATES: states.float().contiguous()}, temporary)

    def _saved(self, kind: str) -> list[int]:
        """Return the blocks whose states of a kind are there and whole."""
        blocks = range(len(self.model.blocks) + 1)
        return [block for block in blocks if holds_tensors(self._file(kind, block), [STATES])]

    def _load(self, kind: str, block: int) -> Tensor:
        """Return the states (n, T, D). Raises UserError if they are not there, or damaged."""
        path = self._file(kind, block)
        try:
            return load_file(path)[STATES]
        except (OSError, SafetensorError) as error:
            raise UserError(f"expected hidden states in {path}, found {error}: the next attempt goes on") from None

    def _remove(self, first: int) -> None:
        """Remove the states of blocks from ``first`` on."""
        for file in self.directory.iterdir():
            if (found := NAME.fullmatch(file.name)) and int(found[2]) >= first:
                file.unlink(missing_ok=True)
