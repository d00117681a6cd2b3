"""Makes the tokenizers of the small models: the embedded model's, or a SentencePiece-style one of the same size."""

import json
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

BYTE_LEVEL = Path(__file__).parents[2] / "models" / "stdlib-6m"
SIZE = 4096
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
SPACE = "▁"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MODULES = [
    "argparse",
    "ast",
    "calendar",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "inspect",
    "mailbox",
    "optparse",
    "pathlib",
    "pdb",
    "pickle",
    "shutil",
    "statistics",
    "tarfile",
    "threading",
    "typing",
    "zipfile",
]
FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE_CONFIG = {"tokenizer_class": "TokenizersBackend", "add_bos_token": True, "add_eos_token": False,
                        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # fmt: skip


def write_tokenizer(path: Path, sentencepiece: bool, prefix: bool = True, added: Sequence[str] = ()) -> None:
    """Write tokenizer.json and tokenizer_config.json to the folder ``path``.

    With ``sentencepiece`` it is of that kind, and ``prefix`` says whether a space is put before a text. Tokens that the
    type's converter asks for are ``added`` after SIZE others.
    """
    if sentencepiece:
        tokenizer, config = sentencepiece_tokenizer(prefix), SENTENCEPIECE_CONFIG
    else:
        tokenizer, config = (json.loads((BYTE_LEVEL / f).read_text(encoding="utf-8")) for f in FILES)
    tokenizer["added_tokens"] += [_added(SIZE + i, token) for i, token in enumerate(added)]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def sentencepiece_tokenizer(prefix: bool) -> dict[str, Any]:
    """Return a tokenizer.json in Llama's way: byte-pair merges of characters with bytes to fall back to."""
    vocabulary, merges = _trained()
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, token) for i, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begin,
            "pair": [*begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def _added(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


@cache
def _trained() -> tuple[dict[str, int], list[list[str]]]:
    """Return vocabulary and merges, learned from modules of the running interpreter's library."""
    tokenizer = Tokenizer(models.BPE())
    lines = pre_tokenizers.Split(
        Regex(r"\n+|[^\n]+"), "isolated"
    )  # as Gemma's: no token has both letters and line feeds
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(SPACE, prepend_scheme="never")])
    room = SIZE - len(SPECIAL) - len(BYTES)
    trainer = trainers.BpeTrainer(vocab_size=room, limit_alphabet=200, show_progress=False)
    library = Path(sysconfig.get_path("stdlib"))
    tokenizer.train([str(library / f"{name}.py") for name in MODULES if (library / f"{name}.py").is_file()], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    first = [*SPECIAL, *BYTES]
    vocabulary = {token: i for i, token in enumerate(first)}
    for token in sorted(learned["vocab"], key=learned["vocab"].__getitem__):
        vocabulary[token] = len(vocabulary)
    return vocabulary, [list(pair) for pair in learned["merges"]]
