"""What a run takes for models of 8B to 70B: time, memory and disk of every stage, from rates measured at their shapes.

    python -m benchmarks.big_models --measure rates.json     # on the machine in question: probes, no weights
    python -m benchmarks.big_models --rates rates.json --memory "24 GB" --device cuda

Model folders are made on the spot: real shapes, sparse files, no weights.
"""

import argparse
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from bitgenome.config.run import RunConfig, parse_config
from bitgenome.plan.forecast import StageForecast, duration, forecast, rates_task
from bitgenome.plan.plan import Plan, make_plan
from evaluators.model.sizes import StageMemory
from evaluators.probes.rates import Rates
from search.budget import parse_size
from workers.pool.base import SerialPool

EMBEDDED = Path(__file__).parents[1] / "models" / "stdlib-6m"
BFLOAT16_BYTES = 2
SHARD_WEIGHTS = 2 << 30  # of a file, as published models have them


class Shape(NamedTuple):
    """Widths of a model without biases, with an untied head."""

    type: str
    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_width: int = 128


MODELS = {
    "Llama-3.1-8B": Shape("llama", 4096, 14336, 32, 32, 8, 128256),
    "Qwen3-32B": Shape("qwen3", 5120, 25600, 64, 64, 8, 151936),
    "Llama-3.1-70B": Shape("llama", 8192, 28672, 80, 64, 8, 128256),
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def tensors(m: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a model's tensors."""
    yield "model.embed_tokens.weight", (m.vocabulary, m.hidden)
    yield "model.norm.weight", (m.hidden,)
    yield "lm_head.weight", (m.vocabulary, m.hidden)
    q, kv = m.heads * m.head_width, m.kv_heads * m.head_width
    for block in range(m.blocks):
        prefix = f"model.layers.{block}."
        yield prefix + "self_attn.q_proj.weight", (q, m.hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, m.hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, m.hidden)
        yield prefix + "self_attn.o_proj.weight", (m.hidden, q)
        yield prefix + "mlp.gate_proj.weight", (m.ffn, m.hidden)
        yield prefix + "mlp.up_proj.weight", (m.ffn, m.hidden)
        yield prefix + "mlp.down_proj.weight", (m.hidden, m.ffn)
        yield prefix + "input_layernorm.weight", (m.hidden,)
        yield prefix + "post_attention_layernorm.weight", (m.hidden,)
        if m.type == "qwen3":
            yield prefix + "self_attn.q_norm.weight", (m.head_width,)
            yield prefix + "self_attn.k_norm.weight", (m.head_width,)


def write_folder(m: Shape, folder: Path) -> None:
    """Write a model folder of shape ``m`` with holes for weights, and the embedded model's tokenizer."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    config = {
        "architectures": [CLASSES[m.type]], "model_type": m.type, "hidden_size": m.hidden, "intermediate_size": m.ffn,
        "num_hidden_layers": m.blocks, "num_attention_heads": m.heads, "num_key_value_heads": m.kv_heads,
        "head_dim": m.head_width, "vocab_size": m.vocabulary, "tie_word_embeddings": False, "hidden_act": "silu",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors(m):
        if sum(map(prod, shards[-1].values())) + prod(shape) > SHARD_WEIGHTS:
            shards.append({})
        shards[-1][name] = shape
    files = {f"model-{index:05d}.safetensors": shard for index, shard in enumerate(shards, start=1)}
    for file, shard in files.items():
        write_shard(shard, folder / file)
    where = {name: file for file, shard in files.items() for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_shard(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Write a safetensors file of tensors in bfloat16 whose bytes are holes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + BFLOAT16_BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def configured(name: str, folder: Path, memory: str | None) -> RunConfig:
    """Default settings at 4.5 bits, gradient sensitivities, one worker that may take ``memory``."""
    settings = {
        "name": name, "model": str(folder), "budget": {"bits_per_weight": 4.5}, "storage_path": str(folder.parent),
        "sensitivity": {"measure": "gradient"}, "workers": {"ray": "off"},
        "evaluation": {"memory": memory} if memory else {},
        "text": {"source": "stdlib", "splits": str(EMBEDDED / "splits.json")},
    }  # fmt: skip
    return parse_config(settings, name)


def show(name: str, plan: Plan, stages: list[StageForecast], console: Console) -> None:
    """Print one model's stages as a Markdown table."""
    console.print(f"\n{name}, a file of {plan.budget.file_bytes / 1e9:.1f} GB\n", soft_wrap=True)
    console.print("| stage | time | device | host | stays on disk |\n|---|--:|--:|--:|--:|", soft_wrap=True)
    for stage in stages:
        memory = stage.memory or StageMemory()
        sizes = (memory.device_bytes, memory.host_bytes, stage.disk)
        cells = (stage.stage, duration(stage.seconds), *(f"{size / 1e9:.1f} GB" if size else "" for size in sizes))
        console.print("| " + " | ".join(cells) + " |", soft_wrap=True)
    total = duration(sum(stage.seconds for stage in stages))
    console.print(f"| together | {total} | | | {sum(stage.disk for stage in stages) / 1e9:.0f} GB |", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--memory", help='of the device, such as "24 GB"; by default this machine\'s')
    parser.add_argument("--device", help="its type, where this machine has none: cuda")
    args = parser.parse_args()
    console = Console()
    known: dict[str, dict[str, object]] = json.loads(args.rates.read_text()) if args.rates else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.model or MODELS:
            folder = Path(scratch) / name
            write_folder(MODELS[name], folder)
            plan = make_plan(configured(name, folder, args.memory))
            if args.measure:
                (rates,) = SerialPool().map([rates_task(plan)])
                known[name] = rates.to_json()
                args.measure.write_text(json.dumps(known, indent=1) + "\n")
            device = torch.device(args.device) if args.device else None
            limit = parse_size(args.memory) if args.memory else None
            show(name, plan, forecast(plan, Rates.from_json(known[name]), 1, device, limit), console)


if __name__ == "__main__":
    main()
