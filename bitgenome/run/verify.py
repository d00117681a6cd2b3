"""Checks that a run's file is the one that was shipped, and measures it."""

from contextlib import nullcontext
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from bitgenome.plan.plan import Plan
from bitgenome.run.export import differing_floats, differing_tensors
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.run.healing import shipped_healing
from bitgenome.run.prepare import quantized_plan
from bitgenome.run.proof import Proof, prove
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_result import RunResult
from evaluators.data.windows import saved_windows
from evaluators.prepare.bank import Bank
from exporters.files.gguf_reader import read_gguf
from exporters.runtime.llamacpp import LlamaCppError
from workers.storage.folders import is_url


def verify_file(file: Path | str | None, location: Path | str) -> Proof:
    """Measure a file with the model and test text of its run, which is at the path or URL ``location``.

    Without ``file`` it is the run's own; a file of that name must have the bytes that were shipped. A file behind a URL
    is read from its run's mirror. Raises UserError for a file or run that cannot be used.
    """
    directory = RunDirectory.open(location)
    with directory.own() if directory.mirror else nullcontext():
        windows = directory.path / layout.WINDOWS
        text = saved_windows(windows)
        if text is None:
            found = "a damaged file" if windows.is_file() else "none"
            raise UserError(
                f"expected the run's test text in {windows}, found {found}: bitgenome resume {location} reads it again"
            )
        result = RunResult.read(directory.path)
        if file is None and result is None:
            raise UserError(
                f"expected a finished run with {layout.BEST}, found none in {location}: bitgenome resume {location}"
            )
        name = result.gguf if file is None and result else str(file).rpartition("/")[2]
        local = directory.path / name if file is None or is_url(file) else Path(file)
        plan = plan_of_run(directory)
        directory.record.pin("model", plan.folder.digest)
        plan = quantized_plan(plan, directory)
        try:
            if result and local.name == result.gguf:
                check_shipped(local, result, plan, directory)
            how = plan.config.evaluation
            return prove(local, plan.folder, text, how.activations, how.memory, plan.file)
        except (ValueError, LlamaCppError) as error:
            raise UserError(str(error)) from None
        except FloatingPointError as error:
            raise UserError(f"expected finite outputs of {local}, found: {error}") from None


def check_shipped(file: Path, result: RunResult, plan: Plan, run: RunDirectory) -> None:
    """Raise UserError unless ``file`` has the size and the sha256 of the run's ``result``, within its budget.

    A run of an earlier version has recorded no sha256: then its tensors are compared with the bank's.
    """
    again = f"bitgenome export {run.location} writes it again"
    if not file.is_file():
        raise UserError(f"expected the file of the run at {file}, found none: {again}")
    size, shipped = file.stat().st_size, result.gguf_bytes or result.evaluation.file_bytes
    if size != shipped:
        raise UserError(f"expected the {shipped:,} bytes that were shipped in {file}, found {size:,}: {again}")
    if size > result.budget_bytes:
        raise UserError(f"expected at most the budget, {result.budget_bytes:,} bytes, found {size:,} in {file}")
    found = digest_of_file(file)
    if found == result.gguf_sha256:
        return
    read_gguf(file)  # raises ValueError for a damaged header
    formats, healing = plan.space.formats_of(result.evaluation.genome), shipped_healing(run.path, result.model_dump())
    different = differing_tensors(file, plan.folder, Bank(run.artefact("bank")), formats, plan.file)
    different += differing_floats(file, plan.folder, healing.tensors if healing else {}, plan.file)
    if different or result.gguf_sha256:
        where = f"tensor {different[0]}" if different else "bytes outside the tensors"
        raise UserError(f"expected {file} as it was shipped, found {where} to differ: {again}")
