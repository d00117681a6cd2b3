"""A GGUF file is opened as the folder that it was made from, or refused in one sentence."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from benchmarks.float_gguf import export_float
from bitgenome.common import layout
from evaluators.data.tokenizer import load_tokenizer
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.metadata.hyperparameters import model_metadata
from exporters.metadata.pretokenizers import KNOWN, pre_tokenizer_of, pretokenizer_name
from exporters.metadata.tokenizer import tokenizer_metadata
from exporters.opening.folder import openable, write_folder
from exporters.opening.source import GgufModelError, stem_of
from exporters.runtime.llamacpp import LlamaCppRuntime

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"head_dim": 32, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"rope_parameters": LINEAR, "tie_word_embeddings": False}),
    ("qwen3", {"head_dim": 32}),
]
PROBES = [
    "Hello world! 123 4567.89", "  multiple   spaces\n\n\tand tabs  ", "Größe, naïve 数学 привет",
    "def f(x):\n    return x**2 # it's I'LL\r\n", "x²½ ٣٤٥ 🙂👍🏽 e\u0301 <|endoftext|> a<s>b", "\n\n\n", "a",
]  # fmt: skip


def opened(path: Path, folder: Path, weights: bool = True) -> ModelFolder:
    write_folder(openable(path), folder, weights)
    return ModelFolder(folder)


def write(path: Path, source: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], parts: int = 1) -> Path:
    """Write ``source`` after ``change`` of its key-values and its tensors (bytes, type, shape), in ``parts`` files."""
    contents = read_gguf(source)
    keys = dict(contents.key_values)
    tensors: dict[str, Any] = {
        name: (contents.read(name), gguf.GGMLQuantizationType[tensor.type_name], tensor.shape)
        for name, tensor in contents.tensors.items()
    }
    change(keys, tensors)
    names = list(tensors)
    for part in range(parts):
        file = path.with_name(f"{path.stem}-{part + 1:05}-of-{parts:05}.gguf") if parts > 1 else path
        writer = gguf.GGUFWriter(file, keys["general.architecture"])
        for key, value in (keys if part == 0 else {}).items():
            if key != "general.architecture":
                add(writer, key, value)
        if parts > 1:
            for key, value in {"split.no": part, "split.count": parts, "split.tensors.count": len(names)}.items():
                writer.add_uint16(key, value)
        for name in names[part::parts]:
            data, kind, shape = tensors[name]
            writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_the_folder_is_the_one_that_the_file_was_made_from(
    model_type: str, overrides: Mapping[str, Any], small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model(model_type, **overrides)
    export_float(folder, tmp_path / "f32.gguf")
    found = opened(tmp_path / "f32.gguf", tmp_path / "f32")
    expected_keys = {key: v for key, v in model_metadata(folder).items() if key != "general.name"}
    assert {key: v for key, v in model_metadata(found).items() if key != "general.name"} == expected_keys
    assert tokenizer_metadata(found) == tokenizer_metadata(folder)
    assert found.shapes == folder.shapes
    assert all(torch.equal(found.read(name), folder.read(name).float()) for name in folder.shapes)
    assert found.full_precision is None


@pytest.mark.parametrize(
    ("kind", "stored"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)]
)
def test_floats_keep_their_type_and_coarser_weights_are_decoded_exactly(
    kind: str, stored: torch.dtype, embedded: ModelFolder, tmp_path: Path
) -> None:
    def as_kind(keys: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, (data, _, shape) in tensors.items():
            if len(shape) == 2:
                number = gguf.GGMLQuantizationType[kind]
                tensors[name] = (gguf.quantize(data.view(np.float32), number).view(np.uint8), number, shape)

    export_float(embedded, tmp_path / "f32.gguf")
    path = write(tmp_path / f"{kind}.gguf", tmp_path / "f32.gguf", as_kind)
    found = opened(path, tmp_path / "folder")
    value = found.read("model.layers.1.mlp.down_proj.weight")
    assert value.dtype == stored and found.read("model.norm.weight").dtype == torch.float32
    assert np.array_equal(value.float().numpy(), read_gguf(path).dequantized("blk.1.ffn_down.weight"))
    assert (found.full_precision is None) == (kind != "Q8_0")
    if kind == "BF16":  # as the model is stored
        assert all(torch.equal(found.read(name).float(), embedded.read(name).float()) for name in found.shapes)


def test_headers_alone_say_what_the_whole_folder_holds(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    export_float(small_model("llama"), tmp_path / "f16.gguf", "F16")
    whole = opened(tmp_path / "f16.gguf", tmp_path / "whole")
    headers = opened(tmp_path / "f16.gguf", tmp_path / "headers", weights=False)
    assert (headers.config, headers.shapes, headers.types) == (whole.config, whole.shapes, whole.types)
    assert headers.weights_bytes == whole.weights_bytes
    listed = [json.loads((folder.path / layout.OPENED).read_text())["files"] for folder in (headers, whole)]
    assert listed[0] == {} and list(listed[1]) == ["model.safetensors"]


def test_a_split_file_is_the_same_model(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("qwen3")
    export_float(folder, tmp_path / "one.gguf")
    first = write(tmp_path / "split.gguf", tmp_path / "one.gguf", lambda keys, tensors: None, parts=3)
    found = opened(first, tmp_path / "split")
    assert all(torch.equal(found.read(name), folder.read(name).float()) for name in folder.shapes)
    first.with_name("split-00002-of-00003.gguf").unlink()
    with pytest.raises(GgufModelError, match="expected the 3 parts .* found no split-00002-of-00003.gguf"):
        openable(first)
    with pytest.raises(GgufModelError, match="expected the first part"):
        openable(first.with_name("split-00003-of-00003.gguf"))


@pytest.mark.parametrize("pre", sorted(KNOWN.values()))
def test_a_splitting_is_named_as_it_was(pre: str) -> None:
    pre_tokenizer, ignore_merges = pre_tokenizer_of(pre)
    tables = {"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": ignore_merges}}
    assert pretokenizer_name(tables) == pre


def test_tokens_are_those_of_llamacpp(
    embedded: ModelFolder, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    export_float(embedded, tmp_path / "qwen2.gguf")
    export_float(small_model("mistral", sliding_window=None), tmp_path / "pieces.gguf")
    for pre in ("smollm", "tekken", "deepseek-coder"):  # of the same merges
        write(tmp_path / f"{pre}.gguf", tmp_path / "qwen2.gguf", with_keys(tokenizer__ggml__pre=pre))
    for path in sorted(tmp_path.glob("*.gguf")):
        tokenizer = load_tokenizer(opened(path, tmp_path / path.stem, weights=False).path)
        with LlamaCppRuntime(path, 64, threads=1) as runtime:
            assert [(path.stem, tokenizer.ids(text)) for text in PROBES] == [
                (path.stem, runtime.tokenize(text)) for text in PROBES
            ]


def test_a_model_is_named_without_the_type_of_its_weights() -> None:
    names = {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct",
        "Qwen3-8B-IQ4_XS.gguf": "Qwen3-8B",
        "gpt-oss-20b-MXFP4.gguf": "gpt-oss-20b",
        "Llama-3.1-8B-bf16-00001-of-00003.gguf": "Llama-3.1-8B",
        "model.gguf": "model",
    }
    assert {name: stem_of(Path(name)) for name in names} == names


def without(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda keys, tensors: (keys if key in keys else tensors).pop(key)  # type: ignore[func-returns-value]


def with_keys(**values: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda keys, tensors: keys.update({name.replace("__", "."): value for name, value in values.items()})


BAD = {
    "architecture": (with_keys(general__architecture="rwkv6"), "rwkv6 is not supported"),
    "no tokenizer": (with_keys(tokenizer__ggml__model="none"), "expected a GGUF file with a tokenizer, found none"),
    "other tokenizer": (with_keys(tokenizer__ggml__model="bert"), "found 'bert'"),
    "pre-tokenizer": (with_keys(tokenizer__ggml__pre="chameleon"), "found chameleon as tokenizer.ggml.pre"),
    "hyperparameter": (with_keys(llama__logit_scale=4), "llama.logit_scale = 4, for which LlamaConfig has no setting"),
    "rope": (with_keys(llama__rope__scaling__type="su"), "found 'su'"),
    "missing key": (without("llama.block_count"), "block_count"),
    "missing tensor": (without("blk.1.ffn_up.weight"), "weights of model.layers.1.mlp.up_proj.weight, found none"),
    "other tensor": (
        lambda keys, tensors: tensors.update({"blk.0.ffn_extra.weight": tensors["blk.0.ffn_up.weight"]}),
        "found blk.0.ffn_extra.weight",
    ),
    "other shape": (
        lambda keys, tensors: tensors.update({"blk.0.ffn_up.weight": tensors["blk.0.attn_q.weight"]}),
        "weights of model.layers.0.mlp.up_proj.weight, found",
    ),
    "no model": (with_keys(general__type="imatrix"), "found a GGUF file of type 'imatrix'"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_no_folder_can_be_made_of_is_refused_in_a_sentence(
    what: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    change, said = BAD[what]
    export_float(small_model("llama"), tmp_path / "whole.gguf")
    path = write(tmp_path / "bad.gguf", tmp_path / "whole.gguf", change)
    with pytest.raises(GgufModelError) as refused:
        openable(path)
    message = str(refused.value)
    assert said in message and "expected" in message and str(path) in message and "\n" not in message


def test_a_cut_file_is_refused(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    export_float(small_model("llama"), tmp_path / "cut.gguf")
    content = (tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:-1000])
    with pytest.raises(GgufModelError, match="it is truncated"):
        openable(tmp_path / "cut.gguf")
    with pytest.raises(GgufModelError, match=r"expected a GGUF file at .*, found none"):
        openable(tmp_path / "none.gguf")
