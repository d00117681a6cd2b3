"""Train the embedded model: a small Qwen2 on the standard library's sources.

Run ``python -m models.train --out models/stdlib-6m``; about an hour on two cores. The modules named in
``splits.json`` are never read for training, so that calibration, search, validation and test text is unseen.
"""

import argparse
import copy
import json
import logging
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from evaluators.data.stdlib import SPLITS, load_held_out, read_modules, training_documents

log = logging.getLogger(__name__)

VOCABULARY = 4096
CONTEXT = 512
END_OF_TEXT = "<|endoftext|>"
# Qwen2's own pre-tokenizer, which llama.cpp knows as tokenizer.ggml.pre = "qwen2".
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    attention_dropout=0.0,
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` tokens with Qwen2's normalization and splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def batches(tokens: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches (size, CONTEXT + 1): each epoch visits all windows once, in a new order and phase."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        phase = int(torch.randint(CONTEXT, (1,), generator=generator))
        starts = torch.arange(phase, len(tokens) - CONTEXT - 1, CONTEXT)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chunk in starts.split(size):
            if len(chunk) == size:
                yield torch.stack([tokens[s : s + CONTEXT + 1] for s in chunk.tolist()])


def cross_entropy(model: Qwen2ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: Qwen2ForCausalLM, tokens: torch.Tensor, windows: int = 128) -> float:
    """exp of the mean next-token loss over non-overlapping windows of ``CONTEXT`` tokens."""
    rows = tokens[: (len(tokens) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)[:windows]
    return math.exp(sum(float(cross_entropy(model, row[None])) for row in rows) / len(rows))


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024), in float32.

    torch.optim.Muon iterates in bfloat16, which is 30 times slower than float32 on a CPU without bf16 units.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
        """(n, rows, columns) -> nearest semi-orthogonal matrices, singular values in about [0.7, 1.2]."""
        a, b, c = Muon.COEFFICIENTS
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), same in shapes.items():
                updates = []
                for parameter in same:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    gradient = parameter.grad
                    assert gradient is not None
                    momentum.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(momentum, group["momentum"]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(same, self.orthogonalize(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def optimizers(model: Qwen2ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embedding, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write ``model`` in bf16 safetensors, with its tokenizer."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(out: Path, total_tokens: int, batch_size: int, seed: int, muon_lr: float, adam_lr: float) -> None:
    """Train to ``total_tokens`` and write the model, the tokenizer and ``training.json`` under ``out``."""
    torch.manual_seed(seed)
    held_out = load_held_out(out / "splits.json")
    documents = list(training_documents([m for names in held_out.values() for m in names]))
    texts = [text for _, text in documents]
    tokenizer = train_tokenizer(texts)

    def encode(parts: list[str]) -> torch.Tensor:
        return torch.tensor([t for ids in tokenizer(parts)["input_ids"] for t in [*ids, tokenizer.eos_token_id]])

    tokens = encode(texts)
    splits = {name: encode(list(read_modules(held_out[name]).values())) for name in SPLITS}
    log.info(
        "%d files, %d training tokens, held out %s", len(texts), len(tokens), {k: len(v) for k, v in splits.items()}
    )
    model = Qwen2ForCausalLM(CONFIG)
    steps = total_tokens // (batch_size * CONTEXT)
    groups = optimizers(model, muon_lr, adam_lr)
    base = [[g["lr"] for g in o.param_groups] for o in groups]
    stream = batches(tokens, batch_size, seed)
    started = time.monotonic()
    for step in range(steps):
        scale = min(1.0, (step + 1) / 60) * min(1.0, 1.6 * (1 - step / steps))  # warm-up, hold, linear decay
        for optimizer, rates in zip(groups, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        loss = cross_entropy(model, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            elapsed = time.monotonic() - started
            log.info(
                "step %d/%d loss %.4f, %.0f tokens/s, %.0f s left",
                step,
                steps,
                float(loss),
                (step + 1) * batch_size * CONTEXT / elapsed,
                elapsed / (step + 1) * (steps - step - 1),
            )
        if step % 200 == 199:
            log.info("validation perplexity %.3f", perplexity(model, splits["validation"], 24))
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    record = {
        "text": "Python standard library sources",
        "python": platform.python_version(),
        "files": len(texts),
        "training_tokens": len(tokens),
        "tokens_seen": steps * batch_size * CONTEXT,
        "seed": seed,
        "seconds": round(time.monotonic() - started),
        "parameters": model.num_parameters(),
        "held_out_perplexity": {name: round(perplexity(model, part), 3) for name, part in splits.items()},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    log.info("%s", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "stdlib-6m")
    parser.add_argument("--tokens", type=int, default=6_600_000)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(args.out, args.tokens, args.batch_size, args.seed, args.muon_lr, args.adam_lr)


if __name__ == "__main__":
    main()
