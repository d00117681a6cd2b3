"""Makes a budget of a size as a user asks for it: bytes, bits, one of llama.cpp's mixes, or a device to fill."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from bitgenome.common.errors import UserError
from exporters.files.file_layout import FileLayout
from exporters.opening.source import read_model
from exporters.runtime.llamacpp import LlamaCppError
from exporters.runtime.memory import KV_TYPES, ContextMemory, context_memory, write_hollow
from exporters.runtime.mix_file import MixFile
from search.budget import parse_size
from search.types import SearchSpace

FRACTION = re.compile(r"\s*\d+\.\d+\s*")
MARGIN = "1GiB"  # what llama.cpp itself leaves free on a device (fit_params_target)
WAYS = "--size 4.5GB, --bits 4.5, --like Q4_K_M or --device-memory 16GiB"


@dataclass(frozen=True)
class Device:
    """The memory that a file shall fit, with what lies there beside it."""

    memory: str  # with a unit
    context: int  # tokens
    kv: str = "f16"
    mmproj: Path | None = None
    margin: str = MARGIN


@dataclass(frozen=True)
class WantedSize:
    """A size as a user gives it: exactly one of the four."""

    size: str | None = None
    bits: float | None = None
    like: str | None = None
    device: Device | None = None

    def check(self) -> None:
        """Raise UserError unless there is exactly one size, and it can be read."""
        given = [value for value in (self.size, self.bits, self.like, self.device) if value is not None]
        if len(given) != 1:
            raise UserError(f"expected one size, by {WAYS}, found {len(given) or 'none'}")
        if self.size is not None:
            size_in_bytes(self.size, "--size")
        if self.device:
            check_device(self.device)

    @property
    def suffix(self) -> str:
        """What the name of a run says of its size."""
        if self.device:
            return f"{self.device.memory}-{self.device.context}"
        return self.size or self.like or f"{self.bits:g}bpw"


@dataclass(frozen=True)
class Sized:
    """A budget as settings, and how it came about in a line."""

    budget: dict[str, Any]
    note: str


def size_in_bytes(text: str, option: str) -> int:
    """Return a size in bytes; GB is 10^9, GiB 2^30. Raises UserError for anything else, such as 4.5 without a unit."""
    try:
        if FRACTION.fullmatch(text):
            raise ValueError(f"size {text!r} has no unit")
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"expected a size such as 4.5GB or 4GiB for {option}, found {text!r}: {error}") from None


def check_device(device: Device) -> None:
    """Raise UserError for memory, margin, type of keys and values or projector that cannot be read."""
    for option, value in (("--device-memory", device.memory), ("--margin", device.margin)):
        size_in_bytes(value, option)
    if device.kv.upper() not in KV_TYPES:
        raise UserError(f"expected --kv among {', '.join(KV_TYPES).lower()}, found {device.kv}")
    if device.mmproj and not device.mmproj.is_file():
        raise UserError(f"expected a projector's GGUF file for --mmproj, found none at {device.mmproj}")


def wanted_budget(wanted: WantedSize, space: SearchSpace, file: FileLayout) -> Sized:
    """Return the budget that ``wanted`` is for files like ``file``, whose space is ``space``.

    A device with more room than the largest file needs gets the largest. Raises UserError if no file fits.
    """
    if wanted.size is not None:
        return Sized({"file_size": wanted.size}, described(size_in_bytes(wanted.size, "--size"), space))
    if wanted.bits is not None:
        size = int(wanted.bits * space.weights / 8)
        return Sized({"bits_per_weight": wanted.bits}, described(size, space))
    if wanted.device is not None:
        return for_device(wanted.device, space, file)
    assert wanted.like is not None, "checked before"
    return like_mix(wanted.like, space, file)


def like_mix(mix: str, space: SearchSpace, file: FileLayout) -> Sized:
    """Return the size of the file that llama-quantize makes of ``mix``, without an importance matrix, as a budget.

    A mix larger than the largest file becomes the largest. Raises UserError for one that is not known, or smaller than
    the smallest file.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="bitgenome-") as folder:
            path = Path(folder) / "original.gguf"
            write_hollow(file, dict.fromkeys((t.name for t in file.searched), GGMLQuantizationType.F16), path)
            found = MixFile(read_model(path), mix)
            theirs = found.size
    except ValueError as error:
        raise UserError(f"{error} for --like") from None
    smallest, largest = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    if theirs < smallest:
        raise UserError(
            f"expected a mix of at least {smallest:,} bytes, the smallest of this model's files, for --like, found "
            f"{found.mix}, whose file has {theirs:,}"
        )
    size = min(theirs, largest)
    above = f", which has {theirs:,} bytes: ours have no more" if size < theirs else ""
    return Sized({"file_size": size}, f"{described(size, space)}, as llama-quantize's {found.mix}{above}")


def for_device(device: Device, space: SearchSpace, file: FileLayout) -> Sized:
    """Return the largest budget with which a file fits a device, beside what llama.cpp needs there.

    Raises UserError if no file fits, or llama.cpp cannot say what it needs.
    """
    types = {tensor: fmt.ggml_type for tensor, fmt in smallest_types(space, file).items()}
    try:
        beside = context_memory(file, types, device.context, device.kv.upper(), device.mmproj)
    except LlamaCppError as error:
        raise UserError(
            f"expected llama.cpp to say what it needs at --context {device.context}, found: {error}"
        ) from None
    memory, margin = size_in_bytes(device.memory, "--device-memory"), size_in_bytes(device.margin, "--margin")
    room = memory - margin - beside.cache - beside.compute - beside.projector
    parts = beside_text(beside, device, margin)
    smallest, largest = space.file_bytes(space.smallest()), space.file_bytes(space.largest())
    if room < smallest:
        raise UserError(
            f"expected room for a file of at least {in_gigabytes(smallest)} on a device of {device.memory}, found "
            f"{in_gigabytes(max(0, room))} beside {parts}: the least memory is {in_gigabytes(memory - room + smallest)}"
        )
    size = min(room, largest)
    ending = " (the largest of this model's files)" if size == largest else ""
    return Sized({"file_size": size}, f"{described(size, space)}{ending}: {device.memory} less {parts}")


def smallest_types(space: SearchSpace, file: FileLayout) -> dict[str, Any]:
    """Return the smallest format of each searched tensor of ``file``, by GGUF name."""
    formats = space.formats_of(space.smallest())
    return {t.name: formats[t.gather.names[0]] for t in file.searched if t.gather}


def beside_text(beside: ContextMemory, device: Device, margin: int) -> str:
    """Return in words what lies on a device beside a file."""
    parts = [
        f"{in_gigabytes(beside.cache)} for keys and values of {device.context:,} tokens in {device.kv.lower()}",
        f"{in_gigabytes(beside.compute)} of compute buffers",
        *([f"{in_gigabytes(beside.projector)} for the projector"] if device.mmproj else []),
        f"{in_gigabytes(margin)} left free",
    ]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def described(size: int, space: SearchSpace) -> str:
    """Return a size in words."""
    return f"{in_gigabytes(size)}, {8 * size / space.weights:.3f} bits per weight"


def in_gigabytes(size: int) -> str:
    """Return a size in GB, of small ones in MB (10^6 bytes)."""
    return f"{size / 1e9:.3f} GB" if size >= 10**9 else f"{size / 1e6:.3f} MB"
