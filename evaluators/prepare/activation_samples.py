"""This module samples the inputs of linear layers at a bounded number of positions of calibration text.

Each input group has one safetensors file with ``inputs``, float32 (n, columns), written only for options that need
samples. The mutual information of a group's channels is computed on demand and stored beside that file.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save
from torch import Tensor, nn

from bitgenome.common.devices import best_device
from bitgenome.common.files import atomic_write_bytes
from bitgenome.common.tensor_files import holds_tensors
from evaluators.data.documents import TextError
from evaluators.data.windows import TokenWindows
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import chunked
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.input_group import group_file
from quantizers.statistics.mutual_information import Estimate, PairwiseInformation, pairwise_information

STRIDE = 8  # positions between samples of a window, if there is enough text: neighbouring positions are similar


@dataclass(frozen=True)
class SampleActivations:
    """Pool task that writes ``samples`` samples of the input of every input group.

    An untied embedding reads no activations, so its group has no samples.
    """

    model: Path
    windows: Path  # file of TokenWindows
    groups: tuple[Path, ...]  # files of the input groups
    directory: Path
    samples: int

    @property
    def label(self) -> str:
        return "sample activations"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> None:
        """Write one file per input group. Raises TextError if there are fewer calibration tokens than samples."""
        windows = torch.from_numpy(TokenWindows.load(self.windows).windows["calibration"])
        model = BlockModel(ModelFolder(self.model), best_device())
        firsts = {group_tensors(file)[0]: file.stem for file in self.groups}
        for name, inputs in sampled_inputs(model, windows, self.samples, list(firsts)):
            content = save({"inputs": inputs.float().cpu().contiguous()})
            atomic_write_bytes(group_file(self.directory, firsts[name]), content)


def sample_positions(windows: int, window: int, samples: int) -> tuple[int, list[int]]:
    """Return how many windows to read, and the positions to sample in each, for at least ``samples`` samples.

    There are ``windows`` windows of ``window`` tokens. Raises TextError if that is fewer tokens than ``samples``.
    """
    if samples > windows * window:
        raise TextError(
            f"expected at least {samples} tokens of calibration text for as many samples, found {windows * window}"
        )
    each = max(math.ceil(window / STRIDE), math.ceil(samples / windows))
    return math.ceil(samples / each), [window * (2 * i + 1) // (2 * each) for i in range(each)]


@torch.inference_mode()
def sampled_inputs(
    model: BlockModel, windows: Tensor, samples: int, tensors: Sequence[str]
) -> "list[tuple[str, Tensor]]":
    """Return (name, inputs float32 (samples, columns)) for each of ``tensors`` that is a linear layer or the head.

    ``windows`` are token ids (N, T); one block is in memory at a time. Raises TextError if they hold fewer than
    ``samples`` tokens.
    """
    rows, positions = sample_positions(len(windows), windows.shape[1], samples)
    model.load_ends()
    hidden = chunked(model.embed, windows[:rows])
    found: dict[str, list[Tensor]] = {}
    for block in range(len(model.blocks)):
        model.load_block(block)
        linears = {name: module for name, module in model.linears(block) if name in tensors}
        handles = [m.register_forward_pre_hook(_recorder(found, name, positions)) for name, m in linears.items()]
        hidden = chunked(partial(model.run_block, block), hidden)
        for handle in handles:
            handle.remove()
        model.unload_block(block)
    if model.head_name in tensors:
        found[model.head_name] = [model.norm(hidden)[:, positions].flatten(0, 1)]
    return [(name, torch.cat(parts)[:samples]) for name, parts in found.items()]


def _recorder(found: dict[str, list[Tensor]], name: str, positions: list[int]) -> Any:
    """Return a forward pre-hook that adds the inputs at ``positions`` of every window to ``found[name]``."""

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault(name, []).append(inputs[0][:, positions].flatten(0, 1).clone())

    return record


@dataclass(frozen=True)
class SampledInput:
    """Reads the samples of one input group, and the mutual information of its channels, from files."""

    path: Path

    def inputs(self) -> Tensor:
        """Return the samples, float32 (n, columns)."""
        return load_file(self.path)["inputs"]

    def information(self, estimate: Estimate, bins: int) -> tuple[PairwiseInformation, float]:
        """Return the mutual information of the channels, and the seconds that it took to compute.

        It is computed and stored on the first call for an ``estimate`` and number of ``bins``, then read. Raises
        ValueError for fewer than two samples or bins, and for samples that are not finite.
        """
        path = self.path.with_suffix(f".{estimate}-{bins}.safetensors")
        if not readable(path, "information"):
            started = time.perf_counter()
            found = pairwise_information(self.inputs().to(best_device()), estimate, bins)
            tensors = {"information": found.information.cpu(), "entropy": found.entropy.cpu()}
            atomic_write_bytes(path, save(tensors, {"seconds": f"{time.perf_counter() - started:.3f}"}))
        with safe_open(path, framework="pt") as file:
            seconds = float(file.metadata()["seconds"])
            return PairwiseInformation(file.get_tensor("information"), file.get_tensor("entropy")), seconds


def readable(path: Path, tensor: str = "inputs") -> bool:
    """Return whether the safetensors file ``path`` exists, is complete and holds ``tensor``."""
    return holds_tensors(path, [tensor])


def sampled_input(directory: Path, group: str) -> SampledInput | None:
    """Return the samples of a group in ``directory``; None for a group that reads no activations."""
    path = group_file(directory, group)
    return SampledInput(path) if path.is_file() else None


def layer_series(folder: ModelFolder, directory: Path, groups: Mapping[str, Sequence[str]]) -> tuple[list[str], Tensor]:
    """Return tensor names and, for each, the logarithm of its output's norm at every sample: float32 (n, tensors).

    ``groups`` maps input groups to the tensors that read them; groups without samples in ``directory`` are left out.
    Weights are read from ``folder``, one tensor at a time.
    """
    names, series = [], []
    for group, tensors in groups.items():
        sampled = sampled_input(directory, group)
        if sampled is None:
            continue
        parts = sampled.inputs().split(256)
        for name in tensors:
            W = folder.read(name).float()
            names.append(name)
            series.append(torch.cat([(part @ W.T).norm(dim=1) for part in parts]))
    tiny = torch.finfo(torch.float32).tiny
    return names, torch.stack(series, 1).clamp(min=tiny).log()
