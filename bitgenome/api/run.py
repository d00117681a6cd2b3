"""A run as an object: its evaluations as frames, its best genome, its file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
from rich.console import Console

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.config.run import RunConfig
from bitgenome.observe.progress import tracker
from bitgenome.observe.run_status import RunReader, RunStatus
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_files import RunFiles, run_files
from bitgenome.storage.run_names import run_location
from bitgenome.storage.run_result import RunResult
from search.loop.winner import pareto_records
from search.types import Evaluation, SearchSpace

if TYPE_CHECKING:
    from exporters.files.splits import Shards

COLUMNS = ("split", "tokens", "draw", "file_bytes", "bits_per_weight", "loss", "kl", "perplexity", "logit_mse",
           "reconstruction", "seconds", "genome")  # fmt: skip


@dataclass(frozen=True)
class Best:
    """What a finished run ships; KLs are in nats per token."""

    types: dict[str, str]  # GGUF type by tensor, under its Hugging Face name
    genome: tuple[int, ...]
    file_bytes: int
    bits_per_weight: float  # of the whole file
    validation_kl: float  # of the file: after healing, if that was applied
    healed: bool
    test_kl: float | None  # by llama.cpp on test text; None until it has run the file
    figures: dict[str, Any]  # all of best.json


@dataclass(frozen=True)
class Run:
    """A run at a path or URL, finished or not; what it reads is what lies there at the time of the call."""

    location: str

    @classmethod
    def open(cls, run: str | Path, storage: str = "runs") -> Self:
        """Return the run in a directory, behind a URL, or of that name below ``storage``. Raises UserError."""
        return cls(run_location(str(run), storage))

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.location.rpartition("/")[2]

    @property
    def config(self) -> RunConfig:
        """The configuration it was started with."""
        return self._directory.config

    @property
    def status(self) -> RunStatus:
        """What the run is doing, as ``bitgenome status`` shows it."""
        return RunReader(self.location).read()

    @cached_property
    def space(self) -> SearchSpace:
        """Genes with their types and sizes. Reads the model's headers; raises UserError if the model is gone."""
        from bitgenome.run.gene_groups import plan_of_run  # noqa: PLC0415 - starts torch

        return plan_of_run(self._directory).space

    @property
    def best(self) -> Best:
        """The genome that ships, and its figures. Raises UserError if the run is not finished."""
        content = self._files.content(layout.BEST)
        if not content:
            raise UserError(
                f"expected a finished run with {layout.BEST}, found none in {self.location}: "
                f"bitgenome resume {self.location}"
            )
        source = f"{self.location}/{layout.BEST}"
        result = RunResult.parse(content, source, self.location)
        with expecting("the figures of a run", source):
            figures = json.loads(content)
            healing = figures["healing"] or {}
            healed = bool(healing.get("applied"))
            return Best(
                types=dict(figures["formats"]),
                genome=result.evaluation.genome,
                file_bytes=result.evaluation.file_bytes,
                bits_per_weight=result.bits_per_weight,
                validation_kl=healing["validation"]["after"]["kl"] if healed else result.evaluation.kl,
                healed=healed,
                test_kl=result.proof["figures"]["mean_kl"]["value"] if result.proof else None,
                figures=figures,
            )

    def evaluations(self, params: bool = False) -> pd.DataFrame:
        """Return everything that was evaluated, in order: COLUMNS, and ``number``, a row's place, as the index.

        ``loss`` is what the search minimizes on text of ``split``, ``tokens`` and ``draw``: losses of different text
        are not comparable. With ``params`` a column ``params_GENE`` holds the type of each gene, as in Optuna's
        ``trials_dataframe``.
        """
        return self._frame(list(self._evaluations()), params)

    def front(self, split: str = "search", params: bool = False) -> pd.DataFrame:
        """Return the Pareto front on the longest text of ``split`` (search, validation or test), smallest file first.

        No evaluation of that text has a lower loss in as few bytes. The columns are those of ``evaluations``.
        """
        measured = [evaluation for evaluation in self._evaluations() if evaluation.split == split and evaluation.tokens]
        text = max((e.fidelity for e in measured), key=lambda text: (text.tokens, text.draw), default=None)
        by_genome = {e.genome: e for e in measured if e.fidelity == text}
        records = pareto_records(by_genome.values())
        return self._frame([by_genome[tuple(r["genome"])] for r in records if r["front"]], params)

    def sensitivities(self) -> pd.DataFrame:
        """Return what each gene costs at each level, as sensitivity.parquet holds it. Raises UserError."""
        file = Path(self.location) / layout.SENSITIVITY
        if not file.is_file():
            raise UserError(f"expected {layout.SENSITIVITY} in a local run, found none in {self.location}")
        return pd.read_parquet(file)

    def export(self, shards: "Shards | None" = None) -> Path:
        """Write GGUF and recipe again from the run's bank, and return the file's path. Raises UserError."""
        from bitgenome.run.export import export_again  # noqa: PLC0415 - starts torch

        return export_again(self.location, shards)

    def sizes(self) -> pd.DataFrame:
        """Return what every size of the file would give, as ``bitgenome front`` does: a row for each, smallest first.

        ``kl`` is on test text before healing; where ``measured`` is False it is predicted. Raises UserError if the run
        is not finished.
        """
        from bitgenome.front.sizes import Size, front_of  # noqa: PLC0415 - starts torch

        return pd.DataFrame(front_of(self.location).sizes, columns=[field.name for field in fields(Size)])

    def with_budget(
        self,
        *,
        size: str | None = None,
        bits: float | None = None,
        like: str | None = None,
        heal: bool = False,
        overrides: Sequence[str] = (),
        progress: bool = True,
    ) -> "Run":
        """Return a run beside this one with the best file of another size: no new search, the bank's bytes.

        One is given of ``size`` ("4.5GB"), ``bits`` per weight and ``like``, a mix of llama.cpp's ("Q4_K_M"); ``heal``
        tunes norms, biases and block scales anew. Raises UserError.
        """
        from bitgenome.front.budgets import export_budget  # noqa: PLC0415 - starts torch
        from bitgenome.quantize.size import WantedSize  # noqa: PLC0415

        wanted = WantedSize(size, bits, like)
        wanted.check()
        outcome = export_budget(self.location, wanted, console_of(progress), heal=heal, overrides=overrides)
        return Run(str(outcome.run))

    def compare(
        self,
        *others: str | Path,
        mixes: Sequence[str] = (),
        prompts: Sequence[str] = (),
        max_tokens: int = 64,
        skip_original: bool = False,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Return a row for the original, llama.cpp's own files, ``others`` (runs and GGUF files) and this run's file.

        All are run by llama.cpp: size, load time, tokens per second, memory, ``answers`` to ``prompts``, and
        ``figures.NAME.value`` with its standard error beside. ``mixes`` ("Q4_K_M") are by default those around the
        run's size; ``skip_original`` does not run the original. As ``bitgenome compare``. Raises UserError.
        """
        from bitgenome.compare.compare import Wanted, compare  # noqa: PLC0415 - starts torch

        wanted = Wanted(prompts=prompts, max_tokens=max_tokens, skip_original=skip_original, mixes=mixes)
        named = [self.location, *map(str, others)]
        found = compare(named, wanted, self.location.rpartition("/")[0], tracker(console_of(progress)))
        return pd.json_normalize(found.to_json()["files"])

    def to_optuna(self, path: str | Path, objectives: Sequence[str] = ("loss",)) -> list[str]:
        """Write the evaluations as trials into a journal file of Optuna's, and return the names of its studies.

        ``optuna-dashboard PATH`` opens it, and ``optuna.storages.JournalStorage`` reads it: a study for each text that
        was read, a categorical parameter for each gene, ``objectives`` (columns of ``evaluations``) to be minimized.
        An earlier file at ``path`` is replaced. Raises UserError.
        """
        from bitgenome.api.optuna_journal import write_journal  # noqa: PLC0415 - imports Optuna

        return write_journal(Path(path), self.name, self.space, list(self._evaluations()), objectives)

    @property
    def _directory(self) -> RunDirectory:
        return RunDirectory.open(self.location)

    @property
    def _files(self) -> RunFiles:
        return run_files(self.location)

    def _evaluations(self) -> Iterator[Evaluation]:
        """Yield what whole lines of evaluations.jsonl hold."""
        for line in self._files.lines(layout.EVALUATIONS):
            if line.endswith(b"\n"):
                with expecting("evaluations", f"{self.location}/{layout.EVALUATIONS}"):
                    yield Evaluation.from_json(json.loads(line))

    def _frame(self, evaluations: Sequence[Evaluation], params: bool) -> pd.DataFrame:
        """Return one row for each of ``evaluations``."""
        weights = self._directory.record.get("weights")
        rows = [
            {name: getattr(e, name) for name in COLUMNS if name != "bits_per_weight"}
            | {"bits_per_weight": 8 * e.file_bytes / weights if weights else float("nan")}
            for e in evaluations
        ]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        if params:
            genes = self.space.genes
            named = {
                f"params_{gene.name}": [gene.formats[e.genome[i]].name for e in evaluations]
                for i, gene in enumerate(genes)
            }
            frame = pd.concat([frame, pd.DataFrame(named, index=frame.index)], axis=1)
        frame.index.name = "number"
        return frame


def console_of(progress: bool) -> Console:
    """Return a console for progress on standard error, or one that shows nothing."""
    return Console(stderr=True) if progress else Console(quiet=True, force_terminal=False)
