"""This module measures Hessians and moments of the inputs of all linear layers, with one block in memory at a time.

Linear layers that read the same tensor (q/k/v, gate/up) form one input group and share one Hessian.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save, save_file
from torch import Tensor, nn

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.devices import best_device, release_memory
from bitgenome.common.files import atomic_write_bytes, replacing
from bitgenome.common.steps import steps
from evaluators.data.windows import TokenWindows
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.prepare.hidden_states import HiddenStates, joined, remove_states, saved_blocks
from quantizers.formats.table import format_for
from quantizers.rounding.sparsegpt import compensate
from quantizers.statistics.hessian import HessianAccumulator
from quantizers.statistics.moments import InputStatistics, StatisticsAccumulator

log = logging.getLogger(__name__)

SAVE_EVERY_S = 10.0  # seconds of work that an interruption may cost, beside a block's
CHUNK_TOKENS = 4096  # positions in a chunk, which goes through a block at once
# A tied embedding serves as head (columns weighted by the Hessian of final hidden states) and as lookup table (all
# columns equal), so its Hessian is the head's, scaled to a mean diagonal of 1, plus this multiple of the identity.
# Validation KL of the embedded model with only the embedding at Q2_K: .0942 at 0, .0898 at 0.3, .0906 at 1, .1005 at 3,
# .1236 at 30; at Q4_K .00568, .00539, .00568, .00604, .00783.
LOOKUP_WEIGHT = 0.3


@dataclass(frozen=True)
class InputGroup:
    """Holds the names of the tensors (rows, columns) that multiply one input, and what was measured of that input.

    ``hessian`` is (columns, columns), ``statistics`` are the moments (columns,) of each feature. ``name`` is the first
    tensor's without ".weight".
    """

    name: str
    tensors: tuple[str, ...]
    hessian: Tensor
    statistics: InputStatistics

    def save(self, path: Path) -> None:
        """Write the group atomically as a safetensors file, in float32."""
        metadata = {"name": self.name, "tensors": "\n".join(self.tensors)}
        members = {"hessian": self.hessian, **self.statistics.tensors()}
        with replacing(path) as temporary:  # without a copy in memory: the Hessian may take gigabytes
            save_file({key: t.float().cpu().contiguous() for key, t in members.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> "InputGroup":
        """Read a group from a file of ``save``, onto the CPU."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            statistics = InputStatistics(**{f.name: file.get_tensor(f.name) for f in fields(InputStatistics)})
            tensors = tuple(metadata["tensors"].split("\n"))
            return cls(metadata["name"], tensors, file.get_tensor("hessian"), statistics)


def group_file(directory: Path, name: str) -> Path:
    """Return the path of the input group ``name`` in ``directory``."""
    return directory / f"{name}.safetensors"


def mean_squares(path: Path) -> Tensor:
    """Return the mean square (columns,) of each input feature from an input group's file, without its Hessian."""
    with safe_open(path, framework="pt") as file:
        values: Tensor = file.get_tensor("mean_square")
    return values


def group_readable(path: Path) -> bool:
    """Return whether the file of an input group exists and is complete."""
    try:
        with safe_open(path, framework="pt") as file:
            return {"hessian", "mean_square"} <= set(file.keys())
    except (OSError, SafetensorError):
        return False


def statistics_readable(path: Path) -> bool:
    """Return whether a file holds the moments of an input group, with its Hessian or without it."""
    try:
        with safe_open(path, framework="pt") as file:
            return {"tensors", "name"} <= set(file.metadata() or ()) and "mean_square" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def copy_statistics(source: Path, target: Path) -> None:
    """Write to ``target`` all that ``source``, the file of an input group, holds beside the Hessian."""
    with safe_open(source, framework="pt") as file:
        members = {key: file.get_tensor(key) for key in file.keys() if key != "hessian"}  # noqa: SIM118
        atomic_write_bytes(target, save(members, file.metadata()))


class _InputAccumulator:
    """Accumulates the Hessian and the moments of one input."""

    def __init__(self, columns: int, device: torch.device):
        self._hessian = HessianAccumulator(columns, device)
        self._moments = StatisticsAccumulator(columns, device)

    def add(self, x: Tensor, reader: str) -> None:
        """Add inputs x (..., columns).

        Raises ModelFolderError for a value that is not finite, naming ``reader``, the tensor that multiplies x.
        """
        if not x.isfinite().all():
            raise ModelFolderError(
                f"expected finite activations, found {int((~x.isfinite()).sum())} of {x.numel()} not finite in the "
                f"input of {reader}"
            )
        self._hessian.add(x)
        self._moments.add(x)

    def result(self) -> tuple[Tensor, InputStatistics]:
        return self._hessian.matrix(), self._moments.statistics()


class _InputRecorder:
    """Accumulates Hessians and moments of the inputs of one block's linear layers while the block runs.

    Layers belong to one input group if they read the same memory within a pass.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]):
        self.accumulators: dict[int, _InputAccumulator] = {}
        self.members: dict[int, list[str]] = {}
        self._alive: list[Tensor] = []  # inputs of this pass, kept so that their addresses are not reused
        self._addresses: dict[int, int] = {}
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in linears.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            group = self._addresses.get(x.data_ptr())
            if group is None:  # groups are numbered in the order of the pass, which all passes share
                group = self._addresses[x.data_ptr()] = len(self._addresses)
                self._alive.append(x)
                accumulator = self.accumulators.setdefault(group, _InputAccumulator(x.shape[-1], x.device))
                accumulator.add(x, name)
            members = self.members.setdefault(group, [])
            if name not in members:
                members.append(name)

        return record

    def end_pass(self) -> None:
        """Release the inputs of the pass; call it after every chunk."""
        self._alive.clear()
        self._addresses.clear()

    def groups(self) -> Iterator[InputGroup]:
        """Remove the hooks and yield the input groups in the order in which the block reads them."""
        for handle in self._handles:
            handle.remove()
        for group, members in self.members.items():
            hessian, statistics = self.accumulators.pop(group).result()
            if not statistics.mean_square.any():
                for name in members:
                    log.warning("the input of %s is always zero: all of its columns are rounded alike", name)
            yield InputGroup(members[0].removesuffix(".weight"), tuple(members), hessian, statistics)


def embedding_groups(model: BlockModel, H: Tensor, statistics: InputStatistics) -> Iterator[InputGroup]:
    """Yield the input groups of head and embedding: one if they are tied, else two.

    H (D, D) and ``statistics`` (D,) are those of the head's input, the final hidden states. A tied embedding takes them
    as ``LOOKUP_WEIGHT`` says. An untied embedding is only a lookup table: its Hessian is the identity.
    """
    name = model.head_name.removesuffix(".weight")
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    if model.folder.tied:
        yield InputGroup(name, (model.head_name,), H / H.diagonal().mean() + LOOKUP_WEIGHT * identity, statistics)
    else:
        yield InputGroup(name, (model.head_name,), H, statistics)
        lookup = InputStatistics.of_lookup(len(H), H.device)
        yield InputGroup(model.embedding_name.removesuffix(".weight"), (model.embedding_name,), identity, lookup)


@torch.inference_mode()
def calibrate(
    folder: ModelFolder, windows: Tensor, device: torch.device, upstream_level: str | None = None
) -> Iterator[InputGroup]:
    """Yield the input groups of the whole model in order, from token ids ``windows`` (n, T).

    One block is in memory at a time. The inputs of every block are those of the full-precision model (parallel
    calibration). With an ``upstream_level`` such as "W3" they are those of a model whose earlier blocks are quantized
    to that level (sequential calibration, as in GPTQ). Raises ModelFolderError for activations that are not finite, and
    for a folder that cannot be run block by block.
    """
    model = BlockModel(folder, device)
    hidden = embedded(model, windows)
    for block in range(len(model.blocks) + 1):
        yield from calibrate_block(model, block, hidden, upstream_level)


def embedded(model: BlockModel, windows: Tensor) -> list[Tensor]:
    """Return the inputs of the first block for token ids ``windows`` (n, T), in chunks; the embedding is freed."""
    model.load_embedding()
    hidden = [model.embed(chunk).cpu() for chunk in chunked_windows(windows)]
    model.place(model.embedding_name, None)
    return hidden


def chunked_windows(windows: Tensor) -> tuple[Tensor, ...]:
    """Return ``windows`` (n, T, ...) in chunks of whole windows, each of which goes through a block at once."""
    return windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))


def calibrate_block(
    model: BlockModel, block: int, hidden: list[Tensor], upstream_level: str | None = None, measure: bool = True
) -> list[InputGroup]:
    """Return the input groups of a block, and replace its inputs ``hidden`` (chunks of windows) by its outputs.

    The number after the last block stands for head and embedding. Without ``measure`` nothing is returned.
    """
    if block == len(model.blocks):
        model.load_norm()
        head = _InputAccumulator(hidden[0].shape[-1], model.device)
        for chunk in hidden:
            head.add(model.norm(chunk.to(model.device)), model.head_name)
        return list(embedding_groups(model, *head.result()))
    model.load_block(block)
    recorder = _InputRecorder(dict(model.linears(block)) if measure or upstream_level else {})
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

    @property
    def label(self) -> str:
        return "calibrate" if self.stop is None else f"calibrate[{self.start}:{self.stop}]"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> dict[str, int]:
        """Write a file for each input group and return the groups' names, in order, each with its block."""
        threads = torch.get_num_threads()
        torch.set_num_threads(usable_cpus())
        try:
            with torch.inference_mode():
                return self._run(BlockModel(ModelFolder(self.model), best_device()))
        finally:
            torch.set_num_threads(threads)

    def _run(self, model: BlockModel) -> dict[str, int]:
        end = len(model.blocks) + 1
        stop = end if self.stop is None else self.stop
        first, groups, hidden = self._begin(model, stop)
        saved = time.monotonic()
        for block in steps(range(first, stop), stop, "block", done=first):
            found = calibrate_block(model, block, hidden, self.upstream_level, measure=block >= self.start)
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
