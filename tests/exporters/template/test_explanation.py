"""What stands behind a template's tensors is found by its rows, and packed rows go through it as they are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from benchmarks.float_gguf import export_float
from evaluators.model.folder import ModelFolder
from exporters.files.built_layout import BuiltLayout
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import export_gguf
from exporters.files.packed_file import PackedFile
from exporters.metadata.provenance import Provenance
from exporters.opening.source import read_model
from exporters.template.checks import TemplateError, read_template
from exporters.template.explanation import Explanation, expected_of, explain
from exporters.template.layout import TemplateLayout, load_explanation, save_explanation
from exporters.template.row_hashes import pairing, row_hashes
from quantizers.formats.table import FORMATS
from tests.exporters.conftest import random_bytes

Q8_0 = GGMLQuantizationType.Q8_0
D, F, E = 64, 96, 4  # columns, rows of a feed-forward, experts


def everything(name: str) -> bool:
    return True


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_file_after_a_template_has_the_tensors_of_the_built_one_and_the_keys_of_the_template(
    kind: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("llama", attention_bias=True, mlp_bias=True)  # rows of q and k are permuted, and their biases
    export_float(folder, tmp_path / "template.gguf", kind)
    template = read_template(tmp_path / "template.gguf")
    found = explain(template, folder, everything)
    assert not found.refused and not found.unhealed
    layout, built = TemplateLayout(template, found), BuiltLayout(folder)
    assert layout.shapes == built.shapes and layout.names == built.names and layout.float_names == built.float_names
    packed = random_bytes(folder, dict(zip(built.shapes, ["Q4_0", "Q8_0"] * 99, strict=False)))
    healed = {name: folder.read(name) + 1 for name in layout.float_names}
    provenance = Provenance((0,) * len(built.shapes), budget_bytes=1, kl=0.5)
    files = [tmp_path / "built.gguf", tmp_path / "after.gguf"]
    for file, chosen in zip(files, (built, layout), strict=True):
        size = export_gguf(folder, packed.__getitem__, file, provenance, healed, layout=chosen)
        data = sum(-(-fmt.tensor_bytes(folder.shapes[name]) // 32) * 32 for name, (fmt, _) in packed.items())
        assert size == chosen.fixed_bytes() + data
    one, other = map(read_gguf, files)
    assert list(one.tensors) == list(other.tensors) and dict(one.key_values) == dict(other.key_values)
    assert all(np.array_equal(one.read(name), other.read(name)) for name in one.tensors)
    file = PackedFile(files[1], folder, layout)
    assert all(np.array_equal(file.packed(name), rows) for name, (_, rows) in packed.items())
    assert file.differing_floats(healed.__getitem__) == []
    assert file.differing_floats(folder.read) == list(layout.float_names)


class Tensors:
    """A model of these tensors."""

    path, name = Path("model"), "model"

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors, self.config = tensors, dict[str, Any]()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def write(path: Path, tensors: Mapping[str, np.ndarray], kind: GGMLQuantizationType) -> None:
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(1)
    for name, values in tensors.items():
        stored = GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model() -> Tensors:
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    block = "model.layers.0."
    gate_up, attention = values(E, 2 * F, D), f"{block}self_attn."
    gate_up[1, 3] = gate_up[1, 70] = gate_up[2, 5] = 0  # rows that are equal, of gates and of what they gate
    return Tensors(
        {
            "model.embed_tokens.weight": values(32, D),
            "model.norm.weight": values(D),
            f"{block}input_layernorm.weight": values(D),
            f"{block}mlp.experts.gate_up_proj": gate_up,
            **{f"{block}mlp.experts.{i}.down_proj.weight": values(D, F) for i in range(E)},
            f"{block}mlp.gate.weight": values(E, D),
            f"{block}qkv.weight": values(3 * D, D),
            f"{block}strange.weight": values(D, D),
            f"{attention}o_proj.weight": values(D, D),
            f"{attention}q_norm.weight": torch.ones(D),
        }
    )


def tensors_of(model: Tensors) -> dict[str, np.ndarray]:
    """What a converter makes of ``model``."""
    t, block = {name: tensor.numpy() for name, tensor in model.tensors.items()}, "model.layers.0."
    gate_up, qkv = t[f"{block}mlp.experts.gate_up_proj"], t[f"{block}qkv.weight"]
    return {
        "token_embd.weight": t["model.embed_tokens.weight"],
        "blk.0.attn_norm.weight": t[f"{block}input_layernorm.weight"] + 1,
        "blk.0.ffn_gate_exps.weight": np.ascontiguousarray(gate_up[:, 0::2]),  # interleaved
        "blk.0.ffn_up_exps.weight": np.ascontiguousarray(gate_up[:, 1::2]),
        "blk.0.ffn_down_exps.weight": np.stack([t[f"{block}mlp.experts.{i}.down_proj.weight"] for i in range(E)]),
        "blk.0.ffn_gate_inp.weight": t[f"{block}mlp.gate.weight"],
        "blk.0.attn_q.weight": qkv[:D].reshape(4, 2, -1, D).swapaxes(1, 2).reshape(D, D),  # heads permuted
        "blk.0.attn_k.weight": qkv[D : 2 * D],
        "blk.0.attn_v.weight": qkv[2 * D :],
        "blk.0.attn_output.weight": np.ascontiguousarray(t[f"{block}self_attn.o_proj.weight"][:, ::-1]),
        "blk.0.nobody.weight": np.ones((16, D), np.float32),
        "output_norm.weight": t["model.norm.weight"],
    }


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_rows_are_found_in_stacks_slices_and_other_orders(kind: str, model: Tensors, tmp_path: Path) -> None:
    path, block = tmp_path / "template.gguf", "model.layers.0."
    write(path, tensors_of(model), GGMLQuantizationType[kind])
    template = read_template(path)
    found = explain(template, model, everything)
    save_explanation(found, tmp_path / "found")
    assert load_explanation(tmp_path / "found") is not None
    layout = TemplateLayout(template, load_explanation(tmp_path / "found") or found)
    assert found.refused == {
        f"{block}strange.weight": "no tensor of the template holds its rows",
        f"{block}self_attn.o_proj.weight": "no tensor of the template holds its rows",  # its columns are moved
    }
    assert layout.left_out == found.left_out == {*found.refused, f"{block}mlp.gate.weight"}
    assert [tensor.name for tensor in layout.unsearched] == ["blk.0.attn_output.weight", "blk.0.nobody.weight"]
    assert found.unhealed == (f"{block}self_attn.q_norm.weight",)
    assert layout.float_names == (f"{block}input_layernorm.weight", "model.norm.weight")
    down = [f"{block}mlp.experts.{i}.down_proj.weight" for i in range(E)]
    assert layout.tied == dict.fromkeys(down, "blk.0.ffn_down_exps.weight")
    experts = f"{block}mlp.experts.gate_up_proj"
    searched = ["model.embed_tokens.weight", f"{block}qkv.weight", *down, experts]  # in order of use
    assert list(layout.shapes) == searched and layout.shapes[experts] == (E * 2 * F, D)
    packed = {
        name: (FORMATS["Q8_0"], quantize(model.read(name).reshape(-1, columns).numpy(), Q8_0))
        for name, (_, columns) in layout.shapes.items()
    }
    export_gguf(model, packed.__getitem__, tmp_path / "file.gguf", layout=layout)
    written, copied = read_gguf(tmp_path / "file.gguf"), read_gguf(path)
    chosen = {tensor.name for tensor in layout.searched}
    for name, values in tensors_of(model).items():
        router = name == "blk.0.ffn_gate_inp.weight"  # which is small, and rounded in the template
        kept = values.view(np.uint8) if router else copied.read(name)
        expected = quantize(values, Q8_0) if name in chosen else kept
        assert np.array_equal(written.read(name).ravel(), expected.ravel()), name
    file = PackedFile(tmp_path / "file.gguf", model, layout)
    assert all(np.array_equal(file.packed(name), rows) for name, (_, rows) in packed.items())


@pytest.mark.parametrize(
    ("kind", "scale", "rows", "stored"),
    [
        (torch.bfloat16, 1e-6, 2048, "BF16"),  # the smallest of float16 are coarse
        (torch.float32, 1e6, 2048, "BF16"),  # beyond float16
        (torch.bfloat16, 1e-4, 2048, "F16"),  # few are that small
        (torch.bfloat16, 1e-4, 16, "F32"),  # which costs little
        (torch.bfloat16, 1.0, 16, "F16"),  # all are float16 too
    ],
)
def test_what_stays_is_stored_in_a_type_that_does_not_lose_the_model_s_values(
    kind: torch.dtype, scale: float, rows: int, stored: str, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(0)
    turned = (torch.randn(64, rows, generator=random) * scale).to(kind).float()
    if scale == 1.0:
        turned = turned.sign()
    model = Tensors({"model.embed_tokens.weight": turned[:32, :16], "model.layers.0.self_attn.o_proj.weight": turned})
    values = {"token_embd.weight": turned[:32, :16], "blk.0.attn_output.weight": turned.T}
    with np.errstate(over="ignore"):
        write(
            tmp_path / "template.gguf",
            {name: value.contiguous().numpy() for name, value in values.items()},
            GGMLQuantizationType.F16,
        )
    template = read_template(tmp_path / "template.gguf")
    save_explanation(explain(template, model, everything), tmp_path / "found")
    found = load_explanation(tmp_path / "found")
    assert found and "its columns are the rows" in found.refused["model.layers.0.self_attn.o_proj.weight"]
    layout = TemplateLayout(template, found)
    assert layout.retyped == ({stored: ["blk.0.attn_output.weight"]} if stored != "F16" else {})
    assert layout.float_names == ()
    embedding = FORMATS["F16"], turned[:32, :16].contiguous().half().view(torch.uint8).numpy()
    export_gguf(model, lambda name: embedding, tmp_path / "file.gguf", layout=layout)
    written = read_model(tmp_path / "file.gguf")
    assert written.tensors["blk.0.attn_output.weight"].type_name == stored
    if kind == torch.bfloat16 and stored != "F16":
        assert np.array_equal(written.floats("blk.0.attn_output.weight"), turned.T.numpy())
    assert PackedFile(tmp_path / "file.gguf", model, layout).differing_floats(model.read) == []


def test_a_template_with_a_changed_weight_is_of_another_model(model: Tensors, tmp_path: Path) -> None:
    tensors = tensors_of(model)
    tensors["token_embd.weight"] = tensors["token_embd.weight"] * 2
    write(tmp_path / "template.gguf", tensors, GGMLQuantizationType.F32)
    with pytest.raises(TemplateError, match="token_embd.weight to have other values than model.embed_tokens.weight"):
        explain(read_template(tmp_path / "template.gguf"), model, everything)


def test_a_damaged_explanation_is_none(tmp_path: Path) -> None:
    save_explanation(Explanation((), {}, ()), tmp_path / "found")
    whole = (tmp_path / "found").read_bytes()
    (tmp_path / "found").write_bytes(whole[:-1])
    assert load_explanation(tmp_path / "found") is None and load_explanation(tmp_path / "none") is None


def test_names_alone_let_one_expect_the_same_file(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("qwen3")
    export_float(folder, tmp_path / "template.gguf")
    template = read_template(tmp_path / "template.gguf")
    expected = TemplateLayout(template, expected_of(template, folder, everything))
    found = TemplateLayout(template, explain(template, folder, everything))
    assert expected.shapes == found.shapes and expected.fixed_bytes() == found.fixed_bytes()
    assert expected.float_names == found.float_names


def test_equal_rows_are_paired_in_order() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    rows[4] = rows[1]
    order = np.array([5, 1, 0, 4, 2, 3])
    places = pairing(row_hashes(rows[order]), row_hashes(rows))
    assert places is not None and places.tolist() == order.tolist()
    assert pairing(row_hashes(rows), row_hashes(rows[[0, 0, 1, 2, 3, 5]])) is None
    assert len(set(row_hashes(np.eye(64, dtype=np.uint8)).tolist())) == 64
