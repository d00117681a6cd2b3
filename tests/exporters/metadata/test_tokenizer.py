"""llama.cpp, reading the exported vocabulary, makes the tokens that transformers makes."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.float_gguf import export_float
from evaluators.data.tokenizer import TokenizerError
from evaluators.model.families import EXPORTABLE
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import fixed_bytes
from exporters.metadata.pretokenizers import DIGITS, GPT2, KNOWN, Splitting, UnknownPretokenizerError
from exporters.runtime.llamacpp import LlamaCppRuntime
from tests.exporters.conftest import QWEN_TOKENIZER
from tests.small_models import byte_level_tokenizer, save_small_model, sentencepiece_tokenizer, split_by

TEXTS = [
    "def read(path):\n    return open(path).read()\n",
    "  leading spaces, trailing spaces  ",
    "tabs\tand\r\nreturns\n\n\n   mixed \n end",
    "it's I'LL we'Ve 'tis 1234567 3.14159 x_1",
    "Größe naïve 数学 привет مرحبا 🙂👍🏽 é",
    "a",
    "!!??...///;;  (([[",
    "CamelCaseWords and SHOUTING iPhone",
]


def assert_same_tokens(tokenizer: PreTrainedTokenizerBase, path: Path, texts: Sequence[str] = TEXTS) -> None:
    with LlamaCppRuntime(path, 16, threads=1) as runtime:
        for text in texts:
            assert runtime.tokenize(text) == tokenizer(text).input_ids, text


@pytest.mark.parametrize("model_type", EXPORTABLE)
def test_llamacpp_tokenizes_as_transformers_does(
    model_type: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model(model_type)
    export_float(folder, tmp_path / "f32.gguf")
    assert_same_tokens(AutoTokenizer.from_pretrained(folder.path), tmp_path / "f32.gguf")


def test_llamacpp_tokenizes_as_a_real_sentencepiece_vocabulary(stories: ModelFolder, tmp_path: Path) -> None:
    export_float(stories, tmp_path / "f32.gguf")
    assert_same_tokens(AutoTokenizer.from_pretrained(stories.path), tmp_path / "f32.gguf")


def test_llamacpp_tokenizes_as_the_embedded_model(embedded: ModelFolder, tmp_path: Path) -> None:
    export_float(embedded, tmp_path / "f32.gguf")
    assert_same_tokens(AutoTokenizer.from_pretrained(embedded.path), tmp_path / "f32.gguf")


def test_llamacpp_tokenizes_as_a_real_qwen_vocabulary(tmp_path: Path) -> None:
    if not QWEN_TOKENIZER.is_dir():
        pytest.skip("Qwen2.5's tokenizer is not there")
    rows = 151936  # more than there are tokens
    path = save_small_model(
        tmp_path / "model", "qwen2", tokenizer=False, vocab_size=rows, hidden_size=16, head_dim=4, num_hidden_layers=1
    )
    for file in QWEN_TOKENIZER.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    chat = "<|im_start|>user\nit's 数学<|im_end|>\n"
    assert_same_tokens(AutoTokenizer.from_pretrained(path), tmp_path / "f32.gguf", [*TEXTS, chat])
    keys = read_gguf(tmp_path / "f32.gguf").key_values
    assert keys["tokenizer.ggml.eos_token_id"] == 151645
    assert "<|im_start|>" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize(("splitting", "name"), KNOWN.items(), ids=KNOWN.values())
def test_every_known_pretokenizer_splits_as_llamacpp_does(splitting: Splitting, name: str, tmp_path: Path) -> None:
    steps = {
        (GPT2,): pre_tokenizers.ByteLevel(add_prefix_space=False),
        (DIGITS, GPT2): pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }
    pre_tokenizer = steps.get(splitting.patterns) or split_by(splitting.patterns[0])
    path = save_small_model(tmp_path / "model", "llama", tokenizer=False)
    tokenizer = byte_level_tokenizer(pre_tokenizer, splitting.ignore_merges)
    tokenizer.save_pretrained(path)
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert read_gguf(tmp_path / "f32.gguf").key_values["tokenizer.ggml.pre"] == name
    assert_same_tokens(tokenizer, tmp_path / "f32.gguf")


def test_spaces_made_visible_by_the_pretokenizer_are_the_same_to_llamacpp_but_for_leading_ones(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "mistral", tokenizer=False)
    tokenizer = sentencepiece_tokenizer(metaspace=True)
    tokenizer.save_pretrained(path)
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert_same_tokens(tokenizer, tmp_path / "f32.gguf", [text.lstrip(" ") for text in TEXTS])


def test_an_unknown_pretokenizer_is_refused(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "llama", tokenizer=False)
    byte_level_tokenizer(split_by(r"\w+|\W+")).save_pretrained(path)
    with pytest.raises(UnknownPretokenizerError, match=r"qwen2, llama-bpe.*found \['.*w\+"):
        fixed_bytes(ModelFolder(path))


def test_ids_without_a_token_are_padded_to_the_embedding(
    small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("qwen2")
    export_float(folder, tmp_path / "f32.gguf")
    keys = read_gguf(tmp_path / "f32.gguf").key_values
    tokens = json.loads((folder.path / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(keys["tokenizer.ggml.tokens"]) == 512 > len(tokens)
    assert keys["tokenizer.ggml.tokens"][511] == "[PAD511]"
    assert keys["tokenizer.ggml.token_type"][511] == 5


def test_more_tokens_than_embedding_rows_are_refused(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "qwen2", vocab_size=300)
    with pytest.raises(TokenizerError, match="expected at most 300 tokens"):
        fixed_bytes(ModelFolder(path))


def test_a_folder_without_tokenizer_is_exported_only_when_allowed(
    small_model: Callable[..., ModelFolder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = small_model("qwen2", tokenizer=False)
    with pytest.raises(TokenizerError, match="expected a tokenizer in"):
        export_float(folder, tmp_path / "f32.gguf")
    with caplog.at_level(logging.WARNING):
        export_float(folder, tmp_path / "f32.gguf", allow_missing_tokenizer=True)
    assert "token ids only" in caplog.text
    assert read_gguf(tmp_path / "f32.gguf").key_values["tokenizer.ggml.model"] == "none"


def test_special_ids_and_the_chat_template_are_kept(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "llama")
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    keys = read_gguf(tmp_path / "f32.gguf").key_values
    assert keys["tokenizer.ggml.bos_token_id"] == 1
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 3]  # control tokens
