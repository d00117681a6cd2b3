"""The file has the size that was promised, holds the bytes that were given, and appears whole or not at all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize

from bitgenome.common.files import replacing
from evaluators.model.families import EXPORTABLE
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import export_gguf, fixed_bytes
from exporters.files.packed_file import PackedFile
from exporters.metadata.provenance import Provenance
from exporters.metadata.tensor_names import from_file_rows, quantizable_tensors, tensor_table, to_file_rows
from exporters.runtime.llamacpp import LlamaCppRuntime
from quantizers.formats.table import FORMATS, LEVEL_FORMATS
from search.types import SearchSpace
from tests.exporters.conftest import random_bytes, random_windows

LEVELS = list(LEVEL_FORMATS)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "tie_word_embeddings": False}
MODELS = [*((name, {}) for name in EXPORTABLE), ("qwen2", WIDE), ("mistral", WIDE)]


def space_of(folder: ModelFolder) -> SearchSpace:
    return SearchSpace.per_tensor(quantizable_tensors(folder), LEVELS, fixed_bytes(folder))


@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_the_size_of_any_genome_is_known_exactly_before_there_is_a_file(
    model_type: str, overrides: dict[str, object], small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model(model_type, **overrides)
    space = space_of(folder)
    rng = np.random.default_rng(1)
    random_genome = tuple(int(rng.integers(len(gene.formats))) for gene in space.genes)
    for genome in (space.smallest(), space.largest(), random_genome):
        formats = {g.name: g.formats[c].name for g, c in zip(space.genes, genome, strict=True)}
        packed = random_bytes(folder, formats)
        provenance = Provenance(genome, budget_bytes=10**9, kl=0.5, version="1.2.3", run_digest="ab" * 32)
        written = export_gguf(folder, packed.__getitem__, tmp_path / "m.gguf", provenance)
        assert written == (tmp_path / "m.gguf").stat().st_size == space.file_bytes(genome)


@pytest.mark.parametrize(("model_type", "overrides"), MODELS)
def test_the_file_holds_the_bytes_that_were_given(
    model_type: str, overrides: dict[str, object], small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model(model_type, **overrides)
    space = space_of(folder)
    formats = {g.name: g.formats[i % len(g.formats)].name for i, g in enumerate(space.genes)}
    packed = random_bytes(folder, formats)
    export_gguf(folder, packed.__getitem__, tmp_path / "m.gguf")
    found = PackedFile(tmp_path / "m.gguf", folder)
    for name, (chosen, rows) in packed.items():
        assert found.type_name(name) == chosen.name
        np.testing.assert_array_equal(found.packed(name), rows)
    assert set(found.float_names) == set(found.names) - packed.keys()
    for name in found.float_names:
        assert torch.equal(found.floats(name), folder.read(name).float())


def test_our_reader_agrees_with_ggufs_own(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("llama")
    packed = random_bytes(folder, dict.fromkeys(quantizable_tensors(folder), "Q8_0"))
    export_gguf(folder, packed.__getitem__, tmp_path / "m.gguf", Provenance((1, 2), 3))
    reader, contents = GGUFReader(tmp_path / "m.gguf"), read_gguf(tmp_path / "m.gguf")
    assert [t.name for t in reader.tensors] == list(contents.tensors)
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data.reshape(-1).view(np.uint8), contents.read(tensor.name).reshape(-1))
    for key, value in contents.key_values.items():
        assert reader.get_field(key).contents() == pytest.approx(value, nan_ok=True), key


@pytest.mark.parametrize("ggml_type", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0])
def test_the_row_permutation_commutes_with_quantization(
    ggml_type: GGMLQuantizationType, small_model: Callable[..., ModelFolder]
) -> None:
    folder = small_model("llama")
    permuted = [entry for entry in tensor_table(folder) if entry.permuted_heads and entry.quantizable]
    assert {entry.kind for entry in permuted} == {"attn_q", "attn_k"}
    for entry in permuted:
        weights = folder.read(entry.hf_name).numpy()
        packed = quantize(weights, ggml_type)
        np.testing.assert_array_equal(to_file_rows(entry, packed), quantize(to_file_rows(entry, weights), ggml_type))
        np.testing.assert_array_equal(from_file_rows(entry, to_file_rows(entry, packed)), packed)


def test_quantizable_tensors_are_the_matrices_in_file_order(small_model: Callable[..., ModelFolder]) -> None:
    names = list(quantizable_tensors(small_model("qwen2", num_hidden_layers=11, tie_word_embeddings=False)))
    assert names[0] == "model.embed_tokens.weight"
    assert names[1:8] == [
        f"model.layers.0.{part}_proj.weight"
        for part in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down",
        )
    ]  # fmt: skip
    assert names[-2:] == ["model.layers.10.mlp.down_proj.weight", "lm_head.weight"]


def test_provenance_survives_the_file(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("qwen3")
    names = quantizable_tensors(folder)
    packed = random_bytes(folder, dict.fromkeys(names, "Q4_0"))
    provenance = Provenance((3, 0, 2), 12345, kl=0.25, model_digest="0f" * 32, version="0.1.0")
    export_gguf(folder, packed.__getitem__, tmp_path / "m.gguf", provenance)
    keys = read_gguf(tmp_path / "m.gguf").key_values
    assert tuple(keys["bitgenome.genome"]) == provenance.genome and keys["bitgenome.version"].rstrip() == "0.1.0"
    for name in ("budget_bytes", "kl", "model_digest", "text_digest", "run_digest"):
        assert keys[f"bitgenome.{name}"] == getattr(provenance, name)
    assert [name.strip() for name in keys["bitgenome.types"]] == ["Q4_0"] * len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_digest": "xyz"}, "64 hexadecimal"), ({"version": "v" * 25}, "at most 24"), ({"genome": ()}, "one gene")],
)
def test_provenance_of_another_length_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Provenance(**({"genome": (0,), "budget_bytes": 1} | change))


def test_overrides_replace_float_tensors_at_no_cost(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("llama", attention_bias=True)
    packed = random_bytes(folder, dict.fromkeys(quantizable_tensors(folder), "F16"))
    plain = export_gguf(folder, packed.__getitem__, tmp_path / "plain.gguf")
    healed = {
        name: torch.randn(folder.shapes[name], dtype=torch.float64)
        for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.bias")
    }
    assert export_gguf(folder, packed.__getitem__, tmp_path / "healed.gguf", None, healed) == plain
    found = PackedFile(tmp_path / "healed.gguf", folder)
    for name, tensor in healed.items():
        assert torch.equal(found.floats(name), tensor.float())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.norm.weight": torch.zeros(3)}, r"expected shape \(64,\) for model.norm.weight, found \(3,\)"),
        ({"lm_head.weight": torch.zeros(3)}, "expected overrides of float32 tensors, found lm_head.weight"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(
    overrides: dict[str, torch.Tensor], message: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("llama")
    packed = random_bytes(folder, dict.fromkeys(quantizable_tensors(folder), "Q8_0"))
    with pytest.raises(ValueError, match=message):
        export_gguf(folder, packed.__getitem__, tmp_path / "m.gguf", None, overrides)
    assert list(tmp_path.iterdir()) == []


def test_bytes_of_the_wrong_shape_are_refused(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected Q8_0 bytes uint8 \(512, 68\).*found uint8 \(3, 4\)"):
        export_gguf(small_model("llama"), lambda _: (FORMATS["Q8_0"], np.zeros((3, 4), np.uint8)), tmp_path / "m.gguf")


def test_an_export_that_fails_leaves_the_earlier_file_as_it_was(
    small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("llama")
    packed = random_bytes(folder, dict.fromkeys(quantizable_tensors(folder), "Q8_0"))
    path = tmp_path / "m.gguf"
    export_gguf(folder, packed.__getitem__, path)
    before = path.read_bytes()
    seen = []

    def failing(name: str) -> tuple[object, np.ndarray]:
        seen.append(name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return packed[name]

    with pytest.raises(KeyboardInterrupt):
        export_gguf(folder, failing, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_replaced_is_not_there_until_it_is_complete(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as temporary:
        temporary.write_bytes(b"half")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"half"


def test_fixed_bytes_reads_no_weights(small_model: Callable[..., ModelFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_model("llama")
    monkeypatch.setattr(ModelFolder, "read", lambda *_: pytest.fail("read a tensor"))
    assert fixed_bytes(folder) > 0
    assert fixed_bytes(folder, genes=1) < fixed_bytes(folder)


def test_llamacpp_runs_every_level(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    """Zero bytes are legal in every format: llama.cpp must accept types, sizes and offsets of the table."""
    folder = small_model("qwen2", **WIDE)
    space = space_of(folder)
    windows = random_windows(folder, 1, 8)
    for choice in range(len(LEVELS)):
        formats = [gene.formats[min(choice, len(gene.formats) - 1)] for gene in space.genes]
        packed = {
            gene.name: (f, np.zeros((gene.shapes[0][0], f.row_bytes(gene.shapes[0][1])), np.uint8))
            for gene, f in zip(space.genes, formats, strict=True)
        }
        export_gguf(folder, packed.__getitem__, tmp_path / "m.gguf")
        with LlamaCppRuntime(tmp_path / "m.gguf", 8, threads=1) as runtime:
            assert runtime.hidden_states(windows).shape == (1, 8, 256)
