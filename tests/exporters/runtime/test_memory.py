"""What llama.cpp says that it would take beside the weights is what it takes once it has loaded the file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evaluators.model.folder import ModelFolder
from exporters.files.built_layout import BuiltLayout
from exporters.runtime.llamacpp import LlamaCppError
from exporters.runtime.memory import MIB, ContextMemory, context_memory, file_memory, parse_memory, write_hollow
from quantizers.formats.table import FORMATS
from tests.conftest import EMBEDDED

CONTEXT = 16384
LOADED = """
import os, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 1
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + sys.argv[3])
params.fit_params, params.warmup, params.cache_ram_mib, params.verbosity = False, False, 0, 4
server = xllamacpp.Server(params)
os._exit(0)
"""
TOLERANCE = 1.0  # MiB of each figure: llama.cpp says whole MiB, rounded down, and ours are rounded up
PROJECTED = "0.5 I srv    load_model: [mtmd] estimated worst-case memory usage of mmproj is 10.50 MiB (took 2.40 ms)"
GPU = """
1.0 I common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute |
1.0 I common_memory_breakdown_print: |   - CUDA0 (RTX 4090)   | 24080 = 23600 + ( 9210 =  8000 +    1024 +   186) + 0 |
1.0 I common_memory_breakdown_print: |   - Host               |                   520 =   500 +       0 +      20    |
2.0 I common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute |
2.0 I common_memory_breakdown_print: |   - CUDA0 (RTX 4090)   | 24080 = 23600 + ( 1 =  1 +    1 +   1) + 0           |
"""


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the embedded model's shape, all zeros, of which the disk holds the header alone."""
    path = tmp_path_factory.mktemp("hollow") / "hollow.gguf"
    layout = BuiltLayout(ModelFolder(EMBEDDED))
    write_hollow(layout, {tensor.name: FORMATS["Q8_0"].ggml_type for tensor in layout.searched}, path)
    assert path.stat().st_blocks * 512 < 2_000_000 < path.stat().st_size
    return path


def test_what_llamacpp_says_is_what_it_takes_when_it_has_loaded_the_file(hollow: Path, kv: str = "Q8_0") -> None:
    said = file_memory(hollow, CONTEXT, kv)
    command = [sys.executable, "-c", LOADED, str(hollow), str(CONTEXT), kv]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    loaded = subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stderr
    taken = {
        what: sum(float(size) for size in re.findall(rf"{what} buffer size = +([\d.]+) MiB", loaded))
        for what in ("KV", "compute")
    }
    assert taken["KV"] > 10, loaded
    assert said.cache / MIB == pytest.approx(taken["KV"], abs=TOLERANCE)
    assert said.compute / MIB == pytest.approx(taken["compute"], abs=TOLERANCE)


def test_keys_and_values_grow_with_the_context_and_shrink_with_their_type(hollow: Path) -> None:
    config = ModelFolder(EMBEDDED).config
    width = config["hidden_size"] // config["num_attention_heads"] * config["num_key_value_heads"]
    expected = 2 * config["num_hidden_layers"] * width * 4 * CONTEXT  # keys and values in float32
    layout = BuiltLayout(ModelFolder(EMBEDDED))
    types = {tensor.name: FORMATS["Q4_0"].ggml_type for tensor in layout.searched}
    assert context_memory(layout, types, CONTEXT, "F32").cache == pytest.approx(expected, abs=MIB)


def test_devices_count_where_there_are_some_and_only_the_first_table() -> None:
    assert parse_memory(GPU) == ContextMemory(1025 * MIB, 187 * MIB)  # of the device alone
    assert parse_memory(PROJECTED + GPU, projected=True).projector == int(10.5 * MIB)
    with pytest.raises(LlamaCppError, match="cannot say what memory the projector takes"):
        parse_memory(GPU, projected=True)


def test_a_file_that_llamacpp_does_not_load_is_said(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LlamaCppError, match="cannot say what memory it takes: "):
        file_memory(tmp_path / "no.gguf", 512)


def test_a_projector_that_is_none_is_said(hollow: Path) -> None:
    with pytest.raises(LlamaCppError, match="what memory the projector takes"):
        file_memory(hollow, 512, mmproj=hollow)
