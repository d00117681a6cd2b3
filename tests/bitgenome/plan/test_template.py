"""A template is checked against its model before minutes of work, and compared with it once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from safetensors.torch import load_file

from benchmarks.float_gguf import export_float
from bitgenome.common.errors import UserError
from bitgenome.config.run import parse_config
from bitgenome.plan import template as templates
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.seconds import Work
from evaluators.data.tokenizer import load_tokenizer
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_writer import export_gguf
from exporters.files.splits import Shards, split_gguf
from exporters.template.layout import TemplateLayout
from quantizers.formats.table import FORMATS
from tests.bitgenome.conftest import LITTLE
from tests.small_models import save_small_model

TEXT = {"window": 32, "tokens": {"calibration": 64, "sensitivity": 32, "search": 32, "validation": 32, "test": 64}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(save_small_model(tmp_path_factory.mktemp("small") / "model", "llama"))


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    def plan(model: Path, template: Path | None, weights: bool = True, **changes: Any) -> Plan:
        named = {"name": "run", "storage_path": str(tmp_path / "runs"), "budget": {"file_size": 78000}}
        settings = {**LITTLE, "text": TEXT, **named, "model": str(model), "template": template and str(template)}
        return make_plan(parse_config(settings | changes, "here"), weights)

    return plan


def cut(folder: ModelFolder, path: Path) -> None:
    export_float(folder, path)
    path.write_bytes(path.read_bytes()[:-100])


def quantized(folder: ModelFolder, path: Path) -> None:
    def packed(name: str) -> Any:
        return FORMATS["Q8_0"], quantize(folder.read(name).numpy(), GGMLQuantizationType.Q8_0)

    export_gguf(folder, packed, path)


def of_another_seed(folder: ModelFolder, path: Path) -> None:
    export_float(ModelFolder(save_small_model(path.parent / "other", "llama", seed=1)), path)


def of_fewer_layers(folder: ModelFolder, path: Path) -> None:
    export_float(ModelFolder(save_small_model(path.parent / "other", "llama", num_hidden_layers=1)), path)


def of_other_tokens(folder: ModelFolder, path: Path) -> None:
    other = shutil.copytree(folder.path, path.parent / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, *more = sorted(vocabulary, key=vocabulary.__getitem__)[-100:]
    tokenizer["model"]["vocab"] |= dict(zip([*more, first], [vocabulary[t] for t in [first, *more]], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    export_float(ModelFolder(other), path)


def of_an_unknown_architecture(folder: ModelFolder, path: Path) -> None:
    writer = GGUFWriter(path, "nobody")
    writer.add_tensor("token_embd.weight", folder.read("model.embed_tokens.weight").numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def nothing(folder: ModelFolder, path: Path) -> None:
    """There is no file."""


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (nothing, "expected a GGUF file at .*, found none"),
        (cut, "it is truncated"),
        (quantized, "token_embd.weight in Q8_0 in .*: it is already quantized"),
        (of_another_seed, "expected a template of this model, found token_embd.weight to have other values"),
        (of_fewer_layers, r"whose num_hidden_layers is 2, found llama.block_count 1"),
        (of_other_tokens, r"expected a template with the model's vocabulary, found \d+ of \d+ tokens to differ"),
        (of_an_unknown_architecture, "architecture that gguf knows, found 'nobody'"),
    ],
)
def test_what_is_no_template_of_the_model_is_one_sentence(
    make: Callable[[ModelFolder, Path], None],
    sentence: str,
    folder: ModelFolder,
    planned: Callable[..., Plan],
    tmp_path: Path,
) -> None:
    make(folder, tmp_path / "template.gguf")
    with pytest.raises(UserError, match=sentence) as refusal:
        planned(folder.path, tmp_path / "template.gguf")
    assert "\n" not in str(refusal.value)


def after_gpt2(folder: ModelFolder, path: Path, moved: str = "none") -> None:
    """Write what a converter makes of GPT-2: its weights transposed, as other models store theirs.

    The columns of matrices with ``moved`` in their names are in another order.
    """
    writer = GGUFWriter(path, "gpt2")
    writer.add_block_count(folder.config["n_layer"])
    writer.add_embedding_length(folder.config["n_embd"])
    vocabulary = load_tokenizer(folder.path).backend.get_vocab()
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    table = get_tensor_name_map(MODEL_ARCH.GPT2, folder.config["n_layer"])
    for name, file in folder.stored.files.items():
        values = load_file(file)[name]
        matrix = ".h." in name and values.ndim > 1
        stored = values.T.contiguous() if matrix else values
        if moved in name and matrix:
            stored = stored.flip(1)
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_that_transformers_holds_transposed_are_searched(planned: Callable[..., Plan], tmp_path: Path) -> None:
    folder = ModelFolder(save_small_model(tmp_path / "gpt2", "gpt2"))
    after_gpt2(folder, tmp_path / "template.gguf")
    budget = {"compression_ratio": 0.5}
    plan = planned(folder.path, tmp_path / "template.gguf", budget=budget)
    assert set(plan.file.kinds.values()) == {"token_embd", "attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    assert len(plan.file.kinds) == 1 + 4 * 2
    nothing: Any = None
    assert Work(plan, nothing, 1, resident=True).layers == 2  # config.json calls it n_layer
    with pytest.raises(UserError, match="at most the model's context"):
        planned(folder.path, tmp_path / "template.gguf", budget=budget, text=TEXT | {"window": 512})


def test_what_stays_as_in_the_template_is_said_once_for_all_blocks(
    planned: Callable[..., Plan], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ModelFolder(save_small_model(tmp_path / "gpt2", "gpt2"))
    after_gpt2(folder, tmp_path / "template.gguf", moved="attn.c_proj")
    plan = planned(folder.path, tmp_path / "template.gguf", budget={"compression_ratio": 0.6})
    first, second = (
        record.message for record in caplog.records if record.levelname == "WARNING" and "stay" in record.message
    )
    assert first == (
        "transformer.h.0.attn.c_proj.weight, as 1 of other blocks, stays as it is in template.gguf: no tensor of the "
        "template holds its rows"
    )
    assert second.startswith("2 tensors that llama.cpp quantizes stay in floats (0.0328 MB of the file), as ")
    assert second.endswith(": blk.0.attn_output.weight, blk.1.attn_output.weight")
    assert plan.file.left_out == {f"transformer.h.{block}.attn.c_proj.weight" for block in range(2)}


def test_a_type_without_export_of_its_own_is_told_of_templates(planned: Callable[..., Plan], tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "gemma", "gemma2")
    with pytest.raises(UserError, match=f"it has no GGUF export; .* bitgenome convert {model} makes one"):
        planned(model, None)


def test_a_template_is_compared_once_and_its_file_has_the_size_of_the_built_one(
    folder: ModelFolder, planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_float(folder, tmp_path / "template.gguf", "F16")
    first = planned(folder.path, tmp_path / "template.gguf")
    assert isinstance(first.file, TemplateLayout)
    assert first.space == planned(folder.path, None).space
    first_part, *others = split_gguf(tmp_path / "template.gguf", Shards(max_tensors=5))
    assert others and planned(folder.path, first_part).space == first.space
    monkeypatch.delattr(templates, "explain")
    assert planned(folder.path, tmp_path / "template.gguf").space == first.space


def test_a_gguf_in_floats_is_its_own_template_of_which_the_headers_tell_the_size(
    folder: ModelFolder, planned: Callable[..., Plan], tmp_path: Path
) -> None:
    export_float(folder, tmp_path / "model.gguf", "F16")
    plan, headers = (planned(tmp_path / "model.gguf", None, weights) for weights in (True, False))
    assert isinstance(plan.file, TemplateLayout) and isinstance(headers.file, TemplateLayout)
    assert plan.space == headers.space and plan.file.float_names == headers.file.float_names
    quantized(folder, tmp_path / "coarse.gguf")
    assert not isinstance(planned(tmp_path / "coarse.gguf", None, False).file, TemplateLayout)
