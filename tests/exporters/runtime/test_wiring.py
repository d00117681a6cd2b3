"""llama.cpp, reading the exported float file, computes what transformers computes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.float_gguf import export_float
from evaluators.model.families import EXPORTABLE
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.metadata.architectures import UnsupportedArchitectureError
from exporters.runtime.llamacpp import LlamaCppRuntime
from exporters.runtime.text import generation_speed
from tests.exporters.conftest import random_windows, relative_error, transformers_hidden

WIRING_TOLERANCE = 1e-5  # float32 in another order of summation; measured 5e-7 to 3e-6
VARIANTS = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-untied-wide-heads": ("llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama-3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2-no-tokenizer": ("qwen2", {"tokenizer": False}),
}  # fmt: skip


def llamacpp_error(folder: ModelFolder, path: Path, length: int) -> float:
    """Relative error of llama.cpp's final hidden states on the float32 export of ``folder``."""
    export_float(folder, path, allow_missing_tokenizer=True)
    windows = random_windows(folder, 3, length)
    with LlamaCppRuntime(path, length, threads=1) as runtime:
        found = runtime.hidden_states(windows)
    return relative_error(found, transformers_hidden(folder, windows))


@pytest.mark.parametrize("model_type", EXPORTABLE)
def test_llamacpp_computes_the_hidden_states_of_transformers(
    model_type: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    assert llamacpp_error(small_model(model_type), tmp_path / "f32.gguf", 100) < WIRING_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_llamacpp_agrees_on_configuration_variants(
    variant: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    model_type, overrides = VARIANTS[variant]
    assert llamacpp_error(small_model(model_type, **overrides), tmp_path / "f32.gguf", 100) < WIRING_TOLERANCE


def test_llamacpp_agrees_on_a_trained_llama(stories: ModelFolder, tmp_path: Path) -> None:
    assert llamacpp_error(stories, tmp_path / "f32.gguf", 256) < WIRING_TOLERANCE


def test_llamacpp_agrees_on_the_embedded_model(embedded: ModelFolder, tmp_path: Path) -> None:
    assert llamacpp_error(embedded, tmp_path / "f32.gguf", 256) < WIRING_TOLERANCE


@pytest.mark.parametrize("model_type", EXPORTABLE)
def test_transformers_own_gguf_reader_finds_the_same_logits(
    model_type: str, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    head_dim = 128 if model_type == "qwen3" else 16  # that reader ignores key_length and takes Qwen3's default
    folder = small_model(model_type, head_dim=head_dim)
    export_float(folder, tmp_path / "f32.gguf")
    windows = torch.from_numpy(random_windows(folder, 2, 40))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)(windows).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="f32.gguf", dtype=torch.float32)
        torch.testing.assert_close(loaded(windows).logits, expected, rtol=0, atol=1e-5)


def test_half_precision_references_differ_by_their_rounding_only(
    small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("llama")
    export_float(folder, tmp_path / "half.gguf", "F16")
    windows = random_windows(folder, 2, 40)
    with LlamaCppRuntime(tmp_path / "half.gguf", 40, threads=1) as runtime:
        error = relative_error(runtime.hidden_states(windows), transformers_hidden(folder, windows))
    assert 1e-5 < error < 0.005


def test_hidden_states_do_not_depend_on_the_other_windows(
    small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("mistral")  # its tokenizer adds a first token: none may be added to ids
    export_float(folder, tmp_path / "f32.gguf")
    windows = random_windows(folder, 3, 33)
    with LlamaCppRuntime(tmp_path / "f32.gguf", 64, threads=1) as runtime:
        together = runtime.hidden_states(windows)
        alone = runtime.hidden_states(windows[2:, :20])
    assert together.shape == (3, 33, 64)
    np.testing.assert_allclose(alone[0], together[2, :20], rtol=0, atol=1e-4)


def test_windows_longer_than_the_context_are_refused(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("qwen2")
    export_float(folder, tmp_path / "f32.gguf")
    with LlamaCppRuntime(tmp_path / "f32.gguf", 16, threads=1) as runtime, pytest.raises(ValueError, match="T <= 16"):
        runtime.hidden_states(random_windows(folder, 1, 17))


def test_generation_speed_counts_the_tokens_it_timed(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    export_float(small_model("qwen2"), tmp_path / "f32.gguf")
    speed = generation_speed(tmp_path / "f32.gguf", prompt_tokens=32, new_tokens=8, threads=1)
    assert (speed.prompt_tokens, speed.generated_tokens) == (32, 8)
    assert speed.prompt > 0
    assert speed.generation > 0


def test_generation_without_a_tokenizer_is_refused_before_llamacpp_stops_the_process(
    small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    export_float(small_model("qwen2", tokenizer=False), tmp_path / "f32.gguf", allow_missing_tokenizer=True)
    with pytest.raises(ValueError, match="expected a GGUF file with a tokenizer"):
        generation_speed(tmp_path / "f32.gguf")


def test_a_sliding_window_is_recorded(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    export_float(small_model("mistral", sliding_window=8), tmp_path / "f32.gguf")
    assert read_gguf(tmp_path / "f32.gguf").key_values["llama.attention.sliding_window"] == 8


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "found 'dynamic'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ("qwen3", {"attention_bias": True}, "k_proj.bias .32,. has no place in a qwen3"),
        ("qwen2", {"head_dim": 32}, "expected heads of 16 = 64 / 4 for qwen2, found 32"),
    ],
)
def test_what_llamacpp_would_compute_differently_is_refused(
    model_type: str,
    overrides: dict[str, object],
    message: str,
    small_model: Callable[..., ModelFolder],
    tmp_path: Path,
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        export_float(small_model(model_type, **overrides), tmp_path / "f32.gguf")
    assert list(tmp_path.iterdir()) == []
