"""Builds the bank of a run from Hessians that are kept; see ``streamed_bank`` for those that are not."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from bitgenome.common import layout
from bitgenome.observe.progress import Track
from bitgenome.plan.imatrix import imatrix_digest, imatrix_importance
from bitgenome.plan.plan import Plan, compensation_settings
from bitgenome.run.calibration import group_names
from bitgenome.storage.shared import build_once, shared_directory
from evaluators.prepare import bank as banks
from evaluators.prepare.input_group import group_file
from evaluators.prepare.output_factor import factor_file, tensor_of
from evaluators.prepare.row_hessians import summed_tensor
from workers.pool.base import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BankBuild:
    """Says what of a bank is missing, and which tasks make it."""

    plan: Plan
    calibration: str  # name of the calibration's directory, by which banks of other Hessians are told apart
    device: str = "cpu"  # kind of the workers' devices, on which the last bits depend
    outputs: Path | None = None  # directory of the output factors, if rounding looks at the loss

    @cached_property
    def formats(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the candidate formats by tensor."""
        genes = self.plan.space.genes
        return {tensor: tuple(f.name for f in gene.formats) for gene in genes for tensor in gene.tensors}

    @cached_property
    def directory(self) -> Path:
        """Shared directory of the bank."""
        plan = self.plan
        formats = {tensor: gene.formats for gene in plan.space.genes for tensor in gene.tensors}
        how = compensation_settings(plan), plan.sparsity, plan.config.quantization.importance
        imatrix = imatrix_digest(plan.config.quantization)
        outputs = self.outputs.name if self.outputs else None
        digest = banks.bank_digest(plan.folder.digest, self.calibration, formats, *how, self.device, imatrix, outputs)
        return shared_directory(plan.config, layout.BANK_KIND, digest)

    def missing(self) -> set[str]:
        """Return the tensors whose files are missing or incomplete."""
        return {tensor for tensor in self.formats if not banks.readable(self.directory, tensor, self.formats[tensor])}

    def done(self) -> bool:
        """Return whether the bank is complete and undamaged."""
        whole = (self.directory / layout.MANIFEST).is_file() and not banks.damaged_tensors(self.directory)
        return whole and not self.missing()

    def remove_damaged(self) -> None:
        """Remove the files of tensors that differ from the manifest, with a warning each."""
        for tensor in banks.damaged_tensors(self.directory):
            log.warning("rebuilding %s: its bank file is missing or damaged", tensor)
            banks.tensor_file(self.directory, tensor).unlink(missing_ok=True)

    def tasks(self, groups: Iterable[Path]) -> list[banks.BuildBankGroup]:
        """Return the tasks that make what is missing of the tensors of ``groups``, files of input groups.

        The largest come first, so that none runs alone at the end.
        """
        absent, plan, names = self.missing(), self.plan, dict(self.formats)
        settings, how = compensation_settings(plan), plan.config.quantization.importance
        given = imatrix_importance(plan.config.quantization, plan.file, names)
        tasks = []
        for file in groups:
            tensors = names.keys() & banks.group_tensors(file)
            if absent & tensors:
                work = sum(prod(plan.folder.shapes[tensor]) for tensor in tensors)
                where = (plan.folder.path, file, self.directory)
                squares = [given[tensor] for tensor in sorted(tensors & given.keys())]
                mean = np.mean(squares, axis=0) if squares else None
                factors = tuple(self.factors[tensor] for tensor in sorted(tensors & self.factors.keys()))
                sums = tuple(file for file in self.sums if summed_tensor(tensor_of(file)) in tensors)
                task = banks.BuildBankGroup(*where, names, settings, plan.sparsity, how, work, mean, factors, sums)
                tasks.append(task)
        return sorted(tasks, key=lambda task: -task.work)

    @cached_property
    def measured(self) -> list[str]:
        """Names of what the loss says: of tensors with output factors, and of sums for rows."""
        return group_names(self.outputs / layout.GROUPS) if self.outputs else []

    @cached_property
    def factors(self) -> Mapping[str, Path]:
        """Files of the output factors by tensor: of all that are rounded on both sides."""
        return {n: factor_file(self.outputs, n) for n in self.measured if self.outputs and summed_tensor(n) is None}

    @cached_property
    def sums(self) -> list[Path]:
        """Files of the sums for rows, one for each use of a tensor."""
        return [factor_file(self.outputs, n) for n in self.measured if self.outputs and summed_tensor(n) is not None]

    def finish(self) -> None:
        """Write the manifest of a complete bank."""
        banks.write_manifest(self.directory, list(self.formats))


def build_bank(
    plan: Plan,
    calibration: Path,
    groups: list[str],
    pool: Pool,
    track: Track,
    device: str = "cpu",
    outputs: Path | None = None,
) -> Path:
    """Build the missing or damaged tensors of the bank, and return its directory.

    ``calibration`` is the directory of the input groups named ``groups``, ``device`` the kind of the workers', and
    ``outputs`` the directory of the output factors if rounding looks at the loss.
    """
    bank = BankBuild(plan, calibration.name, device, outputs)

    def build() -> None:
        bank.remove_damaged()
        tasks = bank.tasks(group_file(calibration, group) for group in groups)
        for _ in track(pool.map(tasks), len(tasks), "building the bank"):
            pass
        bank.finish()

    build_once(plan.config, bank.directory, "the bank", bank.done, build)
    return bank.directory
