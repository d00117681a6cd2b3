"""A trained mixture of experts is searched and shipped; the types of its stacked tensors are one gene each."""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

from evaluators.model.folder import ModelFolder
from exporters.metadata.tokenizer import tokenizer_metadata
from tests.bitgenome.conftest import call_here
from tests.conftest import EMBEDDED

MIXTURE = EMBEDDED.with_name("stdlib-moe-6m")
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
KINDS = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "ffn_gate_inp",
    **{f"self_attn.{kind}_proj.weight": f"attn_{kind}" for kind in "qkv"},
    **{f"self_attn.{kind}_norm.weight": f"attn_{kind}_norm" for kind in "qk"},
    "self_attn.o_proj.weight": "attn_output",
}


def template(path: Path) -> Path:
    """The file that llama.cpp's converter makes of the mixture, in its keys that matter."""
    folder = ModelFolder(MIXTURE)
    config, experts = folder.config, folder.config["num_local_experts"]
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    for key, (value, kind) in tokenizer_metadata(ModelFolder(EMBEDDED)).items():
        writer.add_key_value(key, value, kind)
    tensors = {gguf: folder.read(name).float().numpy() for name, gguf in ENDS.items()}
    for layer in range(config["num_hidden_layers"]):
        for name, kind in KINDS.items():
            tensors[f"blk.{layer}.{kind}.weight"] = folder.read(f"model.layers.{layer}.{name}").float().numpy()
        for kind in ("gate", "up", "down"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight" for e in range(experts)]
            tensors[f"blk.{layer}.ffn_{kind}_exps.weight"] = np.stack([folder.read(n).float().numpy() for n in names])
    for name, values in tensors.items():
        if values.ndim > 1 and "gate_inp" not in name:
            bf16 = GGMLQuantizationType.BF16
            writer.add_tensor(name, quantize(values, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_trained_mixture_is_searched_and_llama_cpp_computes_what_was_searched(tmp_path: Path) -> None:
    settings = {
        "name": "mixture",
        "model": str(MIXTURE),
        "template": str(template(tmp_path / "template.gguf")),
        "storage_path": str(tmp_path / "runs"),
        "budget": {"bits_per_weight": 4.0},
        "levels": ["W2", "W4", "W6"],
        "text": {
            "splits": str(EMBEDDED / "splits.json"),
            "window": 128,
            "tokens": {"calibration": 2048, "sensitivity": 128, "search": 256, "validation": 256, "test": 1024},
        },
        "quantization": {"refinement_rounds": 0},  # how good the bytes are is shown elsewhere
        "search": {"population": 4, "generations": 1, "elites": 2, "brood": 4, "validation_candidates": 2},
        "healing": {"steps": 2, "batch_tokens": 256},
        "workers": {"ray": "off"},
    }
    configuration = tmp_path / "run.yaml"
    configuration.write_text(json.dumps(settings), encoding="utf-8")
    done = call_here("run", configuration)
    assert done.returncode == 0, done.stderr
    assert "3 of 8 experts read fewer than 64 positions of the calibration text, the least 0" in done.stderr
    best = json.loads((tmp_path / "runs/mixture/best.json").read_text(encoding="utf-8"))
    assert best["proof"]["simulated_to_runtime_kl"] < 1e-3
    assert best["proof"]["figures"]["mean_kl"]["value"] < 0.02
    (file,) = (tmp_path / "runs/mixture").glob("*bpw.gguf")
    assert file.stat().st_size <= best["budget_bytes"]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert len({types[f"blk.{layer}.ffn_{kind}_exps.weight"] for layer in range(3) for kind in ("up", "down")}) > 1
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "runs/mixture/imatrix.gguf").tensors}
    chosen = stored["blk.0.ffn_up_exps.weight.counts"].ravel()
    assert len(chosen) == 8 and 2 * 2048 <= chosen.sum() < 2 * 2048 + 8  # two experts a position, at least 1 written
    assert stored["blk.0.attn_q.weight.counts"].ravel().tolist() == [2048]
    assert len(best["winner"]["genome"]) == 1 + 3 * 7  # a gene ties the experts of a layer and kind
