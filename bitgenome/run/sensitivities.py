"""Measures sensitivity tables on the pool, once for each bank, text and measure; an interrupted measurement resumes."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.files import atomic_write_bytes, atomic_write_text, cut_torn_tail, disk_errors
from bitgenome.observe.progress import Track
from bitgenome.plan.memory import GENES_TOGETHER
from bitgenome.plan.plan import Plan
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.shared import build_once, shared_directory
from evaluators.data.windows import TokenWindows
from evaluators.engine.evaluator import EvaluatorSetup, MeasureSensitivity
from evaluators.gradient.sensitivity import gradient_losses, gradient_tasks
from evaluators.prepare.bank import Bank
from search.allocation.seeds import nearest_uniform
from search.allocation.sensitivity import SensitivityTable
from search.types import Fidelity, Genome, SearchSpace
from workers.pool.base import Pool, Task

log = logging.getLogger(__name__)

GRADIENTS = {  # measure -> estimator of evaluators.gradient.sensitivity
    "gradient": "positions",
    "gradient_windows": "windows",
    "gradient_kronecker": "kronecker",
    "gradient_diagonal": "diagonal",
}


@dataclass(frozen=True)
class Measurement:
    """Measures one frame of sensitivities: a row per gene and choice, with the measure and the bank's errors.

    ``measure``: kl, around_base, or one of GRADIENTS. See search.allocation.sensitivity.
    """

    plan: Plan
    setup: EvaluatorSetup
    windows: TokenWindows
    measure: str

    @property
    def fidelity(self) -> Fidelity:
        """The text that is read: a prefix of the search split."""
        return Fidelity("search", self.plan.config.text.tokens.sensitivity)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of windows, and tokens per window."""
        count, window = self.windows.take(self.fidelity.split, self.fidelity.tokens).shape
        return count, window

    @property
    def base(self) -> Genome | None:
        """The genome in which choices are tried; None: full precision."""
        return nearest_uniform(self.setup.space, self.plan.budget) if self.measure == "around_base" else None

    @property
    def tokens_run(self) -> int:
        """Tokens of text of all forward passes, whatever prefixes they share with others."""
        count, window = self.shape
        return count * window * (1 if self.measure in GRADIENTS else self.plan.sensitivity_evaluations)

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides the measurement."""
        rows = self.windows.take(self.fidelity.split, self.fidelity.tokens)
        genes = [gene.tensors for gene in self.setup.space.genes]
        text = hashlib.sha256(rows.tobytes()).hexdigest()
        how = [] if self.measure == "kl" else [self.measure, self.base]
        setup = self.setup
        compute = "auto" if setup.chosen and setup.compute == "float32" else setup.compute  # what it always was there
        return digest_of(setup.bank.name, text, rows.shape, setup.activations, compute, genes, *how)

    @cached_property
    def directory(self) -> Path:
        """Shared directory of the measurement."""
        return shared_directory(self.plan.config, layout.SENSITIVITY_KIND, self.digest)

    @property
    def seconds(self) -> float:
        """Seconds spent on the measurement so far, over all attempts; NaN if they were not recorded."""
        file = self.directory / layout.SENSITIVITY_SECONDS
        try:
            return float(json.loads(file.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):  # a figure for reports: no reason to stop
            return math.nan

    def frame(self, pool: Pool, track: Track) -> pd.DataFrame:
        """Return the frame, and measure it first if it is missing."""
        file = self.directory / layout.SENSITIVITY

        def build() -> None:
            with self._timed():
                records = self._gradients(pool, track) if self.measure in GRADIENTS else self._measured(pool, track)
            atomic_write_bytes(file, pd.DataFrame(records).to_parquet(index=False))

        build_once(self.plan.config, self.directory, "the sensitivities", lambda: self.read(file) is not None, build)
        return pd.read_parquet(file)

    def read(self, file: Path) -> pd.DataFrame | None:
        """Return the frame in ``file``; None if there is none, or, with a warning, if it is damaged."""
        if not file.is_file():
            return None
        try:
            frame = pd.read_parquet(file)
            table_of(self.setup.space, frame, self.measure)
            table_of(self.setup.space, frame, "reconstruction")
        except (ValueError, TypeError, KeyError, OSError) as error:  # pyarrow's errors are ValueError and OSError
            log.warning("making %s again: it is damaged (%s)", file, " ".join(str(error).split())[:100])
            return None
        return frame

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the seconds spent in the context to the recorded ones."""
        before, started = 0.0 if math.isnan(self.seconds) else self.seconds, time.monotonic()
        try:
            yield
        finally:
            atomic_write_text(
                self.directory / layout.SENSITIVITY_SECONDS, json.dumps(before + time.monotonic() - started)
            )

    def _measured(self, pool: Pool, track: Track) -> list[dict[str, Any]]:
        """Return the rows of a measure that runs each choice."""
        genes = range(len(self.setup.space.genes))
        parts = [tuple(genes[start : start + GENES_TOGETHER]) for start in genes[::GENES_TOGETHER]]
        tasks = [MeasureSensitivity(self.setup, part, self.fidelity, self.base) for part in parts]
        results = self._resumed(tasks, pool, track, "measuring sensitivities")
        records = [record for part in results for gene in part for record in gene]
        return [{(self.measure if key == "kl" else key): value for key, value in r.items()} for r in records]

    def _gradients(self, pool: Pool, track: Track) -> list[dict[str, Any]]:
        """Return the rows of a measure that is estimated from gradients."""
        if self.setup.activations != "float":
            log.warning("sensitivities from gradients leave out what %s inputs lose", self.setup.activations)
        tasks = gradient_tasks(self.setup, self.fidelity, self.shape, GRADIENTS[self.measure])
        parts = self._resumed(tasks, pool, track, "estimating sensitivities")
        losses = gradient_losses(parts, self.shape, self.windows.unscored)
        bank = Bank(self.setup.bank)
        return [
            {"gene": gene.name, "choice": choice, "format": fmt.name, self.measure: float(loss)}
            | bank.errors(gene.tensors, fmt)
            for gene, found in zip(self.setup.space.genes, losses, strict=True)
            for choice, (fmt, loss) in enumerate(zip(gene.formats, found, strict=True))
        ]

    def _resumed(self, tasks: Sequence[Task], pool: Pool, track: Track, what: str) -> list[Any]:
        """Return the results of all tasks; each is kept in parts.jsonl as it comes, and not computed again."""
        partial = self.directory / layout.SENSITIVITY_PARTS
        cut_torn_tail(partial)
        results = whole_parts(partial)[: len(tasks)]
        missing = tasks[len(results) :]
        with partial.open("a", encoding="utf-8") as stream:
            for result in track(pool.map(missing), len(missing), what):
                line = json.dumps(result)
                with disk_errors(partial):
                    stream.write(line + "\n")
                    stream.flush()
                results.append(json.loads(line))
        return results


def whole_parts(file: Path) -> list[Any]:
    """Return the results in the lines of a parts.jsonl up to the first that is damaged, from which on it is cut."""
    results: list[Any] = []
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for line in lines:
        try:
            results.append(json.loads(line))
        except ValueError:
            log.warning("measuring again from line %d of %s on: it is damaged", len(results) + 1, file)
            atomic_write_bytes(file, b"".join(lines[: len(results)]))
            break
    return results


def measure_sensitivities(
    plan: Plan, setup: EvaluatorSetup, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track
) -> pd.DataFrame:
    """Return the frame of the measure that ``run`` is configured for.

    Raises UserError if the run was started with another measurement.
    """
    measurement = Measurement(plan, setup, windows, plan.config.sensitivity.measure)
    run.record.pin("sensitivity", measurement.digest)
    own = run.path / layout.SENSITIVITY
    if (frame := measurement.read(own)) is not None:  # the run's own frame counts, even if the shared one has changed
        return frame
    atomic_write_bytes(own, measurement.frame(pool, track).to_parquet(index=False))
    return pd.read_parquet(own)


def table_of(space: SearchSpace, frame: pd.DataFrame, measure: str) -> SensitivityTable:
    """Return the additive table of one column of a frame."""
    records = [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
    table = SensitivityTable.from_records(space, records, measure)
    return table.from_least() if measure == "around_base" else table
