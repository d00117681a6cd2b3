"""Measures runs and GGUF files beside their original and llama.cpp's own mixes of the sizes around."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitgenome.common.errors import UserError
from bitgenome.compare.measure import Divergence, Written, beginnings, written_by
from bitgenome.compare.prompts import prompts_of
from bitgenome.compare.reference import full_precision
from bitgenome.compare.subjects import (
    Kind,
    Named,
    Subject,
    check_vocabularies,
    chosen_mixes,
    floats_among,
    mix_subjects,
    named_subjects,
    original_subject,
    working_folder,
)
from bitgenome.observe.progress import Track
from bitgenome.run.verify import CHARACTERS, held_out_text, refusals, windows_of
from exporters.opening.source import read_model
from exporters.runtime.figures import Figures
from exporters.runtime.outputs import Outputs, figures_of, outputs_of

WINDOW, TOKENS = 512, 8192  # of a text that is not a run's
FLOAT_BYTES = 4  # of a weight, at most, in an original that is written
MIX_BYTES = 3  # of a weight, in all mixes together


@dataclass(frozen=True)
class Wanted:
    """Says how files are compared."""

    prompts: Sequence[str] = ()
    prompts_file: Path | None = None  # a prompt a line
    max_tokens: int = 64  # of an answer
    skip_original: bool = False  # it is not run: the model's own figures are computed block by block
    original: Path | None = None  # of files without a run; by default the first of them in floats
    mixes: Sequence[str] = ()  # of llama.cpp; by default those around a run's size
    imatrix: Path | None = None  # for these, of files without a run
    text: Path | None = None  # of files without a run, by default held-out Python code
    keep: Path | None = None  # folder in which what is made stays


@dataclass(frozen=True)
class Measured:
    """Holds all that was measured of one file; figures are beside the original."""

    name: str
    kind: Kind
    file: Path
    file_bytes: int
    bits_per_weight: float
    written: Written
    figures: Figures | None  # None: there is no original, or this is it
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        found = asdict(self) | {"file": str(self.file)}
        written = found.pop("written")
        del written["greedy"]
        if self.divergence:
            found["divergence"] |= {"same": self.divergence.same, "median_first": self.divergence.median_first}
        return {**found, **written}


@dataclass(frozen=True)
class Compared:
    """Holds the files that were compared, on which text and prompts, in the order of their size, the original first."""

    files: tuple[Measured, ...]
    text: str
    windows: int
    window: int  # tokens
    prompts: tuple[str, ...]
    imatrix: Path | None  # with which llama.cpp's files were made

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        here = {"text": self.text, "windows": self.windows, "window": self.window, "prompts": list(self.prompts)}
        made = {"imatrix": None if self.imatrix is None else str(self.imatrix)}
        return {**here, **made, "files": [measured.to_json() for measured in self.files]}


def compare(named: Sequence[str], wanted: Wanted, storage: str, track: Track) -> Compared:
    """Measure the runs and GGUF files that are ``named``, beside their original and llama.cpp's own mixes.

    A run brings its model, test text and importance matrix. llama.cpp runs one file at a time, each in a process of its
    own. Raises UserError, before anything is made, for what cannot be compared.
    """
    prompts = prompts_of(wanted.prompts, wanted.prompts_file)
    with ExitStack() as stack:
        found = stack.enter_context(named_subjects(named, storage))
        check(found, wanted)
        windows, unscored, text = text_of(found, wanted)
        folder = stack.enter_context(working_folder(wanted.keep, space_needed(found, wanted)))
        original = _original(found, wanted, folder)
        imatrix = found.run.imatrix if found.run else wanted.imatrix
        subjects = [subject for subject in found.subjects if original is None or subject.path != original.path]
        if original is not None and (found.run or wanted.mixes):
            size = found.run.subject.file_bytes if found.run else subjects[0].file_bytes
            mixes = chosen_mixes(original.model, size, wanted.mixes)
            made = track(mix_subjects(mixes, imatrix, folder), len(mixes), "quantizing as llama.cpp does")
            subjects += list(made)
        else:
            imatrix = None
        subjects.sort(key=lambda subject: subject.file_bytes)
        run_original = original if not wanted.skip_original else None
        begun = beginnings(windows)
        expected = _expected(stack, found, run_original, windows)
        measured: list[Measured] = []
        every = [run_original, *subjects] if run_original else subjects
        for subject in track(every, len(every), "measuring"):
            with refusals(subject.path):
                written = written_by(subject, prompts, wanted.max_tokens, begun)
                figures, divergence = None, None
                if expected is not None and subject is not run_original:
                    with outputs_of(subject.path, windows) as outputs:
                        figures = figures_of(outputs, expected, windows, unscored)
                if run_original and subject is not run_original:
                    divergence = Divergence.of(written.greedy, measured[0].written.greedy)
            measured.append(
                Measured(
                    subject.name,
                    subject.kind,
                    subject.path,
                    subject.file_bytes,
                    subject.bits_per_weight,
                    written,
                    figures,
                    divergence,
                )
            )
        count, length = windows.shape
        return Compared(tuple(measured), text, count, length, tuple(prompts), imatrix)


def check(found: Named, wanted: Wanted) -> None:
    """Raise UserError for settings that do not go with what is named."""
    if found.run:
        given = {"--original": wanted.original, "--imatrix": wanted.imatrix, "--text": wanted.text}
        if named := [name for name, value in given.items() if value is not None]:
            raise UserError(f"expected {named[0]} with files alone, found the run {found.run.location} beside it")
    elif wanted.mixes and wanted.original is None and floats_among(found.subjects) is None:
        raise UserError("expected --original with --mix, a file in BF16, F16 or F32 to make it of, found none")
    if wanted.imatrix is not None and not wanted.imatrix.is_file():
        raise UserError(f"expected an importance matrix, found none at {wanted.imatrix}")
    if wanted.original is not None:
        model = read_model(wanted.original)
        if model.coarse:
            raise UserError(f"expected an original in BF16, F16 or F32 at {wanted.original}, found {model.coarse[0]}")
        check_vocabularies([model, *(subject.model for subject in found.subjects)])


def text_of(found: Named, wanted: Wanted) -> tuple[np.ndarray, int, str]:
    """Return the windows (n, T), how many positions of each do not count, and what the text is called."""
    if found.run:
        text = found.run.text
        return text.windows["test"], text.unscored, f"test text of {found.run.location}"
    content = held_out_text(wanted.text, CHARACTERS * TOKENS)
    first = found.subjects[0]
    window = min(WINDOW, first.model.hyperparameters().get("context_length", WINDOW))
    with refusals(first.path):
        windows, bos = windows_of(first.path, content, window, TOKENS)
    return windows, int(bos), str(wanted.text) if wanted.text else "held-out Python code"


def space_needed(found: Named, wanted: Wanted) -> int:
    """Return an upper bound on the bytes that are written on the way: an original, and llama.cpp's mixes."""
    if not (found.run or wanted.mixes):
        return 0
    weights = found.run.plan.space.weights if found.run else max(subject.file_bytes for subject in found.subjects) // 2
    return weights * (MIX_BYTES + (FLOAT_BYTES if found.run else 0))


def _original(found: Named, wanted: Wanted, folder: Path) -> Subject | None:
    if wanted.original is not None:
        return Subject(wanted.original.name, "original", read_model(wanted.original))
    return original_subject(found, folder)


def _expected(stack: ExitStack, found: Named, original: Subject | None, windows: np.ndarray) -> Outputs | None:
    """Return what is to be predicted: by the original in llama.cpp or, where it is not run, by a run's model itself."""
    if original is not None:
        with refusals(original.path):
            return stack.enter_context(outputs_of(original.path, windows))
    return full_precision(found.run.plan, windows) if found.run else None
