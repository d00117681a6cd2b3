"""This module measures Hessians and moments of the inputs of all linear layers, with one block in memory at a time.

Linear layers that read the same tensor (q/k/v, gate/up) form one input group and share one Hessian.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save
from torch import Tensor, nn

from bitgenome.common.cpus import usable_cpus
from bitgenome.common.devices import best_device
from bitgenome.common.files import atomic_write_bytes
from evaluators.data.windows import TokenWindows
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, ModelFolderError
from quantizers.formats.table import format_for
from quantizers.rounding.sparsegpt import compensate
from quantizers.statistics.hessian import HessianAccumulator
from quantizers.statistics.moments import InputStatistics, StatisticsAccumulator

log = logging.getLogger(__name__)

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
        atomic_write_bytes(path, save({key: t.float().cpu().contiguous() for key, t in members.items()}, metadata))

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
            hessian, statistics = self.accumulators[group].result()
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
    chunks = windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))
    model.load_ends()
    hidden = [model.embed(chunk).cpu() for chunk in chunks]
    for block in range(len(model.blocks)):
        model.load_block(block)
        recorder = _InputRecorder(dict(model.linears(block)))
        inputs = hidden if upstream_level is None else list(hidden)  # kept if the block runs again, quantized
        for index, chunk in enumerate(inputs):
            hidden[index] = model.run_block(block, chunk.to(device)).cpu()
            recorder.end_pass()
        groups = list(recorder.groups())
        yield from groups
        if upstream_level is not None:
            quantize_block(model, groups, upstream_level)
            hidden = [model.run_block(block, chunk.to(device)).cpu() for chunk in inputs]
        model.unload_block(block)
        log.info("calibrated block %d of %d", block + 1, len(model.blocks))
    head = _InputAccumulator(hidden[0].shape[-1], device)
    for chunk in hidden:
        head.add(model.decoder.norm(chunk.to(device)), model.head_name)
    yield from embedding_groups(model, *head.result())


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
    """Pool task that writes the input groups of a model, on every core: no other task runs at the same time."""

    model: Path
    windows: Path  # file of TokenWindows
    directory: Path
    upstream_level: str | None = None

    @property
    def label(self) -> str:
        return "calibrate"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> list[str]:
        """Write a file for each input group and return the names of the groups, in order."""
        windows = torch.from_numpy(TokenWindows.load(self.windows).windows["calibration"])
        threads = torch.get_num_threads()
        torch.set_num_threads(usable_cpus())
        try:
            names = []
            for group in calibrate(ModelFolder(self.model), windows, best_device(), self.upstream_level):
                group.save(group_file(self.directory, group.name))
                names.append(group.name)
        finally:
            torch.set_num_threads(threads)
        return names
