"""Measures files in llama.cpp: a run's, once it is known to be the one that was shipped, or one beside another."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from bitgenome.config.text import SourceConfig
from bitgenome.plan.plan import Plan
from bitgenome.run.export import differing_floats, differing_tensors
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.run.healing import shipped_bank, shipped_floats, shipped_healing
from bitgenome.run.prepare import quantized_plan
from bitgenome.run.proof import Proof, prove
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_result import RunResult
from evaluators.data.documents import decode_text
from evaluators.data.stdlib import load_held_out, read_modules
from evaluators.data.windows import saved_windows
from exporters.files.gguf_reader import read_gguf
from exporters.opening.source import GgufModel, read_model
from exporters.runtime.figures import Figures
from exporters.runtime.llamacpp import LlamaCppError, LlamaCppRuntime
from exporters.runtime.outputs import figures_of, head_name, outputs_of, text_windows
from workers.storage.folders import is_url

CHARACTERS = 64  # of a text that are read for each token that is wanted


@dataclass(frozen=True)
class Beside:
    """Holds the figures of a file beside those of another, its base, on the same text, both run by llama.cpp."""

    file: str
    file_bytes: int  # of all parts
    base: str
    base_bytes: int
    text: str
    window: int  # tokens
    figures: Figures


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
        with refusals(local):
            if result and local.name == result.gguf:
                check_shipped(local, result, plan, directory)
            how = plan.config.evaluation
            return prove(local, plan.folder, text, how.activations, how.memory, plan.file)


def verify_beside(
    base: Path, file: Path, text: Path | None, window: int, tokens: int, every_position: bool = False
) -> Beside:
    """Measure ``file`` beside ``base``, GGUF files of one vocabulary, on at most ``tokens`` tokens of a UTF-8 ``text``.

    Windows, their first token and the positions that count are those of llama-perplexity, of each window the second
    half; with ``every_position`` all count but BOS. Without a text it is held-out Python code. llama.cpp runs one file
    at a time. Raises UserError for files or a text that cannot be used.
    """
    models = [read_model(path) for path in (base, file)]
    for model in models:
        _check_fits(model, models[0], window)
    content = held_out_text(text, CHARACTERS * tokens)
    with refusals(base):
        windows, bos = windows_of(base, content, window, tokens)
    with refusals(file):
        if not np.array_equal(windows_of(file, content, window, tokens)[0], windows):
            raise UserError(f"expected the tokens of {base} from the tokenizer of {file}, found others")
    unscored = int(bos) if every_position else window // 2
    with (
        refusals(base),
        outputs_of(base, windows) as expected,
        refusals(file),
        outputs_of(file, windows) as found,
    ):
        figures = figures_of(found, expected, windows, unscored, followed=not every_position)
    sizes = [sum(part.path.stat().st_size for part in model.parts) for model in models]
    name = str(text) if text else "held-out Python code"
    return Beside(str(file), sizes[1], str(base), sizes[0], name, window, figures)


def _check_fits(model: GgufModel, base: GgufModel, window: int) -> None:
    """Raise UserError for a model of another vocabulary than ``base`` or a context shorter than ``window``."""
    rows, expected = (one.tensors[head_name(one.tensors)].shape[0] for one in (model, base))
    if rows != expected:
        raise UserError(
            f"expected a vocabulary of {expected:,} tokens in {model.path}, as in {base.path}, found {rows:,}"
        )
    if window > (longest := model.hyperparameters().get("context_length", window)):
        raise UserError(f"expected windows of at most the context of {model.path}, {longest:,}, found {window:,}")


def held_out_text(path: Path | None, characters: int) -> str:
    """Return as much of the text at ``path``, or of held-out modules of Python's library. Raises UserError."""
    if path is None:
        held_out = load_held_out(Path(__file__).parents[2] / SourceConfig(source="stdlib").splits)
        return "\n".join(read_modules(held_out["test"]).values())[:characters]
    if not path.is_file():
        raise UserError(f"expected a text, found none at {path}")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError:
        return decode_text(path.read_bytes(), path)  # which says what is wrong


def windows_of(file: Path, text: str, window: int, tokens: int) -> tuple[np.ndarray, bool]:
    """Return windows of ``text`` by the tokenizer of ``file``, as ``text_windows`` does."""
    with LlamaCppRuntime(file, window) as runtime:
        return text_windows(runtime, text, window, tokens)


@contextmanager
def refusals(file: Path) -> Iterator[None]:
    """Turn what is raised of a file that is damaged, that llama.cpp refuses, or that predicts NaN, into UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, LlamaCppError) as error:
        raise UserError(str(error)) from None
    except FloatingPointError as error:
        raise UserError(f"expected finite outputs of {file}, found: {error}") from None


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
    different = differing_tensors(file, plan.folder, shipped_bank(run.artefact("bank"), healing), formats, plan.file)
    different += differing_floats(file, plan.folder, shipped_floats(healing), plan.file)
    if different or result.gguf_sha256:
        where = f"tensor {different[0]}" if different else "bytes outside the tensors"
        raise UserError(f"expected {file} as it was shipped, found {where} to differ: {again}")
