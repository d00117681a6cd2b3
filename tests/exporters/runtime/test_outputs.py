"""What a file predicts, from itself alone: its head as llama.cpp has it, windows and figures as llama-perplexity's."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.float_gguf import export_float
from evaluators.data.stdlib import read_modules
from evaluators.model.folder import ModelFolder
from exporters.files.gguf_writer import export_gguf
from exporters.runtime.figures import Figures
from exporters.runtime.llamacpp import LlamaCppRuntime
from exporters.runtime.outputs import figures_of, outputs_of, text_windows
from quantizers.formats.table import FORMATS
from quantizers.rounding.nearest import quantize
from tests.exporters.opening.test_opening import with_keys, write

TEXT = "\n".join(read_modules(["mailbox", "pdb"]).values())


@pytest.fixture(scope="module")
def pair(embedded: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The embedded model in F16, and in Q4_K."""
    folder, fmt = tmp_path_factory.mktemp("pair"), FORMATS["Q4_K"]
    base, file = folder / "base.gguf", folder / "file.gguf"
    export_float(embedded, base, "F16")
    export_gguf(embedded, lambda name: (fmt, quantize(fmt, embedded.read(name)).numpy()), file)
    return base, file


def windows_of(file: Path, window: int, tokens: int) -> np.ndarray:
    with LlamaCppRuntime(file, window, 1) as runtime:
        return text_windows(runtime, TEXT, window, tokens)[0]


def figures(file: Path, base: Path, windows: np.ndarray, **how: Any) -> Figures:
    with outputs_of(base, windows, 1) as expected, outputs_of(file, windows, 1) as found:
        return figures_of(found, expected, windows, **how)


def test_a_file_beside_itself_differs_in_nothing(pair: tuple[Path, Path]) -> None:
    windows = windows_of(pair[0], 64, 300)
    assert windows.shape == (4, 64)
    same = figures(pair[1], pair[1], windows, unscored=32, followed=True)
    assert (same.mean_kl.value, same.maximum_kl.value, same.rms_delta_p.value) == (0, 0, 0)
    assert (same.same_top.value, same.perplexity_ratio.value) == (1, 1)
    assert (same.windows, same.positions) == (4, 4 * 31), "as llama-perplexity: of the second half all but the last"


def test_a_files_head_is_what_llamacpp_makes_of_it_and_not_what_a_key_says(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """llama.cpp's graph of qwen2 reads neither key, and the figures must not either."""
    keys: Callable[..., None] = with_keys(qwen2__final_logit_softcapping=3.0, qwen2__logit_scale=0.25)
    told = write(tmp_path / "told.gguf", pair[0], keys)
    windows = windows_of(told, 64, 128)
    assert figures(told, pair[0], windows, unscored=0).maximum_kl.value == 0


def test_windows_begin_with_bos_where_the_model_wants_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with LlamaCppRuntime(pair[0], 16, 1) as runtime:
        ids = runtime.tokenize(TEXT, parse_special=False)
        windows, bos = text_windows(runtime, TEXT, 16, 40)
        with pytest.raises(ValueError, match="one window, 16 tokens, found 1"):
            text_windows(runtime, "a", 16, 40)
    assert not bos and windows.flatten().tolist() == ids[:32]
    wants = write(tmp_path / "bos.gguf", pair[0], with_keys(tokenizer__ggml__add_bos_token=True))
    with LlamaCppRuntime(wants, 16, 1) as runtime:
        windows, bos = text_windows(runtime, TEXT, 16, 40)
    assert bos and windows.tolist() == [[0, *ids[:15]], [0, *ids[16:31]]], "the first is put before, others replaced"


PRINTED = {  # llama-perplexity's names; shares of the figure, and nats or percent, that they may differ by
    "mean_kl": (r"Mean    KLD", 0.02, 2e-5),
    "median_kl": (r"Median  KLD", 0.05, 1.3e-4),
    "kl_90": (r"90.0%   KLD", 0.03, 1.3e-4),
    "kl_95": (r"95.0%   KLD", 0.03, 1.3e-4),
    "kl_99": (r"99.0%   KLD", 0.05, 1.3e-4),
    "kl_99_9": (r"99.9%   KLD", 0.15, 1.3e-4),
    "maximum_kl": (r"Maximum KLD", 0.15, 1.3e-4),
    "mean_delta_p": (r"Mean    Δp", 0.0, 0.05),
    "rms_delta_p": (r"RMS Δp    ", 0.03, 0.01),
    "same_top": (r"Same top p", 0.0, 0.7),
    "perplexity": (r"Mean PPL\(Q\)                   ", 1e-3, 0.0),
    "base_perplexity": (r"Mean PPL\(base\)                ", 1e-4, 0.0),
    "perplexity_ratio": (r"Mean PPL\(Q\)/PPL\(base\)         ", 1e-3, 0.0),
    "log_perplexity_ratio": (r"Mean ln\(PPL\(Q\)/PPL\(base\)\)     ", 0.0, 1e-3),
}
PERCENT = ("mean_delta_p", "rms_delta_p", "same_top")


def printed_by(command: list[str]) -> str:
    """What llama-perplexity prints; it may end before its logging thread has written all."""
    for _ in range(10):
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if "Same top p:" in said:
            return said
    raise AssertionError(f"expected llama-perplexity's statistics, found {said}")


@pytest.mark.long
@pytest.mark.skipif("LLAMA_CPP_BIN" not in os.environ, reason="needs llama-perplexity, in $LLAMA_CPP_BIN")
def test_figures_are_those_of_llama_perplexity(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """On the same files, text and positions, with the KV cache and attention that ours are measured with.

    It stores the base's log probabilities in 16 bits (steps of 2.4e-4 nats, 16 nats below the likeliest cut off), which
    moves the KL of a position by up to 1.2e-4 and the mean by far less; a build for another processor sums products in
    another order. Both let a position's KL cross a percentile.
    """
    text, stored = tmp_path / "text.txt", tmp_path / "base.kld"
    text.write_text(TEXT, encoding="utf-8")
    tool = [f"{os.environ['LLAMA_CPP_BIN']}/llama-perplexity", "--kl-divergence-base", str(stored), "-t", "1"]
    how = ["-c", "256", "-b", "256", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    subprocess.run([*tool, *how, "-m", pair[0], "-f", text, "--chunks", "16"], check=True, capture_output=True)
    said = printed_by([*tool, *how, "-m", str(pair[1]), "--kl-divergence"])
    found = figures(pair[1], pair[0], windows_of(pair[0], 256, 16 * 256), unscored=128, followed=True)
    for name, (printed, relative, absolute) in PRINTED.items():
        match = re.search(rf"^\s*{printed}\s*:\s*(-?[\d.]+)", said, re.MULTILINE)
        assert match, f"no {printed} in {said}"
        value = getattr(found, name).value * (100 if name in PERCENT else 1)
        assert value == pytest.approx(float(match[1]), rel=relative, abs=absolute), name
