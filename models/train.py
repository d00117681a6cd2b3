"""Train the embedded models on the standard library's sources: a small Qwen2, and a small mixture of experts.

Run ``python -m models.train``, about an hour on two cores, then ``python -m models.train --experts``, which takes the
first one's tokenizer, held-out modules and embedding. The modules named in ``splits.json`` are never read for training,
so that calibration, search, validation and test text is unseen.
"""

import argparse
import copy
import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attention_dropout": 0.0,
}
CONFIG = Qwen2Config(num_hidden_layers=6, **SHARED)
EXPERTS = Qwen3MoeConfig(
    moe_intermediate_size=256,
    num_hidden_layers=3,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,  # as llama.cpp does
    **SHARED,
)
BALANCE = 0.01  # weight of the loss that spreads tokens over experts (Fedus et al. 2021, equation 4)
DENSE_TOKENS, EXPERT_TOKENS = 6_600_000, 1_200_000
DENSE = Path(__file__).parent / "stdlib-6m"


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


def cross_entropy(model: PreTrainedModel, batch: torch.Tensor, balance: float = 0.0) -> torch.Tensor:
    """Mean next-token loss, plus ``balance`` times the loss of routers."""
    output = model(input_ids=batch[:, :-1], **({"output_router_logits": True} if balance else {}))
    loss = F.cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss + balance * output.aux_loss if balance else loss


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, windows: int = 128) -> float:
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
            for shape, same in shapes.items():
                rows, columns = shape[-2:]  # of each expert, where a parameter stacks them
                updates = []
                for parameter in same:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    gradient = parameter.grad
                    assert gradient is not None
                    momentum.lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(momentum, group["momentum"]))
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                together = self.orthogonalize(torch.stack(updates).flatten(0, -3)).reshape(len(updates), *shape)
                for parameter, update in zip(same, together, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def optimizers(model: PreTrainedModel, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for embedding, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    return [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(model: PreTrainedModel, out: Path) -> None:
    """Write ``model`` in bf16 safetensors."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)


def experts_model() -> PreTrainedModel:
    """A mixture of experts with random weights and the dense model's embedding."""
    model = Qwen3MoeForCausalLM(EXPERTS)
    model.set_experts_implementation("grouped_mm")  # a sixth of the time of one expert after the other
    dense = Qwen2ForCausalLM.from_pretrained(DENSE, dtype=torch.float32)
    model.get_input_embeddings().weight.data.copy_(dense.get_input_embeddings().weight)
    return model


def train(
    out: Path, experts: bool, total_tokens: int, batch_size: int, seed: int, muon_lr: float, adam_lr: float
) -> None:
    """Train to ``total_tokens`` and write the model, the tokenizer and ``training.json`` under ``out``."""
    torch.manual_seed(seed)
    if experts:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("splits.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DENSE / name, out / name)
    held_out = load_held_out(out / "splits.json")
    documents = list(training_documents([m for names in held_out.values() for m in names]))
    texts = [text for _, text in documents]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DENSE) if experts else train_tokenizer(texts)
    if not experts:
        tokenizer.save_pretrained(out)

    def encode(parts: list[str]) -> torch.Tensor:
        return torch.tensor([t for ids in tokenizer(parts)["input_ids"] for t in [*ids, tokenizer.eos_token_id]])

    tokens = encode(texts)
    splits = {name: encode(list(read_modules(held_out[name]).values())) for name in SPLITS}
    log.info(
        "%d files, %d training tokens, held out %s", len(texts), len(tokens), {k: len(v) for k, v in splits.items()}
    )
    model = experts_model() if experts else Qwen2ForCausalLM(CONFIG)
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
        loss = cross_entropy(model, next(stream), BALANCE if experts else 0.0)
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
            save(model, out)
    save(model, out)
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
    parser.add_argument("--experts", action="store_true", help="the mixture of experts")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = args.out or (DENSE.with_name("stdlib-moe-6m") if args.experts else DENSE)
    tokens = args.tokens or (EXPERT_TOKENS if args.experts else DENSE_TOKENS)
    train(out, args.experts, tokens, args.batch_size, args.seed, args.muon_lr, args.adam_lr)


if __name__ == "__main__":
    main()
