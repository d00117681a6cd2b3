"""This module measures Hessians and moments of the inputs of all linear layers, with one block in memory at a time."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgenome.common.devices import all_cores, best_device, release_memory
from bitgenome.common.steps import steps
from evaluators.data.windows import TokenWindows
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.prepare.hidden_states import HiddenStates, joined, remove_states, saved_blocks
from evaluators.prepare.input_group import InputGroup, group_file, group_readable
from evaluators.prepare.input_recorder import InputAccumulator, InputRecorder
from quantizers.formats.table import format_for
from quantizers.rounding.sparsegpt import compensate
from quantizers.statistics.moments import InputStatistics

log = logging.getLogger(__name__)

SAVE_EVERY_S = 10.0  # seconds of work that an interruption may cost, beside a block's
CHUNK_TOKENS = 4096  # positions in a chunk, which goes through a block at once
# A tied embedding serves as head (columns weighted by the Hessian of final hidden states) and as lookup table (all
# columns equal), so its Hessian is the head's, scaled to a mean diagonal of 1, plus this multiple of the identity.
# Validation KL of the embedded model with only the embedding at Q2_K: .0942 at 0, .0898 at 0.3, .0906 at 1, .1005 at 3,
# .1236 at 30; at Q4_K .00568, .00539, .00568, .00604, .00783.
LOOKUP_WEIGHT = 0.3


def embedding_groups(model: BlockModel, H: Tensor, statistics: InputStatistics) -> Iterator[InputGroup]:
    """Yield the input groups of the head and of the tables that token ids look up; that of a tied embedding once.

    H (D, D) and ``statistics`` (D,) are those of the head's input, the final hidden states. A tied embedding takes them
    as ``LOOKUP_WEIGHT`` says. What is only looked up has the identity as its Hessian.
    """
    name = model.head_name.removesuffix(".weight")
    if model.folder.tied:
        identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
        H = H / H.diagonal().mean() + LOOKUP_WEIGHT * identity
    yield InputGroup(name, (model.head_name,), H, statistics)
    for table in model.lookup_names:
        if table != model.head_name:
            columns = model.folder.shapes[table][1]
            identity = torch.eye(columns, dtype=H.dtype, device=H.device)
            lookup = InputStatistics.of_lookup(columns, H.device)
            yield InputGroup(table.removesuffix(".weight"), (table,), identity, lookup)


@torch.inference_mode()
def calibrate(
    folder: ModelFolder,
    windows: Tensor,
    device: torch.device,
    upstream_level: str | None = None,
    left_out: Collection[str] = (),
) -> Iterator[InputGroup]:
    """Yield the input groups of the whole model in order, from token ids ``windows`` (n, T).

    One block is in memory at a time. The inputs of every block are those of the full-precision model (parallel
    calibration). With an ``upstream_level`` such as "W3" they are those of a model whose earlier blocks are quantized
    to that level (sequential calibration, as in GPTQ). Inputs that only tensors of ``left_out`` read are not measured.
    Raises ModelFolderError for activations that are not finite, and
    for a folder that cannot be run block by block.
    """
    model = BlockModel(folder, device)
    hidden = embedded(model, windows)
    for block in range(len(model.blocks) + 1):
        yield from calibrate_block(model, block, hidden, upstream_level, left_out=left_out)


def embedded(model: BlockModel, windows: Tensor) -> list[Tensor]:
    """Return the inputs of the first block for token ids ``windows`` (n, T), in chunks; the embedding is freed."""
    model.load_embedding()
    hidden = [model.embed(chunk).cpu() for chunk in chunked_windows(windows)]
    for name in model.lookup_names:
        model.place(name, None)
    return hidden


def chunked_windows(windows: Tensor) -> tuple[Tensor, ...]:
    """Return ``windows`` (n, T, ...) in chunks of whole windows, each of which goes through a block at once."""
    return windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))


def calibrate_block(
    model: BlockModel,
    block: int,
    hidden: list[Tensor],
    upstream_level: str | None = None,
    measure: bool = True,
    left_out: Collection[str] = (),
) -> list[InputGroup]:
    """Return the input groups of a block, and replace its inputs ``hidden`` (chunks of windows) by its outputs.

    The number after the last block stands for head and embedding. Without ``measure`` nothing is returned. Tensors of
    ``left_out`` stay as they are, and nothing is measured of what they alone read.
    """
    if block == len(model.blocks):
        model.load_norm()
        head = InputAccumulator(model.hidden_width, model.device)
        for chunk in hidden:
            head.add(model.norm(chunk.to(model.device)), model.head_name)
        return list(embedding_groups(model, *head.result()))
    model.load_block(block)
    linears = {name: module for name, module in model.linears(block) if name not in left_out}
    recorder = InputRecorder(linears if measure or upstream_level else {})
    inputs = hidden if upstream_level is None else list(hidden)  # kept if the block runs again, quantized
    for index, chunk in enumerate(inputs):
        hidden[index] = model.run_block(block, chunk.to(model.device)).cpu()
        recorder.end_pass()
    groups = list(recorder.groups())
    if upstream_level is not None:
        quantize_block(model, groups, upstream_level)
        hidden[:] = [model.run_block(block, chunk.to(model.device)).cpu() for chunk in inputs]
    model.unload_block(block)
    del recorder
    release_memory()  # else what allocators keep grows from block to block
    log.info("calibrated block %d of %d", block + 1, len(model.blocks))
    return groups if measure else []


def quantize_block(model: BlockModel, groups: Sequence[InputGroup], level: str) -> None:
    """Quantize a loaded block, whose input groups are ``groups``, to ``level`` and load what the bytes decode to."""
    for group in groups:
        fmt = format_for(level, len(group.hessian))
        weights = {name: model.weight(name).data for name in group.tensors}
        results = compensate(weights, dict.fromkeys(weights, (fmt,)), group.hessian)
        for name, formats in results.items():
            model.weight(name).data = formats[fmt.name].packed.dequantize()


@dataclass(frozen=True)
class Calibrate:
    """Pool task that writes the input groups of a model, on every core: no other task runs at the same time.

    From ``start`` to before ``stop`` are the blocks that are measured; the number after the last block stands for head
    and embedding, and without ``stop`` all are measured. An interrupted task, and one for the blocks after it, goes on
    from the hidden states saved in ``directory`` at most SAVE_EVERY_S seconds and a block before.
    """

    model: Path
    windows: Path  # file of TokenWindows
    directory: Path
    upstream_level: str | None = None
    start: int = 0
    stop: int | None = None
    states: Path | None = None  # in ``directory``: hidden states to go on from, which other machines fetch
    left_out: frozenset[str] = frozenset()  # tensors that are not searched

    @property
    def label(self) -> str:
        return "calibrate" if self.stop is None else f"calibrate[{self.start}:{self.stop}]"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> dict[str, int]:
        """Write a file for each input group and return the groups' names, in order, each with its block."""
        with all_cores(), torch.inference_mode():
            return self._run(BlockModel(ModelFolder(self.model), best_device()))

    def _run(self, model: BlockModel) -> dict[str, int]:
        end = len(model.blocks) + 1
        stop = end if self.stop is None else self.stop
        first, groups, hidden = self._begin(model, stop)
        saved = time.monotonic()
        for block in steps(range(first, stop), stop, "block", done=first):
            measure = block >= self.start
            found = calibrate_block(model, block, hidden, self.upstream_level, measure, self.left_out)
            while found:  # one after the other, so that no Hessian is there when the next block begins
                group = found.pop(0)
                group.save(group_file(self.directory, group.name))
                groups[group.name] = block
                del group
            after = block + 1
            passed_on = after == self.stop  # to the task for the blocks after them
            if passed_on or (after < end and time.monotonic() - saved >= SAVE_EVERY_S):
                HiddenStates(after, self.start, groups, joined(hidden)).save(self.directory)
                saved = time.monotonic()
        if self.stop is None:
            remove_states(self.directory)
        return groups

    def _begin(self, model: BlockModel, stop: int) -> tuple[int, dict[str, int], list[Tensor]]:
        """Return the block to go on with, the input groups that are written already, and the block's inputs."""
        for block in saved_blocks(self.directory):
            states = HiddenStates.load(self.directory, block) if block <= stop else None
            if states is None:
                continue
            groups = dict(states.groups) if block > self.start else {}
            if block <= self.start or (states.start == self.start and self._all_written(groups)):
                return block, groups, list(chunked_windows(states.hidden))
        windows = torch.from_numpy(TokenWindows.load(self.windows).windows["calibration"])
        return 0, {}, embedded(model, windows)

    def _all_written(self, groups: Mapping[str, int]) -> bool:
        return all(group_readable(group_file(self.directory, name)) for name in groups)
