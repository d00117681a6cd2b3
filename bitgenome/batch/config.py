"""Loads the configurations of a batch, files of one run each or with a matrix of settings, checked before any work."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.errors import UserError
from bitgenome.common.section import Section
from bitgenome.config.file import apply_override, parse_section, read_settings, set_key
from bitgenome.config.run import RunConfig, absolute_paths, parse_config
from bitgenome.config.storage import NAME
from bitgenome.plan.memory import check_memory
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import ready_windows
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_result import RunResult
from evaluators.data.windows import TokenWindows
from evaluators.model.folder import ModelFolder, is_gguf
from workers.storage.folders import open_folder

NAMED_FIRST, NAMED_LAST = ("model", "budget", "search.strategy"), "search.seed"  # others go between, as in the file
OF_ONE_RUN = ("budget", "search", "healing", "fitness")  # settings in which runs with the same bank may differ
BUDGET_UNITS = {"bits_per_weight": "bpw", "compression_ratio": "x", "file_size": ""}


class MatrixConfig(Section):
    """Settings of a batch in one file: every combination of ``matrix``, set in ``base``, but those of ``exclude``."""

    name: str | None = Field(None, pattern=NAME, description="first in the runs' names; by default the model's")
    base: dict[str, Any] | str = Field(description="settings of a run, or the file that holds them, beside this one")
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        min_length=1, description="dotted keys, each with the values that it takes"
    )
    exclude: list[dict[str, Any]] = Field([], description="combinations to leave out: some of matrix's keys and values")


@dataclass(frozen=True)
class Inputs:
    """Caches models by name, and texts by model and settings: each is read once for all runs."""

    folders: dict[str, ModelFolder]
    texts: dict[tuple[str, str], TokenWindows | None]


@dataclass(frozen=True)
class BatchRun:
    """One run of a batch, with its plan and its text."""

    source: Path
    plan: Plan
    windows: TokenWindows | None  # None: the model writes some of the text, which the first run of it will do

    @property
    def config(self) -> RunConfig:
        """Configuration of the run."""
        return self.plan.config

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.name

    @property
    def directory(self) -> Path:
        """Directory of the run on this machine; behind a URL, the mirror."""
        return self.config.storage_path / self.name

    @property
    def location(self) -> str:
        """Path or URL of the run's directory."""
        return f"{self.config.storage_root}/{self.name}"

    @property
    def preparation(self) -> str:
        """Digest of what the run prepares: runs of equal digests share calibration, bank and sensitivities.

        Sensitivities around a budget's base are not shared.
        """
        settings = self.config.result_keys()
        return digest_of(self.config.model, {k: v for k, v in settings.items() if k not in OF_ONE_RUN})

    @property
    def finished(self) -> bool:
        """Whether the run has a result of the same settings, model and text; behind a URL, the remote one counts.

        It is written before the proof, which a run that was interrupted then has still to make.
        """
        content = open_folder(self.location).read(layout.BEST)
        try:
            if content is None or RunResult.parse(content, layout.BEST, self.location).proof is None:
                return False
        except UserError:  # a damaged one, which the run writes again
            return False
        found = RunDirectory.open(self.location)
        digests = {"model": self.plan.folder.digest} | ({"text": self.windows.digest} if self.windows else {})
        return found.config.digest == self.config.digest and digests.items() <= found.record["digests"].items()


def load_batch(paths: Sequence[Path], overrides: Sequence[str] = ()) -> list[BatchRun]:
    """Return the runs of all files in order, each one checked.

    Raises UserError, naming file and run, for the first mistake.
    """
    loaded = [(path, settings) for path in paths for settings in expand(path, overrides)]
    names = [str(settings.get("name")) for _, settings in loaded]
    if twice := next((name for name in names if names.count(name) > 1), None):
        files = " and ".join(dict.fromkeys(str(path) for path, s in loaded if str(s.get("name")) == twice))
        raise UserError(f"expected runs of different names, found {twice!r} twice in {files}")
    inputs = Inputs({}, {})
    runs = [check(path, settings, inputs) for path, settings in loaded]
    for key in ("storage_path", "workers.ray"):
        one_for_all(runs, key)
    return runs


def check(path: Path, settings: dict[str, Any], inputs: Inputs) -> BatchRun:
    """Return a run that can start; ``inputs`` keeps what several runs read. Raises UserError for one that cannot."""
    source = f"{path}, run {settings.get('name')}"
    config = absolute_paths(parse_config(settings, source))
    try:
        plan = make_plan(config)
        check_memory(plan)
        plan = replace(plan, folder=inputs.folders.setdefault(config.model, plan.folder))
        _ = plan.folder.digest  # reads all weights here, and remembers what the runs ask of them
        text = (config.model, config.text.model_dump_json())
        if text not in inputs.texts:
            inputs.texts[text] = ready_windows(plan)
        RunDirectory.find(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return BatchRun(path, plan, inputs.texts[text])


def one_for_all(runs: Sequence[BatchRun], key: str) -> None:
    """Raise UserError unless all runs have the same value of a dotted key."""
    found: dict[Any, BatchRun] = {}
    for run in runs:
        value: Any = run.config
        for part in key.split("."):
            value = getattr(value, part)
        found.setdefault(value, run)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UserError(
            f"expected one {key} for all runs of a batch, found {one} in {first.source}, run {first.name}, and {other} "
            f"in {second.source}, run {second.name}"
        )


def expand(path: Path, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the settings of every run of a file, with overrides applied and the run's name."""
    data = read_settings(path)
    if "matrix" not in data:
        yield read_settings(path, overrides)
        return
    config = parse_section(MatrixConfig, data, str(path))
    base = read_settings(path.parent / config.base) if isinstance(config.base, str) else config.base
    varied = {override.partition("=")[0] for override in overrides} & config.matrix.keys()
    if varied:
        raise UserError(f"expected --set of settings that {path} does not vary, found {min(varied)}")
    for combination in combinations(config, str(path)):
        settings = copy.deepcopy(base)
        for key, value in combination.items():
            set_key(settings, key, value, f"matrix of {path}")
        for override in overrides:
            apply_override(settings, override)
        yield {**settings, "name": run_name(config.name, settings, combination)}


def combinations(config: MatrixConfig, source: str) -> list[dict[str, Any]]:
    """Return the combinations that ``exclude`` leaves.

    Raises UserError for an exclusion that matches nothing, or if none is left.
    """
    values = product(*config.matrix.values())
    found = [dict(zip(config.matrix, combination, strict=True)) for combination in values]
    left = found
    for excluded in config.exclude:
        matches = [c for c in found if excluded and all(k in c and c[k] == v for k, v in excluded.items())]
        if not matches:
            raise UserError(f"expected each exclude of {source} to match a combination of its matrix, found {excluded}")
        left = [combination for combination in left if combination not in matches]
    if not left:
        raise UserError(f"expected exclude of {source} to leave a run, found none left")
    return left


def run_name(batch: str | None, settings: Mapping[str, Any], combination: Mapping[str, Any]) -> str:
    """Return the name of a run, such as stdlib-6m-3.0bpw-genetic-s0.

    It consists of the model, unless the batch has a name and one model, then what varies.
    """
    first = [key for key in NAMED_FIRST if any(within(varied, key) for varied in combination)]
    middle = [key for key in combination if key != NAMED_LAST and not any(within(key, named) for named in NAMED_FIRST)]
    last = [NAMED_LAST] if NAMED_LAST in combination else []
    parts = [batch] if batch else []
    if not batch and "model" not in first:
        parts.append(label("model", settings.get("model")))
    for key in [*first, *middle, *last]:
        parts.append(label(key, settings.get("budget") if key == "budget" else combination.get(key)))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.")


def within(key: str, section: str) -> bool:
    """Return whether the dotted key is ``section`` or below it."""
    return key == section or key.startswith(f"{section}.")


def label(key: str, value: Any) -> str:
    """Return a setting as a part of a run's name."""
    if key == "model":
        return Path(str(value)).stem if is_gguf(str(value)) else Path(str(value)).name
    if key == "budget" and isinstance(value, dict):
        return "-".join(f"{amount}{BUDGET_UNITS.get(kind, '')}" for kind, amount in value.items()).replace(" ", "")
    if key == "search.strategy":
        return str(value)
    if key == NAMED_LAST:
        return f"s{value}"
    if isinstance(value, dict):
        return "-".join(label(f"{key}.{inner}", v) for inner, v in value.items())
    values = value if isinstance(value, list) else [value]
    return key.rpartition(".")[2] + "-".join(map(str, values))
