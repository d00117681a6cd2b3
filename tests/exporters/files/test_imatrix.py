"""The importance matrix has the names, shapes and keys that llama-quantize looks for."""

from pathlib import Path

import gguf
import numpy as np

from exporters.files.imatrix import write_imatrix


def test_sums_over_counts_are_the_importance(tmp_path: Path) -> None:
    importance = {"blk.0.attn_q.weight": np.array([0.5, 2.0, 0.25], np.float32)}
    write_imatrix(tmp_path / "imatrix.gguf", importance, tokens=4096, window=512, dataset="stdlib")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    tensors = {t.name: t.data for t in reader.tensors}
    assert np.array_equal(
        tensors["blk.0.attn_q.weight.in_sum2"] / tensors["blk.0.attn_q.weight.counts"], [[0.5, 2.0, 0.25]]
    )
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["stdlib"]
    assert reader.fields["imatrix.chunk_count"].contents() == 8
    assert reader.fields["imatrix.chunk_size"].contents() == 512
