"""Measures a file on held-out text, by simulation and by llama.cpp."""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from bitgenome.common import layout
from bitgenome.common.devices import best_device
from bitgenome.common.errors import UserError
from bitgenome.plan.plan import make_plan
from bitgenome.run.export import differing_floats, shipped_floats, shipped_formats, shipped_weights
from bitgenome.run.healing import shipped_healing
from bitgenome.run.prepare import quantized_plan
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.divergence import Reference
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import final_hidden
from exporters.runtime.comparison import log_probs, measure_file
from exporters.runtime.llamacpp import LlamaCppError, generation_speed
from workers.storage.folders import is_url


@dataclass(frozen=True)
class Proof:
    """Holds the quality of a file on held-out text, as simulated from its own bytes and as llama.cpp runs it."""

    file: str
    file_bytes: int
    tokens: int
    full_perplexity: float
    simulated_kl: float  # nats per token, full precision to simulated
    simulated_perplexity: float
    runtime_kl: float  # full precision to llama.cpp
    runtime_perplexity: float
    simulated_to_runtime_kl: float
    top1_agreement: float  # of llama.cpp with the full-precision model
    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    eight_bit_kl: float | None = None  # simulated with llama.cpp's 8-bit inputs, where the run was configured so
    eight_bit_to_runtime_kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


@torch.inference_mode()
def prove(path: Path, folder: ModelFolder, windows: np.ndarray, activations: str = "float") -> Proof:
    """Measure a GGUF file of ``folder``'s model on token windows (n, T), by simulation and by llama.cpp.

    With ``activations`` q8 the simulation is repeated with 8-bit inputs. Raises ValueError for a damaged file, and
    LlamaCppError if llama.cpp cannot run it.
    """
    weights = shipped_weights(path, folder) | shipped_floats(path, folder)
    ids = torch.from_numpy(windows)
    model = BlockModel(folder, best_device())
    model.load_all()
    full_head = model.head
    full = final_hidden(model, ids)
    for name, weight in weights.items():
        model.weight(name).data = weight.to(model.device)
    simulated = final_hidden(model, ids)
    head = model.head
    reference = Reference(full, full_head, ids)
    eight_bit_kl = eight_bit = None
    if activations == "q8":
        inputs = EightBitInputs(model, shipped_formats(path, folder))
        hidden = final_hidden(model, ids)
        eight_bit_kl = reference.compare(inputs.head_input(hidden), head).kl
        eight_bit = log_probs(hidden, head)  # llama.cpp's head is in floats too, see measure_file
    runtime = measure_file(path, windows, log_probs(full, full_head), log_probs(simulated, head), eight_bit)
    measured, speed = reference.compare(simulated, head), generation_speed(path)
    assert runtime.reference is not None and runtime.simulated is not None
    return Proof(
        file=path.name,
        file_bytes=path.stat().st_size,
        tokens=windows.size,
        full_perplexity=runtime.reference.perplexity,
        simulated_kl=measured.kl,
        simulated_perplexity=measured.perplexity,
        runtime_kl=runtime.reference.kl,
        runtime_perplexity=runtime.perplexity,
        simulated_to_runtime_kl=runtime.simulated.kl,
        top1_agreement=runtime.reference.top1_agreement,
        prompt_tokens_per_second=speed.prompt,
        generated_tokens_per_second=speed.generation,
        eight_bit_kl=eight_bit_kl,
        eight_bit_to_runtime_kl=runtime.eight_bit.kl if runtime.eight_bit else None,
    )


def verify_file(file: Path | str, location: Path | str) -> Proof:
    """Measure a file with the model and test text of its run, which is at the path or URL ``location``.

    A file behind a URL is read from its run's mirror. Raises UserError for a file or run that cannot be used.
    """
    directory = RunDirectory.open(location)
    with directory.own() if directory.mirror else nullcontext():
        windows = directory.path / layout.WINDOWS
        if not windows.is_file():
            raise UserError(f"expected {layout.WINDOWS} with the test text in {location}, found none")
        plan = make_plan(directory.config)
        directory.record.pin("model", plan.folder.digest)
        folder = quantized_plan(plan, directory).folder
        local = directory.path / str(file).rpartition("/")[2] if is_url(file) else Path(file)
        try:
            check_floats(local, folder, directory.path)
            test = TokenWindows.load(windows).windows["test"]
            return prove(local, folder, test, plan.config.evaluation.activations)
        except (ValueError, LlamaCppError, SafetensorError) as error:
            raise UserError(str(error)) from None


def check_floats(file: Path, folder: ModelFolder, run: Path) -> None:
    """Raise UserError if ``file`` is the run's own but has other float32 tensors than the run has measured."""
    best = run / layout.BEST
    record = json.loads(best.read_text(encoding="utf-8")) if best.is_file() else {}
    if record.get("gguf") != file.name:
        return
    healing = shipped_healing(run, record)
    if different := differing_floats(file, folder, healing.tensors if healing else {}):
        raise UserError(
            f"expected the float32 tensors of {run} in {file}, found {different[0]} to differ: bitgenome export {run}"
        )
