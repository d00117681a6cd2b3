"""Writes the GGUF file from the bank's bytes, and checks that it holds the bytes that were scored."""

import json
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_json, atomic_write_text
from bitgenome.config.export import ExportConfig
from bitgenome.plan.plan import Plan
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.run.healing import Healing, shipped_bank, shipped_floats, shipped_healing
from bitgenome.run.prepare import quantized_plan
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_result import RunResult
from evaluators.model.folder import ModelFolder
from evaluators.prepare.bank import Bank, damaged_tensors
from exporters.files.file_layout import FileLayout
from exporters.files.gguf_writer import export_gguf, float_reader
from exporters.files.packed_file import PackedFile
from exporters.files.recipe import recipe_command, recipe_lines
from exporters.files.splits import Shards, split_gguf
from exporters.metadata.provenance import Provenance
from quantizers.formats.table import QuantFormat
from search.types import Evaluation

log = logging.getLogger(__name__)

MOST_NAME_BYTES = 240  # of a file's name; file systems take 255, and a temporary name is longer than the final one


def gguf_path(plan: Plan, run: RunDirectory, winner: Evaluation) -> Path:
    """Return the path of the run's GGUF file, which names the model, cut where it is long, and the bits per weight."""
    ending = f"-{plan.space.bits_per_weight(winner.genome):.2f}bpw.gguf"
    name = plan.folder.name.encode()[: MOST_NAME_BYTES - len(ending)].decode(errors="ignore")
    return run.path / f"{name}{ending}"


def export_winner(
    plan: Plan, bank_directory: Path, run: RunDirectory, winner: Evaluation, healing: Healing | None = None
) -> Path:
    """Write the GGUF file and the recipe of ``winner``, and return the file's path.

    The float32 tensors of ``healing`` replace the model's, and its block scales those of the bank. The file is written
    beside, read back, and replaces an earlier one only if it is right: raises UserError if it has not the size that was
    searched, for example because the tokenizer has changed, if it is over the budget, or if it does not hold the
    weights that were scored.
    """
    bank, floats = shipped_bank(bank_directory, healing), shipped_floats(healing)
    formats = plan.space.formats_of(winner.genome)
    path = gguf_path(plan, run, winner)

    def packed(name: str) -> tuple[QuantFormat, np.ndarray]:
        return formats[name], bank.packed(name, formats[name]).numpy()

    def check(written: Path) -> None:
        check_size(written.stat().st_size, path, plan, winner)
        different = differing_tensors(written, plan.folder, bank, formats, plan.file)
        different += differing_floats(written, plan.folder, floats, plan.file)
        if different:
            raise UserError(f"expected {path} to hold the weights that were scored, found {different[0]} to differ")

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
    export_gguf(plan.folder, packed, path, provenance, floats, layout=plan.file, check=check)
    by_gguf_name = {name: fmt for tensor, fmt in formats.items() for name in plan.file.names[tensor]}
    atomic_write_text(run.path / layout.RECIPE, "\n".join(recipe_lines(by_gguf_name, plan.file.kept)) + "\n")
    atomic_write_text(run.path / layout.RECIPE_COMMAND, recipe_command(by_gguf_name) + "\n")
    return path


def check_size(size: int, path: Path, plan: Plan, winner: Evaluation) -> None:
    """Raise UserError unless a written file of ``size`` bytes has the size that was searched, within the budget."""
    if size != winner.file_bytes:
        raise UserError(
            f"expected {path} to have the {winner.file_bytes:,} bytes that were searched, found {size:,}: "
            f"has the tokenizer or the chat template in {plan.folder.path} changed?"
        )
    if size > plan.budget.file_bytes:
        raise UserError(f"expected {path} within the budget of {plan.budget.file_bytes:,} bytes, found {size:,}")


def write_shards(path: Path, limits: Shards) -> list[Path]:
    """Write the file at ``path`` in shards, too, and return their paths."""
    shards = split_gguf(path, limits)
    log.info("wrote it in %d shards, too, of which %s is the first", len(shards), shards[0].name)
    return shards


def wanted_shards(settings: ExportConfig, asked: Shards | None = None) -> Shards | None:
    """Return the limits of the shards that were ``asked`` for, else those of the settings; None for no shards."""
    limits = asked if asked and asked.wanted else Shards(settings.split_max_size)
    return limits if limits.wanted else None


def export_again(location: Path | str, shards: Shards | None = None) -> Path:
    """Write GGUF and recipe of a finished run from its record and bank, and return the file's path.

    Limits in ``shards`` are taken instead of those of the run's settings. ``location`` is the run's path or URL.
    Raises UserError if the run is not finished, its bank is damaged, or the file is not right; an earlier file is then
    as it was.
    """
    directory = RunDirectory.open(location)
    with directory.own():
        result = RunResult.read(directory.path)
        if result is None:
            raise UserError(
                f"expected a finished run with {layout.BEST}, found none in {location}: bitgenome resume {location}"
            )
        winner, healing = result.evaluation, shipped_healing(directory.path, result.model_dump())
        plan = plan_of_run(directory)
        directory.record.pin("model", plan.folder.digest)
        plan = quantized_plan(plan, directory)
        bank = directory.artefact("bank")
        if damaged := damaged_tensors(bank):
            raise UserError(
                f"expected a whole bank, found {damaged[0]} damaged: bitgenome resume {location} rebuilds it"
            )
        path = export_winner(plan, bank, directory, winner, healing)
        record_file(directory.path, path)
        if limits := wanted_shards(plan.config.export, shards):
            write_shards(path, limits)
        return path


def record_file(run: Path, path: Path) -> None:
    """Write name, size and sha256 of the file at ``path`` into best.json of the run directory ``run``."""
    best = run / layout.BEST
    record = json.loads(best.read_text(encoding="utf-8")) | shipped_file(path)
    atomic_write_json(best, record)


def shipped_file(path: Path) -> dict[str, Any]:
    """Return name, size and sha256 of the file at ``path``, as best.json holds them."""
    return {"gguf": path.name, "gguf_bytes": path.stat().st_size, "gguf_sha256": digest_of_file(path)}


def differing_floats(
    path: Path, folder: ModelFolder, healed: Mapping[str, Tensor], file_layout: FileLayout | None = None
) -> list[str]:
    """Return the names of the file's float tensors that differ from the healed or, if not healed, the model's own.

    Those that are not made of the model's are compared with what ``file_layout`` stores. Raises ValueError as
    ``PackedFile`` does.
    """
    return PackedFile(path, folder, file_layout).differing_floats(float_reader(folder, healed))


def differing_tensors(
    path: Path,
    folder: ModelFolder,
    bank: Bank,
    formats: Mapping[str, QuantFormat],
    file_layout: FileLayout | None = None,
) -> list[str]:
    """Return the names of tensors whose type or bytes in the file are not those in the bank, which were scored.

    Raises ValueError as ``PackedFile`` does.
    """
    file = PackedFile(path, folder, file_layout)
    return [
        name
        for name, fmt in formats.items()
        if file.type_name(name) != fmt.name or not np.array_equal(file.packed(name), bank.packed(name, fmt).numpy())
    ]
