"""Small random models in Hugging Face folders, with tokenizers, for tests that need every tensor but no knowledge."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 512
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXT = [
    "def read(path):\n    return open(path).read()\n",
    "The quick brown fox jumps over the lazy dog; 12345 times, it's said.\n\n",
    "for index, name in enumerate(names):\n\tif name is None:\n\t\tcontinue\n",
    "Größe, naïve, 数学, привет",
]
CONFIGS: dict[str, type] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi3": Phi3Config,
}
MIXTURES: dict[str, type] = {"qwen3_moe": Qwen3MoeConfig, "mixtral": MixtralConfig, "gpt_oss": GptOssConfig}
TRANSPOSED: dict[str, type] = {"gpt2": GPT2Config}  # whose layers hold their weights so


def save_small_model(path: Path, model_type: str, *, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a random ``model_type`` model, float32, under ``path`` and return it.

    Defaults: 2 layers, hidden 64, 4 heads (2 of keys), head size 16, ``VOCABULARY`` tokens, tied embedding. Norms and
    biases are random too, so that a tensor in the wrong place shows.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if model_type.startswith("gemma"):
        settings["query_pre_attn_scalar"] = settings["head_dim"]
    config = (CONFIGS | MIXTURES | TRANSPOSED)[model_type](**(settings | overrides))
    center = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(center, 0.2)
            else:
                parameter.normal_(0.0, 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(path)
    if tokenizer:
        if model_type == "mistral":
            sentencepiece_tokenizer().save_pretrained(path)
        elif model_type == "llama":
            byte_level_tokenizer(split_by(LLAMA3_SPLIT), ignore_merges=True).save_pretrained(path)
        else:
            byte_level_tokenizer(split_by(QWEN2_SPLIT)).save_pretrained(path)
    return path


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split into the matches of ``pattern`` and map their bytes to characters."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])


def byte_level_tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer, ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most ``VOCABULARY`` tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<|unused|>", "<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=[AddedToken(token, special=True) for token in tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece_tokenizer(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """BPE with byte fallback over text whose spaces are made visible, as Llama 2's and Mistral's.

    By a normalizer (their first tokenizer.json) or by a ``metaspace`` pre-tokenizer (the later one).
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 8, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of ``sentencepiece_tokenizer`` with a chat template, and special tokens around its turns."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentencepiece_model(size: int) -> bytes:
    """A SentencePiece model file (BPE with byte fallback) of ``size`` pieces, as the first Llama releases had alone.

    It takes the package sentencepiece.
    """
    model = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, size
    trainer.unk_id, trainer.bos_id, trainer.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = True, False
    characters = ["▁", *map(chr, range(33, 127))]
    pairs = [first + second for first in "▁etaoinshr" for second in "etaoinshrdl"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
    pieces += [(pair, -float(rank), 1) for rank, pair in enumerate(pairs[: size - len(pieces) - len(characters)])]
    pieces += [(character, -1000.0 - rank, 1) for rank, character in enumerate(characters)]
    for text, score, kind in [*pieces, *((f"zq{i}", -5000.0, 1) for i in range(len(pieces), size))]:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    return bytes(model.SerializeToString())
