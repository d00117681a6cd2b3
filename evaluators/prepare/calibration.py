"""Hessians and moments of every linear input, block by block: memory of one block, whatever the depth.

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

CHUNK_TOKENS = 4096  # positions that go through a block at once
# A tied embedding is read as head (columns weighted by the Hessian of final hidden states) and as lookup table (all
# columns alike), so its Hessian is the head's, scaled to a mean diagonal of 1, plus this multiple of the identity.
# Validation KL of the embedded model with only the embedding at Q2_K: .0942 at 0, .0898 at 0.3, .0906 at 1, .1005 at 3,
# .1236 at 30; at Q4_K .00568, .00539, .00568, .00604, .00783.
LOOKUP_WEIGHT = 0.3


@dataclass(frozen=True)
class InputGroup:
    """Tensors (rows, columns) that multiply the same input, that input's Hessian (columns, columns) and moments."""

    name: str
    tensors: tuple[str, ...]
    hessian: Tensor
    statistics: InputStatistics

    def save(self, path: Path) -> None:
        metadata = {"name": self.name, "tensors": "\n".join(self.tensors)}
        members = {"hessian": self.hessian, **self.statistics.tensors()}
        atomic_write_bytes(path, save({key: t.float().cpu().contiguous() for key, t in members.items()}, metadata))

    @classmethod
    def load(cls, path: Path) -> "InputGroup":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            statistics = InputStatistics(**{f.name: file.get_tensor(f.name) for f in fields(InputStatistics)})
            tensors = tuple(metadata["tensors"].split("\n"))
            return cls(metadata["name"], tensors, file.get_tensor("hessian"), statistics)


def group_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.safetensors"


def mean_squares(path: Path) -> Tensor:
    """(columns,) of an input group's file, read without its Hessian."""
    with safe_open(path, framework="pt") as file:
        values: Tensor = file.get_tensor("mean_square")
    return values


def group_readable(path: Path) -> bool:
    """Whether the file of an input group is there and whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return {"hessian", "mean_square"} <= set(file.keys())
    except (OSError, SafetensorError):
        return False


class _InputAccumulator:
    """Hessian and moments of one input."""

    def __init__(self, columns: int, device: torch.device):
        self._hessian = HessianAccumulator(columns, device)
        self._moments = StatisticsAccumulator(columns, device)

    def add(self, x: Tensor, reader: str) -> None:
        """Raises ModelFolderError for a value that is not finite, naming ``reader``, the tensor that multiplies x."""
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
    """Collects the Hessians of one block's linear inputs while the block runs."""

    def __init__(self, linears: Mapping[str, nn.Linear]):
        self.accumulators: dict[int, _InputAccumulator] = {}
        self.members: dict[int, list[str]] = {}
        self._alive: list[Tensor] = []  # inputs of this pass, kept so that no address is used twice
        self._addresses: dict[int, int] = {}
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in linears.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            group = self._addresses.get(x.data_ptr())
            if group is None:  # the group's number is its order within the pass, the same in every pass
                group = self._addresses[x.data_ptr()] = len(self._addresses)
                self._alive.append(x)
                accumulator = self.accumulators.setdefault(group, _InputAccumulator(x.shape[-1], x.device))
                accumulator.add(x, name)
            members = self.members.setdefault(group, [])
            if name not in members:
                members.append(name)

        return record

    def end_pass(self) -> None:
        self._alive.clear()
        self._addresses.clear()

    def groups(self) -> Iterator[InputGroup]:
        for handle in self._handles:
            handle.remove()
        for group, members in self.members.items():
            yield InputGroup(members[0].removesuffix(".weight"), tuple(members), *self.accumulators[group].result())


def embedding_groups(model: BlockModel, H: Tensor, statistics: InputStatistics) -> Iterator[InputGroup]:
    """Groups of embedding and head from the head's own input; see ``LOOKUP_WEIGHT`` for the tied one.

    An untied embedding is only a lookup table: its Hessian is the identity.
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
    """Input groups of the whole model in order, from token windows (n, T); one block is in memory at a time.

    The inputs of every block are those of the full-precision model (parallel calibration), or, with an
    ``upstream_level`` such as "W3", those of a model whose earlier blocks are quantized so (sequential calibration, as
    in GPTQ).
    """
    model = BlockModel(folder, device)
    chunks = windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))
    model.load_ends()
    hidden = [model.embed(chunk).cpu() for chunk in chunks]
    for block in range(len(model.blocks)):
        model.load_block(block)
        recorder = _InputRecorder(dict(model.linears(block)))
        inputs = hidden if upstream_level is None else list(hidden)  # kept only where the block runs once more
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
    """Replace the weights of a loaded block by what they decode to at ``level``."""
    for group in groups:
        fmt = format_for(level, len(group.hessian))
        weights = {name: model.weight(name).data for name in group.tensors}
        results = compensate(weights, dict.fromkeys(weights, (fmt,)), group.hessian)
        for name, formats in results.items():
            model.weight(name).data = formats[fmt.name].packed.dequantize()


@dataclass(frozen=True)
class Calibrate:
    """Pool task: write the input groups of a model; uses every core of its machine, as nothing else runs meanwhile."""

    model: Path
    windows: Path  # file of TokenWindows
    directory: Path
    upstream_level: str | None = None

    @property
    def label(self) -> str:
        return "calibrate"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Where it writes."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> list[str]:
        """Names of the groups, in order."""
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
