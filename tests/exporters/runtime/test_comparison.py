"""Figures of the runtime against hand-made distributions, and of real files against the model they came from."""

import inspect
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.float_gguf import export_float
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_reader import read_gguf
from exporters.files.gguf_writer import export_gguf
from exporters.files.mixes import MixModel, mix_types
from exporters.metadata.tensor_names import quantizable_tensors, tensor_table
from exporters.runtime import comparison as verify
from exporters.runtime.comparison import LogProbs, compare, log_probs, measure_file, plain_head
from quantizers.formats.table import FORMATS
from tests import ggml_reference
from tests.exporters.conftest import random_windows, transformers_hidden
from tests.small_models import VOCABULARY

STORY = "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park. "


def constant(probabilities: list[float]) -> LogProbs:
    """A model that predicts the same at every position."""
    row = torch.tensor(probabilities).log()
    return lambda start, stop: row.expand(stop - start, -1)


def test_figures_of_constant_models_are_those_worked_out_by_hand() -> None:
    windows = np.array([[0, 1, 0], [1, 1, 0]])
    figures = compare(
        constant([0.5, 0.5]), windows, 2, reference=constant([0.75, 0.25]), simulated=constant([0.5, 0.5])
    )
    assert figures.positions == 6
    assert figures.perplexity == pytest.approx(2.0)
    assert figures.reference is not None
    assert figures.simulated is not None
    assert figures.reference.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert figures.reference.perplexity == pytest.approx(math.exp(-(2 * math.log(0.25) + 2 * math.log(0.75)) / 4))
    assert figures.simulated.kl == pytest.approx(0.0, abs=1e-9)
    assert figures.simulated.top1_agreement == 1.0


def test_what_the_runtime_predicts_is_quoted_and_simulations_are_held_against_it_before_the_heads_rounding() -> None:
    found = compare(
        constant([0.5, 0.5]),
        np.array([[0, 1, 0]]),
        2,
        reference=constant([0.75, 0.25]),
        simulated=constant([0.25, 0.75]),
        before_rounding=constant([0.25, 0.75]),
    )
    assert found.reference is not None and found.reference.figures is not None and found.simulated is not None
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.reference.kl == pytest.approx(kl) == pytest.approx(found.reference.figures.mean_kl.value)
    assert found.perplexity == pytest.approx(2.0) == pytest.approx(found.reference.figures.perplexity.value)
    assert found.simulated.kl == pytest.approx(0.0, abs=1e-9)


def test_top1_agreement_counts_positions() -> None:
    runtime = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.6, 0.4]]).log()
    reference = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.1, 0.9]]).log()
    figures = compare(
        lambda a, b: runtime[a:b], np.zeros((2, 2), dtype=np.int64), 2, reference=lambda a, b: reference[a:b]
    )
    assert figures.reference is not None
    assert figures.reference.top1_agreement == 0.5


def test_positions_that_do_not_count_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, 7, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    windows = rng.integers(0, 20, (3, 7))
    noisy = hidden + rng.normal(size=hidden.shape).astype(np.float32)
    short = [log_probs(states[:, 1:], plain_head(head)) for states in (hidden, noisy)]
    expected = compare(short[0], windows[:, 1:], 20, reference=short[1])
    noisy[:, 0] = -hidden[:, 0]
    all_of_it = [log_probs(states, plain_head(head)) for states in (hidden, noisy)]
    assert compare(all_of_it[0], windows, 20, reference=all_of_it[1], unscored=1) == expected


def test_figures_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(3, 7, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    windows = rng.integers(0, 20, (3, 7))
    noisy = log_probs(hidden + 0.1, plain_head(head))
    whole = compare(log_probs(hidden, plain_head(head)), windows, 20, reference=noisy)
    monkeypatch.setattr(verify, "CHUNK_BYTES", 4 * 20 * 2)
    pieces = compare(log_probs(hidden, plain_head(head)), windows, 20, reference=noisy)
    assert whole.reference is not None
    assert pieces.reference is not None
    assert pieces.perplexity == pytest.approx(whole.perplexity)
    assert pieces.reference.kl == pytest.approx(whole.reference.kl)


def test_logits_that_are_not_finite_are_an_error() -> None:
    broken = log_probs(np.full((1, 2, 4), np.nan, dtype=np.float32), plain_head(np.ones((3, 4))))
    with pytest.raises(FloatingPointError, match="not finite"):
        compare(broken, np.zeros((1, 2), dtype=np.int64), 3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_float_file_measures_as_the_model_itself(
    tied: bool, small_model: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    folder = small_model("llama", tie_word_embeddings=tied)
    export_float(folder, tmp_path / "f32.gguf")
    windows = random_windows(folder, 2, 30)
    head = folder.read("model.embed_tokens.weight" if tied else "lm_head.weight")
    reference = log_probs(transformers_hidden(folder, windows), plain_head(head))
    figures = measure_file(tmp_path / "f32.gguf", windows, reference, threads=1)
    assert figures.reference is not None
    assert head.shape[0] == VOCABULARY
    assert abs(figures.reference.kl) < 1e-6  # rounding of float32
    assert figures.reference.top1_agreement == 1.0
    assert figures.perplexity == pytest.approx(figures.reference.perplexity, rel=1e-5)


def test_a_trained_models_file_measures_as_its_dequantized_weights(stories: ModelFolder, tmp_path: Path) -> None:
    """Tolerance: llama.cpp quantizes activations to 8 bits, the simulation does not."""
    fmt = FORMATS["Q8_0"]
    names = quantizable_tensors(stories)
    legal = {name: fmt if fmt.fits(shape[-1]) else FORMATS["F16"] for name, shape in names.items()}
    packed = {n: (f, quantize(stories.read(n).numpy(), f.ggml_type).view(np.uint8)) for n, f in legal.items()}
    export_gguf(stories, packed.__getitem__, tmp_path / "q8.gguf")
    export_float(stories, tmp_path / "f32.gguf")
    windows = windows_of(stories, STORY, 1, 24)
    reference = log_probs(transformers_hidden(stories, windows), plain_head(stories.read("model.embed_tokens.weight")))
    figures = measure_file(tmp_path / "q8.gguf", windows, reference, threads=1)
    assert figures.reference is not None
    assert figures.perplexity < 10  # text like that it was trained on
    assert figures.perplexity == pytest.approx(figures.reference.perplexity, rel=0.005)
    assert figures.reference.kl < 1e-3
    assert figures.reference.top1_agreement > 0.97


def windows_of(folder: ModelFolder, text: str, n: int, length: int) -> np.ndarray:
    """The first tokens of ``text``, (n, length)."""
    ids = AutoTokenizer.from_pretrained(folder.path)(text).input_ids
    return np.array(ids[: n * length], dtype=np.int64).reshape(n, length)


@pytest.mark.parametrize("mix", ["Q2_K", "Q3_K_M", "Q4_K_M"])
def test_the_shipped_file_of_the_embedded_model_measures_as_its_simulation(
    mix: str, embedded: ModelFolder, tmp_path: Path
) -> None:
    """Tolerances: llama.cpp quantizes activations to 8 bits, the simulation does not."""
    entries = {entry.gguf_name: entry for entry in tensor_table(embedded) if entry.quantizable}
    config = embedded.config
    gqa = config["num_attention_heads"] // config["num_key_value_heads"]
    known = MixModel("qwen2", config["num_hidden_layers"], gqa)
    types = mix_types(mix, {n: e.shape for n, e in entries.items()}, known)
    formats = {name: FORMATS[kind.name] for name, kind in types.items()}
    packed = {
        entries[n].hf_name: (f, ggml_reference.quantize(f, embedded.read(entries[n].hf_name).float()))
        for n, f in formats.items()
    }
    export_gguf(embedded, lambda name: (packed[name][0], packed[name][1].numpy()), tmp_path / "mix.gguf")
    model = AutoModelForCausalLM.from_pretrained(embedded.path, dtype=torch.float32).eval()
    windows = windows_of(embedded, inspect.getsource(textwrap), 4, 256)
    with torch.no_grad():
        for name, (fmt, data) in packed.items():
            model.get_parameter(name).copy_(ggml_reference.dequantize(fmt, data))
        hidden = model.get_decoder()(torch.from_numpy(windows)).last_hidden_state
    simulated = log_probs(hidden, plain_head(model.get_output_embeddings().weight.detach()))
    figures = measure_file(tmp_path / "mix.gguf", windows, simulated=simulated, threads=1)
    assert figures.simulated is not None
    assert figures.simulated.kl < 1e-3
    assert figures.perplexity == pytest.approx(figures.simulated.perplexity, rel=0.005)


def test_the_head_is_the_files_own(small_model: Callable[..., ModelFolder], tmp_path: Path) -> None:
    folder = small_model("qwen3")
    export_float(folder, tmp_path / "f32.gguf")
    np.testing.assert_array_equal(
        read_gguf(tmp_path / "f32.gguf").head(), folder.read("model.embed_tokens.weight").numpy()
    )
