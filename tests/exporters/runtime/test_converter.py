"""llama.cpp's converter runs as a process of its own; what it says last is the sentence, and an earlier file stays."""

import os
from pathlib import Path

import pytest

from evaluators.model.folder import ModelFolder
from exporters.metadata.tensor_names import quantizable_tensors
from exporters.runtime.converter import SCRIPT, VARIABLE, ConverterError, convert, find_converter
from exporters.template.checks import read_template
from exporters.template.explanation import explain
from tests.conftest import EMBEDDED

WRAPPER = Path(__file__).parents[3] / "benchmarks" / "models" / "convert.py"


def test_a_converter_that_fails_is_one_sentence_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / SCRIPT).write_text("import sys; print('loading'); sys.exit('Model OPT is not supported')")
    (tmp_path / "out.gguf").write_bytes(b"earlier")
    with pytest.raises(ConverterError, match=r"ended with 1: Model OPT is not supported$"):
        convert(find_converter(tmp_path), EMBEDDED, tmp_path / "out.gguf", "bf16")
    assert (tmp_path / "out.gguf").read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 2


def test_where_there_is_no_converter_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConverterError, match=r"expected --converter .* pip install --target DIR"):
        find_converter(None)
    with pytest.raises(ConverterError, match=f"found no file at {tmp_path / SCRIPT}"):
        find_converter(tmp_path)


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason="llama.cpp's converter is not there")
def test_all_of_the_converters_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(find_converter(None).parent))
    convert(WRAPPER, EMBEDDED, tmp_path / "out.gguf", "f16")  # it does not know the embedded model's vocabulary
    folder = ModelFolder(EMBEDDED)
    found = explain(read_template(tmp_path / "out.gguf"), folder, quantizable_tensors(folder).__contains__)
    assert not found.refused and not found.unhealed
    searched = {name for tensor in found.tensors if tensor.searched and tensor.gather for name in tensor.gather.names}
    assert searched == quantizable_tensors(folder).keys()
