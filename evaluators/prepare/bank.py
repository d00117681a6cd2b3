"""The bank holds every tensor at every level, as the packed bytes that the GGUF file will hold, with its errors.

Each tensor has one safetensors file, with the errors in its header; ``manifest.json`` lists the files' sha256.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save
from torch import Tensor
from torch.nn.functional import pad

from bitgenome.common import layout
from bitgenome.common.devices import ACCELERATOR_CHUNK, best_device, chunk_bytes
from bitgenome.common.digests import digest_of, digest_of_file, digests_of_files
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.common.tensor_files import holds_tensors
from evaluators.model.folder import ModelFolder
from evaluators.prepare.input_group import InputGroup
from evaluators.prepare.output_factor import load_factor, tensor_of
from evaluators.prepare.row_hessians import load_all_sums, summed_tensor
from quantizers.formats.packed_tensor import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from quantizers.kernels.choice import ENABLED
from quantizers.rounding.nearest import rows_at_once
from quantizers.rounding.pruned_sparsegpt import prune_and_compensate
from quantizers.rounding.row_batches import STACK_BYTES, recorded_rows
from quantizers.rounding.row_choice import Compensated, bytes_errors, compensated, row_power
from quantizers.rounding.row_order import ROW_STEPS, ROW_SWEEPS
from quantizers.rounding.sparsegpt import compensate
from quantizers.settings import CompensationSettings, Importance, Sparsity
from quantizers.statistics.importance import channel_dimensions, combined_importance
from quantizers.statistics.moments import InputStatistics
from quantizers.statistics.row_groups import RowSums

log = logging.getLogger(__name__)

DECODED_BYTES = 1 << 22  # of the weights that are decoded at once on a CPU
SCHEMA = 2  # raise when packed bytes or file layout change meaning


class BankError(UserError):
    """Raised for a tensor or format that the bank does not hold; the message is one sentence for the user."""


@dataclass(frozen=True)
class BankEntry:
    """Holds a tensor's Hessian-weighted squared error tr(dW H dW^T) at one level, also ``relative`` to tr(W H W^T)."""

    error: float
    relative: float

    @property
    def power(self) -> float:
        """Error of zeroing the tensor, tr(W H W^T); 0 where ``relative`` is 0."""
        return self.error / self.relative if self.relative else 0.0


def tensor_file(directory: Path, tensor: str) -> Path:
    """Return the path of a tensor's file in the bank ``directory``."""
    return directory / f"{tensor}.safetensors"


def bank_digest(
    model: str,
    calibration: str,
    formats: Mapping[str, Sequence[QuantFormat]],
    settings: CompensationSettings,
    sparsity: Mapping[str, Sparsity],
    importance: Importance = "conditional",
    device: str = "cpu",
    imatrix: str | None = None,
    outputs: str | None = None,
) -> str:
    """Return the digest of everything that decides the bytes of a bank; runs with the same digest share the bank.

    ``model`` and ``calibration`` are digests. ``formats`` holds the candidate formats of every tensor, ``sparsity`` the
    tensors that are pruned. ``device`` is the kind of device that builds it: products on an accelerator round otherwise
    than on a CPU, and perhaps otherwise in other batches. ``imatrix`` is the digest of a file of mean squares, and
    ``outputs`` that of the output factors, where they are used.
    """
    pruned = {tensor: str(wanted) for tensor, wanted in sparsity.items()}
    legal = {tensor: [f.name for f in choices] for tensor, choices in formats.items()}
    where = [] if device == "cpu" else [device, ACCELERATOR_CHUNK, STACK_BYTES, *sorted(ENABLED)]
    where += [imatrix] if imatrix else []
    where += [outputs, ROW_STEPS, ROW_SWEEPS] if outputs else []
    return digest_of(SCHEMA, model, calibration, legal, asdict(settings), pruned, importance, *where)


def save_tensor(directory: Path, tensor: str, levels: Mapping[str, Compensated]) -> None:
    """Write the packed bytes and errors of one tensor atomically; ``levels`` is by format name."""
    errors = {name: {"error": c.error, "relative": c.relative} for name, c in levels.items()}
    packed = {name: c.packed.data.cpu().contiguous() for name, c in levels.items()}
    atomic_write_bytes(tensor_file(directory, tensor), save(packed, {"errors": json.dumps(errors)}))


@dataclass(frozen=True)
class BuildBankGroup:
    """Pool task that quantizes the tensors of one input group to all levels, with compensation, and packs them."""

    model: Path
    group: Path  # file of the InputGroup
    directory: Path
    formats: Mapping[str, tuple[str, ...]]  # tensor -> format names
    settings: CompensationSettings
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)  # of the tensors that are pruned
    importance: Importance = "conditional"  # used to fit scales; pruned tensors always take the conditional one
    work: float = 1.0  # number of weights, by which the pool compares the times of tasks
    given: np.ndarray | None = None  # mean squares (columns,) of the input from an imatrix file, in place of importance
    outputs: tuple[Path, ...] = ()  # files of the output factors of tensors that are rounded on both sides
    sums: tuple[Path, ...] = ()  # files of sums for rows, of head and lookup tables

    @property
    def label(self) -> str:
        return f"bank[{self.group.stem}]"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> tuple[str, ...]:
        """Write the files of the group's tensors that have formats, and return the names of these tensors."""
        folder = ModelFolder(self.model)
        group = InputGroup.load(self.group)
        device = best_device()
        names = [name for name in group.tensors if name in self.formats]
        weights = {name: folder.read(name).to(device).float() for name in names}
        formats = {name: [FORMATS[f] for f in self.formats[name]] for name in names}
        for name, levels in self._levels(weights, formats, group).items():
            save_tensor(self.directory, name, levels)
        return tuple(names)

    def _levels(
        self, weights: Mapping[str, Tensor], formats: Mapping[str, Sequence[QuantFormat]], group: InputGroup
    ) -> dict[str, dict[str, Compensated]]:
        """Return the packed levels by tensor and format name; pruned tensors are compensated apart from the others."""
        pruned = {name: W for name, W in weights.items() if name in self.sparsity}
        dense = {name: W for name, W in weights.items() if name not in self.sparsity}
        H = group.hessian.to(next(iter(weights.values())).device)
        levels: dict[str, dict[str, Compensated]] = {}
        for name in list(dense):
            files = [file for file in self.sums if summed_tensor(tensor_of(file)) == name]
            if files and (found := load_all_sums(files)).any:
                levels[name] = self._by_rows(name, dense.pop(name), formats[name], group, found)
        if dense:
            levels |= self._dense(dense, formats, H, group)
        if pruned:
            levels |= prune_and_compensate(pruned, formats, self.sparsity, H, self.settings)
        return levels

    def _dense(
        self, weights: Mapping[str, Tensor], formats: Mapping[str, Sequence[QuantFormat]], H: Tensor, group: InputGroup
    ) -> dict[str, dict[str, Compensated]]:
        """Return the packed levels of ``weights`` under H by tensor and format name."""
        given = None if self.given is None else torch.from_numpy(self.given).to(H.device)
        importance = given
        if given is None:
            importance = scale_importance(self.importance, weights, H, group.statistics, self.settings.damping)
        wanted = {name: formats[name] for name in weights}
        sides = {name: load_factor(file).to(H.device) for file in self.outputs if (name := tensor_of(file)) in weights}
        return compensate(weights, wanted, H, self.settings, importance, given, sides)

    def _by_rows(
        self, name: str, W: Tensor, formats: Sequence[QuantFormat], group: InputGroup, found: RowSums
    ) -> dict[str, Compensated]:
        """Return the packed levels of W (rows, columns) by format name, each group of rows under its own Hessian.

        Their errors are those under the Hessian of the input, as every tensor's.
        """
        data: dict[str, Tensor] = {}
        labels = found.labels.to(W.device)
        step = rows_at_once(W)
        for label, H in enumerate(found.hessians()):
            for rows in (labels == label).nonzero()[:, 0].split(step):
                padding = recorded_rows(len(rows), W.device) - len(rows)
                part = {name: pad(W[rows], (0, 0, 0, padding))}
                (levels,) = self._dense(part, {name: formats}, H.to(W.device), group).values()
                for level, made in levels.items():
                    mine = made.packed.data[: len(rows)]
                    data.setdefault(level, mine.new_empty(len(W), mine.shape[1]))[rows] = mine
        H = group.hessian.to(W.device)
        power = row_power(W, H)
        errors = {fmt.name: float(bytes_errors(fmt, W, data[fmt.name], H).sum()) for fmt in formats}
        return {fmt.name: compensated(fmt, W, data[fmt.name], errors[fmt.name], power) for fmt in formats}


def scale_importance(
    kind: Importance, weights: Mapping[str, Tensor], H: Tensor, statistics: InputStatistics, damping: float
) -> Tensor | None:
    """Return the importance (columns,) under which scales are fitted, shared by all tensors of an input group.

    ``weights`` are (rows, columns) each; H (columns, columns) and ``statistics`` are those of their input. None for the
    kind "conditional", which ``compensate`` computes itself.
    """
    if kind == "conditional":
        return None
    if kind == "hessian":
        return H.diagonal()
    moments = InputStatistics(**{name: t.to(H.device) for name, t in statistics.tensors().items()})
    return combined_importance(channel_dimensions(torch.cat(list(weights.values())), H, moments, damping))


def group_tensors(group: Path) -> tuple[str, ...]:
    """Return the names of an input group's tensors, read from the header of the group's file."""
    with safe_open(group, framework="pt") as file:
        return tuple(file.metadata()["tensors"].split("\n"))


def readable(directory: Path, tensor: str, formats: Iterable[str]) -> bool:
    """Return whether the tensor's file exists, is complete and holds all of ``formats``."""
    return holds_tensors(tensor_file(directory, tensor), formats)


def write_manifest(directory: Path, tensors: Sequence[str]) -> None:
    """Write the manifest with the sha256 of the files of ``tensors``."""
    files = {name: digest_of_file(tensor_file(directory, name)) for name in tensors}
    atomic_write_text(directory / layout.MANIFEST, json.dumps({"schema": SCHEMA, "files": files}, indent=1))


def damaged_tensors(directory: Path) -> list[str]:
    """Return the tensors whose file is missing or differs from the manifest.

    Files that have not changed since they were last read are not read again. Without a manifest none is reported: the
    files come from an interrupted build, and each was written atomically. A manifest that cannot be parsed is deleted,
    with a warning.
    """
    manifest = directory / layout.MANIFEST
    if not manifest.is_file():
        return []
    try:
        files: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        log.warning("the bank's manifest %s cannot be read; it is written anew", manifest)
        manifest.unlink()
        return []
    found = digests_of_files([tensor_file(directory, name) for name in files], directory)
    return [name for name, digest in files.items() if found.get(tensor_file(directory, name)) != digest]


class Bank:
    """Reads the bank in a directory lazily, by memory-mapping one tensor's file at a time.

    Methods raise BankError if the tensor's file is missing or unreadable.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._errors: dict[str, dict[str, BankEntry]] = {}

    @contextmanager
    def _file(self, tensor: str) -> Iterator[Any]:
        """Open the tensor's file; it is mapped only inside the context, so that its pages do not stay in memory."""
        path = tensor_file(self.directory, tensor)
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BankError(f"expected the bank file of {tensor}, found {error} at {path}") from None
        with file:
            yield file

    @contextmanager
    def _level(self, tensor: str, fmt: QuantFormat) -> Iterator[Any]:
        """Open the tensor's file, which holds ``fmt``. Raises BankError for a format that is missing."""
        with self._file(tensor) as file:
            if fmt.name not in file.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                raise BankError(f"expected {fmt.name} of {tensor} in the bank, found {', '.join(file.keys())}")
            yield file

    def packed(self, tensor: str, fmt: QuantFormat) -> Tensor:
        """Return the bytes uint8 (rows, row_bytes) of the GGUF file. Raises BankError for a format that is missing."""
        with self._level(tensor, fmt) as file:
            found: Tensor = file.get_tensor(fmt.name)
            return found

    def blocks(self, tensor: str, fmt: QuantFormat) -> int:
        """Return the number of blocks of a tensor, of whose bytes none are read; raises as ``packed`` does."""
        with self._level(tensor, fmt) as file:
            rows, row_bytes = file.get_slice(fmt.name).get_shape()
            return int(rows) * int(row_bytes) // fmt.block_bytes

    def weights(self, tensor: str, fmt: QuantFormat, columns: int, device: torch.device) -> Tensor:
        """Return the weights float32 (rows, columns) that the packed bytes decode to; raises as ``packed`` does."""
        return decoded(fmt, self.packed(tensor, fmt), columns, device)

    def entry(self, tensor: str, fmt: QuantFormat) -> BankEntry:
        """Return the errors of one tensor at one level. Raises KeyError for a format that it was not packed in."""
        if tensor not in self._errors:
            with self._file(tensor) as file:
                records = json.loads(file.metadata()["errors"])
            self._errors[tensor] = {name: BankEntry(**record) for name, record in records.items()}
        return self._errors[tensor][fmt.name]

    def errors(self, tensors: Sequence[str], fmt: QuantFormat) -> dict[str, float]:
        """Return the total error of ``tensors`` at one level (``reconstruction``), and ``relative`` to zeroing them."""
        entries = [self.entry(name, fmt) for name in tensors]
        error, power = sum(e.error for e in entries), sum(e.power for e in entries)
        return {"reconstruction": error, "relative": error / power if power else 0.0}


def decoded(fmt: QuantFormat, packed: Tensor, columns: int, device: torch.device) -> Tensor:
    """Decode packed rows uint8 (rows, row_bytes) to float32 (rows, columns) on ``device``.

    Rows are decoded some chunk_bytes at a time, as decoding takes several times their memory.
    """
    weights = torch.empty(len(packed), columns, device=device)
    step = max(1, chunk_bytes(device, DECODED_BYTES) // (weights.element_size() * columns))
    for start in range(0, len(packed), step):
        part = packed[start : start + step].to(device, non_blocking=True)
        weights[start : start + step] = dequantize(fmt, part)[:, :columns]
    return weights
