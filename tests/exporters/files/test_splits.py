"""A file in llama.cpp's shards is the same model, to our reader and to llama.cpp."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitgenome.common.errors import UserError
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import export_gguf
from exporters.files.packed_file import PackedFile
from exporters.files.splits import Shards, split_gguf
from exporters.metadata.tensor_names import quantizable_tensors
from exporters.opening.source import read_model
from exporters.runtime.llamacpp import LlamaCppRuntime
from tests.exporters.conftest import random_bytes, random_windows


def test_the_shards_of_a_file_are_the_same_model(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("llama")
    packed = random_bytes(folder, dict.fromkeys(quantizable_tensors(folder), "F16"))
    packed = {name: (fmt, np.zeros_like(rows)) for name, (fmt, rows) in packed.items()}
    for name, (_, rows) in packed.items():
        rows.view(np.float16)[:] = folder.read(name).numpy().astype(np.float16)
    whole = tmp_path / "m.gguf"
    export_gguf(folder, packed.__getitem__, whole)
    contents = read_gguf(whole)
    shards = split_gguf(whole, Shards(max_bytes=32768))
    assert len(shards) > 2 and shards[0].name == f"m-00001-of-{len(shards):05}.gguf"
    sizes = [[tensor.size for tensor in read_gguf(shard).tensors.values()] for shard in shards]
    assert all(sum(part) <= 32768 or len(part) == 1 for part in sizes)
    model = read_model(shards[0])
    assert list(model.tensors) == list(contents.tensors)
    for part in model.parts:
        assert all(np.array_equal(part.read(name), contents.read(name)) for name in part.tensors)
    assert contents.key_values.items() <= model.parts[0].key_values.items()
    assert set(model.parts[1].key_values) == {"split.no", "split.count", "split.tensors.count"}
    windows, states = random_windows(folder, 1, 8), []
    for path in (whole, shards[0]):
        with LlamaCppRuntime(path, 8, threads=1) as runtime:
            states.append(runtime.hidden_states(windows))
    np.testing.assert_array_equal(*states)
    assert len(split_gguf(whole, Shards(max_tensors=5))) == -(-len(contents.tensors) // 5)
    with pytest.raises(ValueError, match=r"found a shard without blk\.0\."):
        PackedFile(shards[0], folder)
    with pytest.raises(UserError, match="found a shard"):
        split_gguf(shards[0], Shards(max_tensors=5))
