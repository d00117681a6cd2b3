"""Ties genes by kind, by layer or by mutual information, so that a plan has fewer genes."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import atomic_write_json
from bitgenome.observe.progress import Track
from bitgenome.plan.disk import keeps_hessians
from bitgenome.plan.plan import Plan, make_plan, tied_space
from bitgenome.run.calibration import calibrate, sample_activations
from bitgenome.run.prepare import record_inputs
from bitgenome.run.streamed_bank import input_statistics
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from evaluators.model.folder import ModelFolder
from evaluators.prepare.activation_samples import layer_series
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.input_group import group_file
from quantizers.statistics.clustering import group
from quantizers.statistics.mutual_information import pairwise_information
from search.loop.settings import GeneGroups
from workers.pool.base import Pool

log = logging.getLogger(__name__)


def with_gene_groups(plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track) -> Plan:
    """Return ``plan`` with genes tied as its configuration says.

    Groups by mutual information are computed once per run and kept in its gene-groups.json. ``windows`` are the run's
    token windows; work goes to ``pool``, and ``track`` shows its progress.
    """
    config = plan.config.search.gene_groups
    if config.by != "mutual_information":
        return plan  # tied by make_plan
    try:
        labels = read_labels(run)
    except UserError as error:
        log.warning("%s", error)
        labels = None
    if labels is None:
        record_inputs(plan, windows, run)
        if keeps_hessians(plan):
            with run.stage("calibration"):
                calibration, groups = calibrate(plan, windows, pool, track, left_out=plan.file.left_out)
        else:
            calibration, groups = input_statistics(plan, windows, run, pool, track)
        with run.stage("gene groups"):
            arguments = (calibration, groups, run.path / layout.WINDOWS, config.samples, pool, track)
            labels = information_labels(plan.folder, sample_activations(plan, *arguments), calibration, groups, config)
            atomic_write_json(run.path / layout.GENE_GROUPS, labels)
    return tied(plan, labels)


def plan_of_run(run: RunDirectory) -> Plan:
    """Return the plan that ``run`` was made with, gene groups included."""
    plan = make_plan(run.config)
    labels = read_labels(run)
    return plan if labels is None else tied(plan, labels)


def read_labels(run: RunDirectory) -> dict[str, str] | None:
    """Return the mutual-information group of each tensor, or None if the run has none."""
    file = run.path / layout.GENE_GROUPS
    if not file.is_file():
        return None
    with expecting("names of groups by tensor", file, f"bitgenome resume {run.location} finds them again"):
        labels: dict[str, str] = json.loads(file.read_bytes())
        if not all(isinstance(label, str) for label in labels.values()):
            raise TypeError("labels that are no text")
        return labels


def tied(plan: Plan, labels: Mapping[str, str]) -> Plan:
    """Return ``plan`` with the tensors of each label tied into one gene."""
    space, budget = tied_space(plan.config, plan.file, plan.space, labels)
    return replace(plan, space=space, budget=budget)


def information_labels(
    folder: ModelFolder, samples: Path, calibration: Path, groups: Sequence[str], config: GeneGroups
) -> dict[str, str]:
    """Return the group of each tensor by name, clustered by mutual information of the norms of the tensors' outputs.

    ``samples`` and ``calibration`` are the directories of activation samples and Hessians. A tensor without samples has
    no group.
    """
    members = {name: group_tensors(group_file(calibration, name)) for name in groups}
    names, series = layer_series(folder, samples, members)
    assert config.count is not None
    affinity = pairwise_information(series).normalized().numpy()
    labels = group(affinity, min(config.count, len(names)), "spectral")
    return {name: f"group {label}" for name, label in zip(names, labels.tolist(), strict=True)}
