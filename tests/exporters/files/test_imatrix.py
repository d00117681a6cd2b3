"""The importance matrix has the names, shapes and keys that llama-quantize looks for."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from exporters.files.imatrix import ImatrixError, read_imatrix, write_imatrix


def test_sums_over_counts_are_the_importance(tmp_path: Path) -> None:
    experts = np.array([[0.5, 1.0], [2.0, 0.0]], np.float32)
    importance = {"blk.0.attn_q.weight": np.array([0.5, 2.0, 0.25], np.float32), "blk.0.ffn_up_exps.weight": experts}
    write_imatrix(tmp_path / "imatrix.gguf", importance, tokens=4096, window=512, dataset="stdlib")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    tensors = {t.name: t.data for t in reader.tensors}
    assert np.array_equal(
        tensors["blk.0.attn_q.weight.in_sum2"] / tensors["blk.0.attn_q.weight.counts"], [[0.5, 2.0, 0.25]]
    )
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"], 4096 * experts)
    assert np.array_equal(tensors["blk.0.ffn_up_exps.weight.counts"], [[4096], [4096]])
    assert np.array_equal(read_imatrix(tmp_path / "imatrix.gguf")["blk.0.ffn_up_exps.weight"], experts)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["stdlib"]
    assert reader.fields["imatrix.chunk_count"].contents() == 8
    assert reader.fields["imatrix.chunk_size"].contents() == 512


def old_form(entries: dict[str, tuple[int, list[float]]]) -> bytes:
    """The binary form of llama.cpp before GGUF: name, calls, and mean squares times the calls, of each entry."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name.encode(), calls, len(values), *values)
    return data + struct.pack("<ii7s", 4, 7, b"wiki.tx")


def test_both_forms_of_llamacpp_are_read(tmp_path: Path) -> None:
    squares = {"blk.0.attn_q.weight": np.array([0.5, 2.0, 0.25], np.float32)}
    write_imatrix(tmp_path / "a.gguf", squares, tokens=4096, window=512, dataset="stdlib")
    old = {"blk.0.attn_q.weight": (4, [2.0, 8.0, 1.0]), "blk.0.ffn_up.weight": (0, [0.0, 0.0])}
    (tmp_path / "a.dat").write_bytes(old_form(old))
    for name in ("a.gguf", "a.dat"):
        found = read_imatrix(tmp_path / name)
        assert np.array_equal(found["blk.0.attn_q.weight"], [[0.5, 2.0, 0.25]])
    assert np.array_equal(found["blk.0.ffn_up.weight"], [[1.0, 1.0]]), "what no input reached counts alike"
    writer = gguf.GGUFWriter(tmp_path / "experts.gguf", "imatrix")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.array([[2.0, 4.0], [0.0, 0.0]], np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2.0], [0.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert np.array_equal(read_imatrix(tmp_path / "experts.gguf")["blk.0.ffn_up_exps.weight"], [[1, 2], [1, 1]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found: "),
        (b"import os\nimport sys\n" * 20, "found: something else, or a cut file"),
        (old_form({"blk.0.attn_q.weight": (4, [2.0, 8.0, 1.0])})[:40], "found: something else, or a cut file"),
        (old_form({"blk.0.attn_q.weight": (4, [2.0, -8.0])}), "expected finite mean squares of blk.0.attn_q.weight"),
        (old_form({"blk.0.attn_q.weight": (4, [2.0, float("nan")])}), "expected finite mean squares of blk.0.attn_q"),
        (old_form({}), "found: no tensors"),
        ("MODEL", "found: a GGUF file of type model"),
        ("CUT", "expected a complete GGUF file"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(content: bytes | str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "imatrix"
    if isinstance(content, str):
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_tensor("output.weight", np.ones((8, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = file.read_bytes()[: -64 if content == "CUT" else None]
    file.write_bytes(content)
    with pytest.raises(ImatrixError, match=message) as error:
        read_imatrix(file)
    assert "\n" not in str(error.value)
