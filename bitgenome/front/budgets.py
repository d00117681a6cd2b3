"""Makes the file of another size from a finished run: no new search, no new bank.

The result is a run of its own beside the first, of the same bank, sensitivities and text: its strategy is the exact
solver, and it starts from what the first run has evaluated (``search.seeds``). So all commands take it, it goes on
where it was interrupted, and the first run stays as it is.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_bytes
from bitgenome.config.file import apply_override
from bitgenome.config.run import RunConfig, parse_config
from bitgenome.observe.monitoring import monitor_run
from bitgenome.observe.progress import Track
from bitgenome.plan.plan import Plan, budget_of
from bitgenome.plan.seeds import check_seeds, read_evaluations
from bitgenome.quantize.size import WantedSize, wanted_budget
from bitgenome.run.gene_groups import plan_of_run
from bitgenome.run.outcome import Outcome
from bitgenome.run.pipeline import run_stages
from bitgenome.run.prepare import Artefacts, evaluator_setup, quantized_plan, record_inputs
from bitgenome.run.resume import config_to_resume
from bitgenome.run.sensitivities import measure_sensitivities
from bitgenome.run.session import open_session
from bitgenome.storage.opened import note_model
from bitgenome.storage.run_directory import RunDirectory, differing_keys
from bitgenome.storage.run_files import LocalRunFiles
from bitgenome.storage.run_record import PARENT
from bitgenome.storage.run_result import RunResult
from evaluators.data.windows import TokenWindows, saved_windows
from evaluators.prepare.bank import damaged_tensors
from search.types import Evaluation
from workers.pool.base import Pool

log = logging.getLogger(__name__)

DECIDED = ("compute", "activations", "weights")  # keys of run.json that stay as they are
ARTEFACTS = ("bank", "scaled_model")  # and those that are paths
CARRIED = (layout.SENSITIVITY, layout.GENE_GROUPS, layout.SCALING, layout.IMATRIX)
MAY_DIFFER = ("budget", "search", "healing")  # settings that bank, sensitivities and text do not depend on


def export_budget(
    location: str,
    wanted: WantedSize,
    console: Console,
    *,
    heal: bool = False,
    name: str | None = None,
    overrides: Sequence[str] = (),
) -> Outcome:
    """Choose the best genome of a size from what a finished run knows; write, prove and record its file.

    - ``location`` is the finished run's path or URL; nothing there changes.
    - ``heal`` tunes norms, biases and block scales anew.
    - ``name`` is that of the run which is made beside it, by default its own and the size.
    - ``overrides`` are settings such as ``workers.ray=off``, of those that bank and sensitivities do not depend on.

    Called again it goes on. Raises UserError if the run is not finished, its bank is damaged, or no file can have
    that size: then nothing is written.
    """
    wanted.check()
    finished = RunDirectory.open(location)
    with finished.own() if finished.mirror else nullcontext():
        plan = plan_of_finished(finished, location)
        sized = wanted_budget(wanted, plan.space, plan.file)
        suffix = f"{wanted.suffix.replace(' ', '')}{'-healed' if heal else ''}"
        config = derived_config(finished, location, sized.budget, heal, name, suffix, overrides)
        try:
            plan = replace(plan, config=config, budget=budget_of(config.budget, plan.space))
        except ValueError as error:
            raise UserError(str(error)) from None
        log.info("%s", sized.note)
        windows = windows_of(finished, location)
        check_seeds(plan)
        with (
            RunDirectory.owned(config) as directory,
            open_session(config, plan.folder, directory.path, directory.stage("workers")) as pool,
            monitor_run(config, pool) as monitor,
        ):
            note_model(config, plan.folder)
            carry(finished, directory, plan)
            return run_stages(plan, windows, directory, pool, monitor, console, carried_artefacts)


def derived_config(
    run: RunDirectory,
    location: str,
    budget: dict[str, Any],
    heal: bool,
    name: str | None,
    suffix: str,
    overrides: Iterable[str],
) -> RunConfig:
    """Return the configuration of a run within ``budget`` that takes all but its genome from the finished ``run``.

    Its name is ``name``, or that of ``run`` with ``suffix``. Raises UserError if ``overrides`` change what bank or
    sensitivities depend on.
    """
    base = config_to_resume(location)
    data = base.model_dump(mode="json")
    data |= {"budget": budget, "name": name or f"{base.name}-{suffix}"}
    rungs = base.ladder.rungs[-1:] if base.search.ladder else ()
    data["search"] |= {"strategy": "exact", "seeds": [run.location], "ladder": rungs, "refresh": 0}
    data["search"] |= {"mutation_prior": "none"}
    data["healing"]["enabled"] = (base.healing.enabled if base.healing.enabled != "off" else "auto") if heal else "off"
    for override in overrides:
        apply_override(data, override)
    config = parse_config(data, "the settings of this export")
    changed = differing_keys(without(base.result_keys(), MAY_DIFFER), without(config.result_keys(), MAY_DIFFER))
    if changed:
        raise UserError(
            f"expected settings that the bank and sensitivities of {location} do not depend on, found "
            f"{', '.join(changed)}: begin a run of its own for that"
        )
    if config.name == base.name:
        raise UserError(f"expected a name other than that of the run itself, found {config.name}")
    return config


def without(keys: dict[str, Any], left_out: Iterable[str]) -> dict[str, Any]:
    """Return ``keys`` without those of ``left_out``."""
    return {key: value for key, value in keys.items() if key not in left_out}


def plan_of_finished(run: RunDirectory, location: str) -> Plan:
    """Return the plan of a run. Raises UserError if it is not finished, or its model or bank are not as they were."""
    if RunResult.read(run.path) is None:
        raise UserError(
            f"expected a finished run with {layout.BEST}, found none in {location}: bitgenome resume {location}"
        )
    plan = plan_of_run(run)
    run.record.pin("model", plan.folder.digest)
    if damaged := damaged_tensors(run.artefact("bank")):
        raise UserError(
            f"expected a whole bank, found {damaged[0]} damaged: bitgenome resume {run.location} rebuilds it"
        )
    return plan


def windows_of(run: RunDirectory, location: str) -> TokenWindows:
    """Return the token windows of a run. Raises UserError if they are missing or damaged."""
    windows = saved_windows(run.path / layout.WINDOWS)
    if windows is None or windows.digest != run.record.get("digests", {}).get("text"):
        raise UserError(
            f"expected the run's text in {run.path / layout.WINDOWS}, found none that is whole: bitgenome resume "
            f"{location} reads it again"
        )
    return windows


def carry(finished: RunDirectory, directory: RunDirectory, plan: Plan) -> None:
    """Bring what a finished run has decided and measured into ``directory``, unless that was done.

    Its evaluations come along where they fit: on test text all, and else those of genomes within the budget.
    """
    record = directory.record
    if PARENT in record:
        return
    for name in CARRIED:
        if (finished.path / name).is_file():
            shutil.copyfile(finished.path / name, directory.path / name)
    rung = ("search", plan.config.ladder.rungs[-1], 0)

    def fits(evaluation: Evaluation) -> bool:
        text = evaluation.split, evaluation.tokens, evaluation.draw
        within = evaluation.file_bytes <= plan.budget.file_bytes
        return evaluation.split == "test" or (within and (evaluation.split == "validation" or text == rung))

    known = read_evaluations(LocalRunFiles(finished.path), finished.location)
    lines = b"".join(json.dumps(e.to_json()).encode() + b"\n" for e in known if fits(e))
    atomic_write_bytes(directory.path / layout.EVALUATIONS, lines)
    record |= {key: finished.record[key] for key in DECIDED if key in finished.record}
    record |= {key: str(finished.artefact(key)) for key in ARTEFACTS if key in finished.record}
    record |= {"forecast": {}, PARENT: Path(finished.location).name}
    record.save()


def carried_artefacts(
    plan: Plan, windows: TokenWindows, directory: RunDirectory, pool: Pool, track: Track
) -> Artefacts:
    """Return what the search reads, from a directory that ``carry`` has filled: no Hessians are needed."""
    record_inputs(plan, windows, directory)
    plan = quantized_plan(plan, directory)
    setup = evaluator_setup(plan, directory, directory.artefact("bank"))
    return Artefacts(plan, setup, measure_sensitivities(plan, setup, windows, directory, pool, track))
