"""Writes the file that llama-quantize would make of a model in floats: one of llama.cpp's own mixes."""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType

from exporters.files.file_layout import FileLayout, FileTensor, encoded_keys, stored_bytes
from exporters.files.gguf_writer import write_file
from exporters.files.mixes import DEFAULTS, LEGACY, MixModel, mix_name, mix_types
from exporters.metadata.key_values import KeyValues
from exporters.opening.source import GgufModel
from exporters.runtime.ggml import requantize
from quantizers.formats.table import padded

SPLIT = "split."


class MixFile(FileLayout):
    """Says what the file of a mix holds: all of ``original``, a model in floats, with the types of ``mix``.

    Raises ValueError for a mix or an architecture whose rules are not known.
    """

    def __init__(self, original: GgufModel, mix: str):
        self.original, self.mix = original, mix_name(mix)
        shapes = {name: tensor.shape for name, tensor in original.tensors.items()}
        self.types = mix_types(mix, shapes, MixModel.of(original.key_values))
        self.tensors = [
            FileTensor(name, tensor.shape, searched=name in self.types, type_name=tensor.type_name)
            for name, tensor in original.tensors.items()
        ]

    def key_values(self) -> tuple[int, bytes]:
        """Return number and bytes of the key-values: the original's, with the mix's file type."""
        own = KeyValues()
        own.uint32("general.file_type", int(LlamaFileType[f"MOSTLY_{self.mix}"]))
        own.uint32("general.quantization_version", GGML_QUANT_VERSION)
        first = self.original.parts[0]
        kept = [key for key in first.key_values if key not in own and not key.startswith(SPLIT)]
        return len(kept) + len(own), first.encoded(kept) + encoded_keys(own)

    def stored(self, tensor: FileTensor) -> np.ndarray:
        """Return the original's bytes of a tensor, uint8."""
        return next(part for part in self.original.parts if tensor.name in part.tensors).read(tensor.name)

    @cached_property
    def size(self) -> int:
        """Bytes of the file. llama-quantize's own is larger by the key-values that name its importance matrix."""
        data = (stored_bytes(self.types.get(t.name, GGMLQuantizationType[t.type_name]), t.shape) for t in self.tensors)
        return len(self.header({}, None)) + sum(map(padded, data))

    def write(self, path: Path, importance: Mapping[str, np.ndarray]) -> int:
        """Write the file, and return its size; ``importance`` float32 (matrices, columns) by GGUF name, as of imatrix.

        Tensors without importance are rounded without, as llama-quantize does.
        """

        def data(tensor: FileTensor) -> tuple[GGMLQuantizationType, np.ndarray]:
            source = GGMLQuantizationType[tensor.type_name]
            stored = self.stored(tensor)
            if (kind := self.types.get(tensor.name, source)) == source:
                return source, stored
            rows = tensor.shape[-2]
            matrices = stored.reshape(prod(tensor.shape[:-2]), rows, -1)
            return kind, requantize(matrices, source, kind, importance.get(tensor.name))

        return write_file(self, data, path)


def mixes_by_size(original: GgufModel) -> list[MixFile]:
    """Return llama.cpp's mixes of a model in floats, smallest first, without those that others of their size beat.

    Raises ValueError for an architecture whose rules are not known.
    """
    return sorted((MixFile(original, mix) for mix in DEFAULTS if mix not in LEGACY), key=lambda mix: mix.size)
