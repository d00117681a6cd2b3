"""What is compared: runs and GGUF files of one model, its original, and llama.cpp's own mixes of the sizes around."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.plan.plan import Plan
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_names import run_location
from bitgenome.storage.run_result import RunResult
from evaluators.data.windows import TokenWindows, saved_windows
from exporters.files.imatrix import read_imatrix
from exporters.files.mixes import mix_name
from exporters.opening.source import GgufModel, read_model
from exporters.runtime.mix_file import MixFile, mixes_by_size
from exporters.runtime.original import original_of

Kind = Literal["original", "llama.cpp", "ours", "file"]
TOKENS = "tokenizer.ggml.tokens"
ENDING = ".gguf"


@dataclass(frozen=True)
class Subject:
    """A file to be measured; ``name`` is what it is called in tables."""

    name: str
    kind: Kind
    model: GgufModel

    @property
    def path(self) -> Path:
        """The file, or its first part."""
        return self.model.path

    @property
    def file_bytes(self) -> int:
        """Bytes of the file, or of all its parts."""
        return sum(part.path.stat().st_size for part in self.model.parts)

    @property
    def bits_per_weight(self) -> float:
        """The bits of the file over the weights in it."""
        return 8 * self.file_bytes / sum(prod(tensor.shape) for tensor in self.model.tensors.values())


@dataclass(frozen=True)
class FinishedRun:
    """A run whose file is compared, with what measuring needs of it."""

    location: str
    plan: Plan
    subject: Subject
    text: TokenWindows
    imatrix: Path


@dataclass
class Named:
    """Holds what a command names, in its order."""

    subjects: list[Subject] = field(default_factory=list)
    runs: list[FinishedRun] = field(default_factory=list)

    @property
    def run(self) -> FinishedRun | None:
        """The first run, whose model, text and importance matrix are used."""
        return self.runs[0] if self.runs else None


@contextmanager
def named_subjects(named: Sequence[str], storage: str) -> Iterator[Named]:
    """Yield the runs and GGUF files that are ``named``, runs by directory, URL or name below ``storage``.

    Raises UserError for what is no GGUF file of a model, a run that is not finished, whose file or text is missing or
    whose model is another, and files of different vocabularies.
    """
    found = Named()
    with ExitStack() as stack:
        for one in named:
            path = Path(one).expanduser()
            if path.is_file() or one.endswith(ENDING):
                found.subjects.append(Subject(path.name, "file", read_model(path)))
                continue
            found.runs.append(stack.enter_context(_finished(run_location(one, storage))))
            found.subjects.append(found.runs[-1].subject)
        if len(found.runs) == 1:
            place = found.subjects.index(found.runs[0].subject)
            found.subjects[place] = replace(found.runs[0].subject, name="ours")
        first = found.runs[0].plan.folder if found.runs else None
        for run in found.runs:
            if first is not None and run.plan.folder.digest != first.digest:
                raise UserError(
                    f"expected runs of one model, found {first.path} in {found.runs[0].location} and "
                    f"{run.plan.folder.path} in {run.location}"
                )
        check_vocabularies([subject.model for subject in found.subjects])
        yield found


@contextmanager
def _finished(location: str) -> Iterator[FinishedRun]:
    directory = RunDirectory.open(location)
    with ExitStack() as stack:
        if directory.mirror:
            stack.enter_context(directory.own())
        result = RunResult.read(directory.path)
        resume = f"bitgenome resume {location}"
        if result is None:
            raise UserError(f"expected a finished run with {layout.BEST}, found none in {location}: {resume}")
        file, windows = directory.path / result.gguf, directory.path / layout.WINDOWS
        if not file.is_file():
            raise UserError(f"expected {file}, found none: bitgenome export {location} writes it again")
        if (text := saved_windows(windows)) is None:
            raise UserError(f"expected the run's test text in {windows}, found none: {resume} reads it again")
        plan, subject = plan_of_run(directory), Subject(Path(location).name, "ours", read_model(file))
        yield FinishedRun(location, plan, subject, text, directory.path / layout.IMATRIX)


def check_vocabularies(models: Sequence[GgufModel]) -> None:
    """Raise UserError unless all files have the first one's tokens."""
    first = models[0]
    for model in models[1:]:
        ours, theirs = first.key_values.get(TOKENS), model.key_values.get(TOKENS)
        if ours != theirs:
            counts = f"{len(theirs or ())} tokens, of which the first {len(ours or ())} differ"
            if len(theirs or ()) != len(ours or ()):
                counts = f"{len(theirs or ()):,} tokens"
            raise UserError(
                f"expected the vocabulary of {first.path}, {len(ours or ()):,} tokens, in {model.path}, found {counts}"
            )


def floats_among(subjects: Sequence[Subject]) -> Subject | None:
    """Return the first file in floats, which the others are then made of."""
    return next((subject for subject in subjects if not subject.model.coarse), None)


@contextmanager
def working_folder(keep: Path | None, needed: int) -> Iterator[Path]:
    """Yield a folder for files made on the way: ``keep``, in which they stay, or one that is removed.

    Raises UserError where less than ``needed`` bytes are free.
    """
    with ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="bitgenome-compare-")))
        else:
            folder = keep
            folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise UserError(
                f"expected {needed / 1e9:,.1f} GB free in {folder} for the original and llama.cpp's files, found "
                f"{free / 1e9:,.1f} GB: --keep DIR names another folder"
            )
        yield folder


def original_subject(named: Named, folder: Path) -> Subject | None:
    """Return the model in floats: that of the run, written into ``folder``, or a named file; None if there is none."""
    if named.run:
        plan = named.run.plan
        model = original_of(plan.folder, plan.file, folder / f"{plan.folder.name[:80]}-original.gguf")
        return Subject("original", "original", model)
    if (found := floats_among(named.subjects)) is None:
        return None
    return Subject(found.name, "original", found.model)


def chosen_mixes(original: GgufModel, size: int, wanted: Sequence[str]) -> list[MixFile]:
    """Return the mixes ``wanted`` or, if none is named, the one nearest to ``size`` bytes and one on either side of it.

    Raises UserError for an unknown mix, and for an architecture of which llama.cpp's rules are not known.
    """
    try:
        if wanted:
            return [MixFile(original, mix) for mix in dict.fromkeys(mix_name(one) for one in wanted)]
        found = mixes_by_size(original)
    except ValueError as error:
        raise UserError(str(error)) from None
    nearest = min(found, key=lambda mix: (abs(mix.size - size), -mix.size))
    below = [mix for mix in found if mix.size < min(nearest.size, size)]
    above = [mix for mix in found if mix.size > max(nearest.size, size)]
    return [*below[-1:], nearest, *above[:1]]


def mix_subjects(mixes: Sequence[MixFile], imatrix: Path | None, folder: Path) -> Iterator[Subject]:
    """Write each mix into ``folder``, if it is not there, and yield it."""
    importance: dict[str, np.ndarray] = read_imatrix(imatrix) if imatrix else {}
    for mix in mixes:
        path = folder / f"llama.cpp-{mix.mix}{ENDING}"
        mix.write(path, importance)
        yield Subject(mix.mix, "llama.cpp", read_model(path))
