"""Writes the GGUF file from the bank's bytes, and checks that it holds the bytes that were scored."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_text
from bitgenome.plan.plan import Plan
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.run.healing import Healing, shipped_healing
from bitgenome.run.prepare import quantized_plan
from bitgenome.storage.run_directory import RunDirectory
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank, damaged_tensors
from exporters.files.gguf_writer import export_gguf
from exporters.files.packed_file import PackedFile
from exporters.files.recipe import recipe_command, recipe_lines
from exporters.metadata.provenance import Provenance
from exporters.metadata.tensor_names import tensor_table
from quantizers.formats.table import QuantFormat
from search.types import Evaluation


def gguf_path(plan: Plan, run: RunDirectory, winner: Evaluation) -> Path:
    """Return the path of the run's GGUF file, which names the model and the bits per weight."""
    bits = plan.space.bits_per_weight(winner.genome)
    return run.path / f"{plan.folder.name}-{bits:.2f}bpw.gguf"


def export_winner(
    plan: Plan, bank_directory: Path, run: RunDirectory, winner: Evaluation, healing: Healing | None = None
) -> Path:
    """Write the GGUF file and the recipe of ``winner``, and return the file's path.

    The float32 tensors of ``healing`` replace the model's. Raises UserError if the file does not have the size that was
    searched, for example because the tokenizer has changed.
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


def export_checked(
    plan: Plan, bank_directory: Path, run: RunDirectory, winner: Evaluation, healing: Healing | None
) -> Path:
    """Write the file, read it back, and return its path.

    Raises UserError if it does not hold the bytes that were scored.
    """
    gguf = export_winner(plan, bank_directory, run, winner, healing)
    formats = plan.space.formats_of(winner.genome)
    different = differing_tensors(gguf, plan.folder, Bank(bank_directory), formats)
    different += differing_floats(gguf, plan.folder, healing.tensors if healing else {})
    if different:
        raise UserError(f"expected the file to hold the bytes that were scored, found {different[0]} to differ")
    return gguf


def export_again(location: Path | str) -> Path:
    """Write GGUF and recipe of a finished run from its record and bank, and return the file's path.

    ``location`` is the run's path or URL. Raises UserError if the run is not finished or its bank is damaged.
    """
    directory = RunDirectory.open(location)
    with directory.own():
        best = directory.path / layout.BEST
        if not best.is_file():
            raise UserError(
                f"expected a finished run with {layout.BEST}, found none in {location}: bitgenome resume {location}"
            )
        record = json.loads(best.read_text(encoding="utf-8"))
        winner, healing = Evaluation.from_json(record["winner"]), shipped_healing(directory.path, record)
        plan = plan_of_run(directory)
        directory.record.pin("model", plan.folder.digest)
        plan = quantized_plan(plan, directory)
        bank = directory.artefact("bank")
        if damaged := damaged_tensors(bank):
            raise UserError(
                f"expected a whole bank, found {damaged[0]} damaged: bitgenome resume {location} rebuilds it"
            )
        return export_winner(plan, bank, directory, winner, healing)


def differing_floats(path: Path, folder: ModelFolder, healed: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the file's float32 tensors that differ from the healed or, if not healed, the model's own.

    Raises ValueError as ``PackedFile`` does.
    """
    file = PackedFile(path, folder)
    return [
        name
        for name in file.float_names
        if file.type_name(name) != "F32"
        or not torch.equal(file.floats(name), healed[name] if name in healed else folder.read(name).float())
    ]


def differing_tensors(path: Path, folder: ModelFolder, bank: Bank, formats: Mapping[str, QuantFormat]) -> list[str]:
    """Return the names of tensors whose type or bytes in the file are not those in the bank, which were scored.

    Raises ValueError as ``PackedFile`` does.
    """
    file = PackedFile(path, folder)
    return [
        name
        for name, fmt in formats.items()
        if file.type_name(name) != fmt.name or not np.array_equal(file.packed(name), bank.packed(name, fmt).numpy())
    ]
