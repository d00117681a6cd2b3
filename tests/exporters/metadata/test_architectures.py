"""Models that have no GGUF form are refused in one sentence; both spellings of a configuration are read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, OPTConfig, OPTForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from evaluators.model.folder import ModelFolder
from exporters.files.gguf_writer import fixed_bytes
from exporters.metadata.architectures import UnsupportedArchitectureError
from exporters.metadata.hyperparameters import attention_window
from exporters.metadata.rope import frequency_factors, rope_of
from exporters.metadata.tensor_names import quantizable_tensors, tensor_table

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_opt_is_refused_in_one_sentence(tmp_path: Path) -> None:
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    for use in (fixed_bytes, quantizable_tensors):
        with pytest.raises(UnsupportedArchitectureError, match="of type llama, mistral, qwen2, qwen3, found 'opt'"):
            use(ModelFolder(tmp_path))


class Source:
    """A model of which only names and shapes exist."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **config: object):
        self.path = Path("model")
        self.shapes = shapes
        self.config = {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 8, "max_position_embeddings": 64, **config,
        }  # fmt: skip

    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(self.shapes[name])


def test_buffers_that_the_configuration_determines_are_left_out() -> None:
    source = Source({"model.norm.weight": (16,), "model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})
    assert [entry.gguf_name for entry in tensor_table(source)] == ["output_norm.weight"]


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.extra.weight", "lm_head.bias", "model.norm.bias"])
def test_any_other_tensor_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=f"tensor {name} .* has no place"):
        tensor_table(Source({name: (16,)}))


def test_a_missing_size_is_named() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"integer hidden_size above 0 in .*, found None"):
        tensor_table(Source({}, hidden_size=None))


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "llama", "sliding_window": 8}, None),
        ({"model_type": "mistral", "sliding_window": 8}, 8),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 8}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, None),  # from block 28 on
        ({"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
    ],
)
def test_a_sliding_window_is_the_one_of_transformers(config: dict[str, object], window: int | None) -> None:
    assert attention_window(Source({}, **config)) == window
    built = CONFIG_MAPPING[str(config["model_type"])](**config, num_hidden_layers=1)
    sliding = config["model_type"] == "mistral" or "sliding_attention" in getattr(built, "layer_types", ())
    assert (getattr(built, "sliding_window", None) if sliding else None) == window


def test_old_and_new_spellings_of_rope_settings_are_the_same() -> None:
    old = rope_of({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = rope_of({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert old == new
    assert rope_of({}).theta == 10000.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "default, linear, yarn, llama3, found 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "'yarn' with mscale has no equivalent"),
        ({"partial_rotary_factor": 0.5}, "whole heads, found a factor of 0.5"),
        ({"rope_scaling": "yarn"}, "expected an object for rope_scaling in config.json, found 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "positive number as factor for rope scaling 'linear' .* found None"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "positive number as factor .* found 'two'"),
        ({"rope_scaling": {"type": ["linear"]}}, "expected rope scaling of type"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "number as .* for rope scaling 'llama3'",
        ),
        ({"rope_theta": -1.0}, "positive number as rope_theta"),
    ],
)
def test_rope_settings_that_are_wrong_or_have_no_equivalent_are_refused(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        rope_of(config)


def test_llama_3_frequency_factors_are_those_of_transformers() -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = frequency_factors(rope_of(config.to_dict()), 128)
    assert factors is not None
    unscaled = 1.0 / 500000.0 ** (np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(unscaled / factors, expected.numpy(), rtol=1e-5)
