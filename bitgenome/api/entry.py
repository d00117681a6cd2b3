"""The functions of ``import bitgenome``: a configuration, its plan, and its run."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from bitgenome.api.run import Run, console_of
from bitgenome.config.file import apply_override
from bitgenome.config.run import RunConfig, absolute_paths, parse_config
from bitgenome.config.run import load_config as load_file
from bitgenome.plan.memory import check_memory
from bitgenome.plan.plan import Plan, make_plan


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in a YAML file, or of a mapping with the keys of one.

    ``overrides`` are as those of ``--set``: ``["search.generations=20"]``. Raises UserError for the first problem.
    """
    if isinstance(source, Mapping):
        data = deepcopy(dict(source))
        for override in overrides:
            apply_override(data, override)
        return absolute_paths(parse_config(data, "the mapping"))
    return load_file(Path(source), overrides)


def plan(config: RunConfig) -> Plan:
    """Return what a run of ``config`` will be, without reading weights.

    ``plan.space`` has the genes with their types and sizes in bytes, ``plan.budget.file_bytes`` the size aimed at.
    Raises UserError for what a run would refuse.
    """
    found = make_plan(config, weights=False)
    check_memory(found)
    return found


def run(config: RunConfig, *, progress: bool = True) -> Run:
    """Search, export and prove as ``config`` says, and return the finished run; continue it if it was interrupted.

    ``progress`` shows bars, or lines where there is no terminal. Raises UserError for what the user can fix; Ctrl-C
    leaves a run that goes on when this is called again.
    """
    from bitgenome.run.pipeline import run as run_pipeline  # noqa: PLC0415 - starts torch

    run_pipeline(config, console_of(progress))
    return Run.open(f"{config.storage_root}/{config.name}")
