"""A file is checked on its packed bytes, tensor by tensor."""

from pathlib import Path

import pytest

from bitgenome.run.export import differing_tensors
from evaluators.prepare.bank import Bank
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import export_gguf
from exporters.files.packed_file import PackedFile
from tests.conftest import SmallBank


def test_one_byte_or_another_type_is_a_difference_from_the_bank_and_another_shape_is_refused(
    small_bank: SmallBank, tmp_path: Path
) -> None:
    bank, path, folder = Bank(small_bank.directory), tmp_path / "m.gguf", small_bank.folder
    formats = small_bank.space.formats_of(small_bank.space.smallest())
    export_gguf(folder, lambda name: (formats[name], bank.packed(name, formats[name]).numpy()), path)
    assert differing_tensors(path, folder, bank, formats) == []
    name = "model.layers.2.self_attn.q_proj.weight"  # whose rows the file holds in another order
    other = next(choice for gene in small_bank.space.genes if gene.name == name for choice in gene.formats[1:])
    assert differing_tensors(path, folder, bank, {**formats, name: other}) == [name]
    whole, stored = path.read_bytes(), read_gguf(path).tensors["blk.2.attn_q.weight"]
    place = stored.offset + stored.size - 1
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert differing_tensors(path, folder, bank, formats) == [name]
    path.write_bytes(whole.replace(b"blk.2.attn_q.weight", b"blk.9.attn_q.weight"))
    with pytest.raises(ValueError, match="expected tensor blk.2.attn_q.weight"):
        PackedFile(path, folder)
