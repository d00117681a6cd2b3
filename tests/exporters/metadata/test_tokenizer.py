"""llama.cpp, reading the exported vocabulary, makes the tokens of the model's own tokenizer.json, and so do we."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors

from benchmarks.float_gguf import export_float
from bitgenome.common.errors import UserError
from evaluators.data.tokenizer import TokenizerError, load_tokenizer
from evaluators.model.families import EXPORTABLE
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import fixed_bytes
from exporters.metadata.pretokenizers import DIGITS, GPT2, KNOWN, Splitting, UnknownPretokenizerError
from exporters.runtime.llamacpp import LlamaCppRuntime
from exporters.runtime.tokens import check_tokens
from tests.exporters.conftest import QWEN_TOKENIZER
from tests.small_models import (
    VOCABULARY,
    byte_level_tokenizer,
    save_small_model,
    sentencepiece_model,
    sentencepiece_tokenizer,
    split_by,
)

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


def assert_same_tokens(model: Path, path: Path, texts: Sequence[str] = TEXTS, specials: bool = True) -> None:
    """The ids of each text are the library's for tokenizer.json, ours and llama.cpp's, with what stands around it."""
    ours, file = load_tokenizer(model), model / "tokenizer.json"
    truth = Tokenizer.from_file(str(file)) if file.is_file() else ours.backend
    chat = "".join(token.content for token in truth.get_added_tokens_decoder().values())[:64]
    with LlamaCppRuntime(path, 16, threads=1) as runtime:
        for text in [*texts, *([f"a{chat}b"] if specials else [])]:
            assert ours.ids(text) == runtime.tokenize(text), text
            assert ours.encode([text]) == [truth.encode(text, add_special_tokens=False).ids]
            if file.is_file():
                assert ours.ids(text) == truth.encode(text).ids


@pytest.mark.parametrize("model_type", EXPORTABLE)
def test_llamacpp_tokenizes_as_the_model_does(
    model_type: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model(model_type)
    export_float(folder, tmp_path / "f32.gguf")
    assert_same_tokens(folder.path, tmp_path / "f32.gguf")


def test_llamacpp_tokenizes_as_a_real_sentencepiece_vocabulary(stories: ModelFolder, tmp_path: Path) -> None:
    export_float(stories, tmp_path / "f32.gguf")
    assert_same_tokens(stories.path, tmp_path / "f32.gguf")


def test_llamacpp_tokenizes_as_the_embedded_model(embedded: ModelFolder, tmp_path: Path) -> None:
    export_float(embedded, tmp_path / "f32.gguf")
    assert_same_tokens(embedded.path, tmp_path / "f32.gguf")


def test_llamacpp_tokenizes_as_a_real_qwen_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not QWEN_TOKENIZER.is_dir():
        pytest.skip("Qwen2.5's tokenizer is not there")
    rows = 151936  # more than there are tokens
    path = save_small_model(
        tmp_path / "model", "qwen2", tokenizer=False, vocab_size=rows, hidden_size=16, head_dim=4, num_hidden_layers=1
    )
    for file in QWEN_TOKENIZER.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    with caplog.at_level(logging.INFO):
        export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert "has no tokenizer.json: its tokenizer is what transformers' Qwen2Tokenizer makes" in caplog.text
    chat = "<|im_start|>user\nit's 数学<|im_end|>\n"
    assert_same_tokens(path, tmp_path / "f32.gguf", [*TEXTS, chat])
    keys = read_gguf(tmp_path / "f32.gguf").key_values
    assert keys["tokenizer.ggml.eos_token_id"] == 151645
    assert "<|im_start|>" in keys["tokenizer.chat_template"]


def test_tokenizer_json_decides_how_text_is_split_whatever_the_model_is_called(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "qwen2", tokenizer=False)  # a model with another family's tokenizer
    byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<|begin|>{{ m.content }}<|end|>{% endfor %}"
    named = settings | {"tokenizer_class": "Qwen2Tokenizer", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    keys = read_gguf(tmp_path / "f32.gguf").key_values
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.chat_template"] == template
    chat = "<|begin|>in 2026 it's 12345<|end|>"
    assert_same_tokens(path, tmp_path / "f32.gguf", [*TEXTS, chat])
    with LlamaCppRuntime(tmp_path / "f32.gguf", 16, threads=1) as runtime:
        messages = [{"role": "user", "content": "in 2026 it's 12345"}]
        assert runtime.ask("/apply-template", {"messages": messages})["prompt"] == chat


@pytest.mark.parametrize(("splitting", "name"), KNOWN.items(), ids=KNOWN.values())
def test_every_known_pretokenizer_splits_as_llamacpp_does(splitting: Splitting, name: str, tmp_path: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = [
        digits if pattern == DIGITS else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in splitting.patterns
        if pattern != GPT2
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in splitting.patterns)
    pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    path = save_small_model(tmp_path / "model", "llama", tokenizer=False)
    byte_level_tokenizer(pre_tokenizer, splitting.ignore_merges).save_pretrained(path)
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert read_gguf(tmp_path / "f32.gguf").key_values["tokenizer.ggml.pre"] == name
    assert_same_tokens(path, tmp_path / "f32.gguf")


def test_spaces_made_visible_by_the_pretokenizer_are_the_same_to_llamacpp_but_for_leading_ones(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "mistral", tokenizer=False)
    sentencepiece_tokenizer(metaspace=True).save_pretrained(path)
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert_same_tokens(path, tmp_path / "f32.gguf", [text.lstrip(" ") for text in TEXTS], specials=False)


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


def saved_with(path: Path, change: Callable[[dict[str, Any]], object]) -> ModelFolder:
    """A small Qwen2 whose tokenizer.json is changed in place."""
    save_small_model(path, "qwen2")
    tables = json.loads((path / "tokenizer.json").read_text())
    change(tables)
    (path / "tokenizer.json").write_text(json.dumps(tables))
    return ModelFolder(path)


def added(tables: dict[str, Any], *tokens: tuple[int, str]) -> None:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tables["added_tokens"] += [{"id": index, "content": text, "special": True, **plain} for index, text in tokens]


def test_a_padding_name_is_of_no_token(tmp_path: Path) -> None:
    folder = saved_with(tmp_path / "model", lambda tables: added(tables, (len(tables["model"]["vocab"]), "[PAD508]")))
    export_float(folder, tmp_path / "f32.gguf")
    tokens = read_gguf(tmp_path / "f32.gguf").key_values["tokenizer.ggml.tokens"]
    assert tokens.index("[PAD508]") < 508 and tokens[508] == "[[PAD508]]"
    assert len(set(tokens)) == len(tokens)
    assert_same_tokens(folder.path, tmp_path / "f32.gguf", ["a[PAD508]b"])  # llama.cpp aborts over equal texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "no normalizer or NFC .* found Lowercase"),
        (
            lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}),
            "found NFC, NFKC",
        ),
        (lambda t: added(t, (len(t["model"]["vocab"]), "a")), "tokens of different texts, .* found 'a' as token"),
        (lambda t: added(t, (505, "<gap>")), "ids without gaps, .* found '<gap>' as token 505 and as"),
        (lambda t: t["model"]["vocab"].update(two=t["model"]["vocab"]["a"]), "an id for each token .*'(a|two)' as"),
        (
            lambda t: t.update(
                post_processor=json.loads(
                    processors.TemplateProcessing(
                        single="<|unused|> $A", special_tokens=[("<|unused|>", 0)]
                    ).__getstate__()
                )
            ),
            r"puts BOS before a text .* found tokens \[0\] where bos is 1",
        ),
        (lambda t: t["model"].update(vocab=5), "expected a tokenizer in .*tokenizer.json, found"),
    ],
    ids=["lowercase", "two normalizers", "equal texts", "a gap", "one id for two", "another frame", "unreadable"],
)  # fmt: skip
def test_a_tokenizer_that_gguf_cannot_say_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=message) as refusal:
        fixed_bytes(saved_with(tmp_path / "model", change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"chat_template": "bad \\ud83d end"}', "a chat template in UTF-8"),
        ("chat_template.jinja", b"\xff\xfe", "a chat template in UTF-8"),
        ("tokenizer_config.json", "[]", "a JSON object in .*, found a list"),
        ("tokenizer_config.json", '{"chat_template": 5}', "a text as chat template in .*, found a int"),
        ("special_tokens_map.json", "{", "expected JSON in"),
    ],
)
def test_a_broken_file_beside_the_tokenizer_is_one_sentence(
    file: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = save_small_model(tmp_path / "model", "qwen2")
    (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as refusal:
        fixed_bytes(ModelFolder(path))
    assert "\n" not in str(refusal.value)


def test_a_sentencepiece_model_alone_is_refused_with_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_small_model(tmp_path / "model", "llama", tokenizer=False)
    (path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match="found only tokenizer.model, .*: pip install sentencepiece"):
        fixed_bytes(ModelFolder(path))


def test_a_sentencepiece_model_alone_is_read_where_sentencepiece_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    path = save_small_model(tmp_path / "model", "llama", tokenizer=False)
    (path / "tokenizer.model").write_bytes(sentencepiece_model(VOCABULARY))
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    assert load_tokenizer(path).bos == 1
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert read_gguf(tmp_path / "f32.gguf").key_values["tokenizer.ggml.add_bos_token"] is True
    assert_same_tokens(path, tmp_path / "f32.gguf", [text.lstrip(" ") for text in TEXTS], specials=False)


def test_an_id_that_no_token_has_is_left_out(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    keys = read_gguf(tmp_path / "f32.gguf").key_values
    assert "tokenizer.ggml.padding_token_id" not in keys and keys["tokenizer.ggml.bos_token_id"] == 1


def test_a_file_says_that_bos_is_added_where_the_model_adds_it(tmp_path: Path) -> None:
    path = save_small_model(tmp_path / "model", "llama")
    tables, config = (json.loads((path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    (path / "tokenizer.json").write_text(json.dumps(tables | {"post_processor": None}))
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert load_tokenizer(path).ids("a")[0] == load_tokenizer(path).bos == 1
    export_float(ModelFolder(path), tmp_path / "f32.gguf")
    assert read_gguf(tmp_path / "f32.gguf").key_values["tokenizer.ggml.add_bos_token"] is True
    with LlamaCppRuntime(tmp_path / "f32.gguf", 16, threads=1) as runtime:
        assert runtime.tokenize("it's") == load_tokenizer(path).ids("it's")


def test_the_proof_warns_where_llamacpp_makes_other_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ModelFolder(save_small_model(tmp_path / "model", "qwen2"))
    export_float(folder, tmp_path / "f32.gguf")
    with LlamaCppRuntime(tmp_path / "f32.gguf", 16, threads=1) as runtime, caplog.at_level(logging.WARNING):
        check_tokens(runtime, folder.path, "\n".join(TEXTS))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        saved_with(tmp_path / "model", lambda tables: tables.update(normalizer={"type": "Lowercase"}))
        check_tokens(runtime, folder.path, "it IS so")
    assert "llama.cpp makes other tokens of text than the model" in caplog.text


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
