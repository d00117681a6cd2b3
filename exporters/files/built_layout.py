"""What a file of a model holds where no other file says it: tensors and key-values of llama.cpp's dense graphs."""

import numpy as np
from gguf import GGUFValueType

from exporters.files.file_layout import FileLayout, FileTensor, Gather, encoded_keys
from exporters.metadata.architectures import architecture_of, dimensions_of
from exporters.metadata.hyperparameters import model_metadata
from exporters.metadata.key_values import KeyValues
from exporters.metadata.rope import frequency_factors, rope_of
from exporters.metadata.source import ModelSource
from exporters.metadata.tensor_names import TensorEntry, row_order, tensor_table
from exporters.metadata.tokenizer import tokenizer_metadata

ROPE_FACTORS = "rope_freqs.weight"


class BuiltLayout(FileLayout):
    """Holds the list of a file's tensors and its key-values, made from config.json and the tokenizer.

    Raises UnsupportedArchitectureError, TokenizerError or UnknownPretokenizerError for a model that cannot be exported.
    """

    def __init__(self, source: ModelSource, allow_missing_tokenizer: bool = False):
        self._keys = KeyValues({"general.architecture": (architecture_of(source).name, GGUFValueType.STRING)})
        self._rope_factors = frequency_factors(rope_of(source.config), dimensions_of(source).head_dim)
        self.tensors = [_file_tensor(entry) for entry in tensor_table(source)]
        if self._rope_factors is not None:  # first, as in llama.cpp's own conversions
            self.tensors.insert(0, FileTensor(ROPE_FACTORS, self._rope_factors.shape))
        self._keys |= model_metadata(source) | tokenizer_metadata(source, allow_missing_tokenizer)

    def key_values(self) -> tuple[int, bytes]:
        """Return number and bytes of the key-values."""
        return len(self._keys), encoded_keys(self._keys)

    def stored(self, tensor: FileTensor) -> np.ndarray:
        """Return the bytes of the rope's factors, the one tensor that is not made of the model's."""
        assert self._rope_factors is not None and tensor.name == ROPE_FACTORS
        return self._rope_factors.astype(np.float32).view(np.uint8)


def _file_tensor(entry: TensorEntry) -> FileTensor:
    gather = Gather(((entry.hf_name, entry.shape[0]),), row_order(entry))
    return FileTensor(entry.gguf_name, entry.shape, gather, entry.quantizable)
