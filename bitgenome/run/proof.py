"""The file and its proof: export the winner, read the file back, run it in llama.cpp."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitgenome.common import layout
from bitgenome.common.devices import best_device
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_text
from bitgenome.run.healing import Healing
from bitgenome.run.plan import Plan
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.divergence import Reference
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from evaluators.model.forward import final_hidden
from evaluators.prepare.bank import Bank
from exporters.files.gguf_reader import read_packed
from exporters.files.gguf_writer import export_gguf
from exporters.files.recipe import recipe_command, recipe_lines
from exporters.metadata.provenance import Provenance
from exporters.metadata.tensor_names import tensor_table
from exporters.runtime.comparison import log_probs, measure_file
from exporters.runtime.llamacpp import generation_speed
from quantizers.formats.packed import dequantize
from quantizers.formats.table import FORMATS, QuantFormat
from search.types import Evaluation


@dataclass(frozen=True)
class Proof:
    """What a file is worth on held-out text, as simulated from its own bytes and as llama.cpp runs it."""

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
        return asdict(self)


def gguf_path(plan: Plan, run: RunDirectory, winner: Evaluation) -> Path:
    bits = plan.space.bits_per_weight(winner.genome)
    return run.path / f"{plan.folder.name}-{bits:.2f}bpw.gguf"


def export_winner(
    plan: Plan, bank_directory: Path, run: RunDirectory, winner: Evaluation, healing: Healing | None = None
) -> Path:
    """Write GGUF, with the float32 tensors of ``healing``, and recipe.

    Raises UserError if the size is not the searched one: a changed tokenizer, say.
    """
    bank = Bank(bank_directory)
    formats = plan.space.formats_of(winner.genome)
    path = gguf_path(plan, run, winner)

    def packed(name: str) -> tuple[QuantFormat, np.ndarray]:
        return formats[name], bank.packed(name, formats[name]).numpy()

    healed = healing.figures["validation"].after if healing else None
    provenance = Provenance(
        genome=winner.genome,
        budget_bytes=plan.budget.file_bytes,
        kl=healed.kl if healed else winner.kl,
        model_digest=run.record["digests"]["model"],
        text_digest=run.record["digests"]["text"],
        run_digest=plan.config.digest,
        version=version("bitgenome"),
    )
    size = export_gguf(plan.folder, packed, path, provenance, healing.tensors if healing else None)
    if size != winner.file_bytes:
        raise UserError(
            f"expected {path} to have the {winner.file_bytes:,} bytes that were searched, found {size:,}: "
            f"has the tokenizer in {plan.folder.path} changed?"
        )
    names = {entry.hf_name: entry.gguf_name for entry in tensor_table(plan.folder)}
    by_gguf_name = {names[name]: fmt for name, fmt in formats.items()}
    atomic_write_text(run.path / layout.RECIPE, "\n".join(recipe_lines(by_gguf_name)) + "\n")
    atomic_write_text(run.path / layout.RECIPE_COMMAND, recipe_command(by_gguf_name) + "\n")
    return path


def shipped_weights(path: Path, folder: ModelFolder) -> dict[str, Tensor]:
    """float32 (rows, columns) of the file's quantized tensors, by Hugging Face name, in transformers' row order."""
    formats, weights = shipped_formats(path, folder), {}
    for name, (_, rows) in read_packed(path, folder).items():
        if name in formats:
            data = torch.from_numpy(np.ascontiguousarray(rows)).view(torch.uint8).reshape(len(rows), -1)
            weights[name] = dequantize(formats[name], data)
    return weights


def shipped_formats(path: Path, folder: ModelFolder) -> dict[str, QuantFormat]:
    """Formats of the file's quantized tensors, by Hugging Face name."""
    kinds = {name: kind for name, (kind, _) in read_packed(path, folder).items()}
    return {n: FORMATS[kind] for n, kind in kinds.items() if kind in FORMATS and len(folder.shapes[n]) == 2}


def shipped_floats(path: Path, folder: ModelFolder) -> dict[str, Tensor]:
    """The file's own float32 tensors (norms, biases) by Hugging Face name, in transformers' row order."""
    packed = read_packed(path, folder)
    return {
        entry.hf_name: torch.from_numpy(np.ascontiguousarray(packed[entry.hf_name][1]))
        .view(torch.float32)
        .reshape(entry.shape)
        for entry in tensor_table(folder)
        if not entry.quantizable
    }


def differing_floats(path: Path, folder: ModelFolder, healed: Mapping[str, Tensor]) -> list[str]:
    """Float32 tensors of the file that are neither the healed ones nor, where there is none, the model's own."""
    return [
        name
        for name, tensor in shipped_floats(path, folder).items()
        if not torch.equal(tensor, healed[name] if name in healed else folder.read(name).float())
    ]


def differing_tensors(path: Path, folder: ModelFolder, bank: Bank, formats: dict[str, QuantFormat]) -> list[str]:
    """Tensors of the file that do not decode to exactly the weights that were scored."""
    shipped = shipped_weights(path, folder)
    return [
        name
        for name, fmt in formats.items()
        if name not in shipped
        or not torch.equal(shipped[name], bank.weights(name, fmt, folder.shapes[name][1], torch.device("cpu")))
    ]


@torch.inference_mode()
def prove(path: Path, folder: ModelFolder, windows: np.ndarray, activations: str = "float") -> Proof:
    """Measure a GGUF file of ``folder``'s model on token windows (n, T), by simulation and by llama.cpp.

    With ``activations`` q8 the simulation is repeated with 8-bit inputs. Raises ValueError for a damaged file,
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
        eight_bit = log_probs(hidden, head)  # the runtime's head is in floats too, see measure_file
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
