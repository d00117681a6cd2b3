"""Splits a GGUF file into shards as llama.cpp's gguf-split does, which llama.cpp loads by the name of the first."""

import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUF_MAGIC, GGUF_VERSION, GGMLQuantizationType, GGUFValueType

from bitgenome.common.errors import UserError
from bitgenome.common.files import replacing
from exporters.files.gguf_reader import GgufContents, StoredTensor, read_gguf
from exporters.metadata.key_values import KeyValues
from quantizers.formats.table import padded

MOST_SHARDS = 65535  # as split.count is stored


def shard_path(path: Path, number: int, count: int) -> Path:
    """Return the path of shard ``number``, from 1, of ``count`` (llama.cpp's LLAMA_SPLIT_PATH)."""
    return path.with_name(f"{path.stem}-{number:05}-of-{count:05}.gguf")


@dataclass(frozen=True)
class Shards:
    """Says how large a shard may be; a tensor that is larger is alone."""

    max_bytes: int | None = None  # of its tensors
    max_tensors: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether a file is to be split at all."""
        return self.max_bytes is not None or self.max_tensors is not None

    def of(self, path: Path) -> list[list[StoredTensor]]:
        """Return the tensors of each shard of the GGUF file at ``path``, in file order."""
        shards: list[list[StoredTensor]] = [[]]
        size = 0
        for tensor in read_gguf(path).tensors.values():
            taken = padded(tensor.size)
            over = self.max_bytes is not None and size + taken > self.max_bytes
            if shards[-1] and (over or (self.max_tensors is not None and len(shards[-1]) >= self.max_tensors)):
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += taken
        return shards


def split_gguf(path: Path, limits: Shards) -> list[Path]:
    """Write the shards of the file at ``path`` beside it, and return their paths; the first has all key-values.

    Raises UserError for a file that is damaged or split already, and for more shards than the format can count.
    """
    try:
        contents = read_gguf(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if "split.count" in contents.key_values:
        raise UserError(f"expected a GGUF file that is not split, found a shard in {path}")
    shards = limits.of(path)
    if len(shards) > MOST_SHARDS:
        raise UserError(f"expected at most {MOST_SHARDS} shards of {path}, found {len(shards)}")
    paths = [shard_path(path, number, len(shards)) for number in range(1, len(shards) + 1)]
    for number, (target, tensors) in enumerate(zip(paths, shards, strict=True)):
        _write(contents, target, tensors, number, len(shards))
    return paths


def _write(contents: GgufContents, path: Path, tensors: list[StoredTensor], number: int, count: int) -> None:
    own = KeyValues()
    own["split.no"] = (number, GGUFValueType.UINT16)
    own["split.count"] = (count, GGUFValueType.UINT16)
    own["split.tensors.count"] = (len(contents.tensors), GGUFValueType.INT32)
    kept = list(contents.key_values) if number == 0 else []
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(kept) + len(own)), contents.encoded(kept)]
    for key, (value, kind) in own.items():
        code = "<H" if kind == GGUFValueType.UINT16 else "<i"
        parts.append(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + struct.pack(code, value))
    offset = 0
    for tensor in tensors:
        label, shape = tensor.name.encode(), tensor.shape[::-1]
        parts.append(struct.pack("<Q", len(label)) + label)
        kind_number = int(GGMLQuantizationType[tensor.type_name])
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind_number, offset))
        offset += padded(tensor.size)
    header = b"".join(parts)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header.ljust(padded(len(header)), b"\0"))
        for tensor in tensors:
            file.write(contents.read(tensor.name).data)
            file.write(bytes(padded(tensor.size) - tensor.size))
