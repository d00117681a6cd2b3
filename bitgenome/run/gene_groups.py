"""Genes tied by kind, by layer or by mutual information: how a plan's space gets shorter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_json
from bitgenome.observe.progress import Track
from bitgenome.run.plan import Plan, make_plan, tied_space
from bitgenome.run.prepare import calibrate, record_inputs, sample_activations
from bitgenome.storage.run_directory import RunDirectory
from evaluators.data.windows import TokenWindows
from evaluators.model.folder import ModelFolder
from evaluators.prepare.activation_samples import layer_series
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.calibration import group_file
from quantizers.statistics.clustering import group
from quantizers.statistics.mutual_information import pairwise_information
from search.loop.settings import GeneGroups
from workers.pool.base import Pool


def with_gene_groups(plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track) -> Plan:
    """``plan`` with the genes that its configuration ties; those of mutual information are found once for a run."""
    config = plan.config.search.gene_groups
    if config.by != "mutual_information":
        return plan  # tied from the start
    if (labels := read_labels(run)) is None:
        record_inputs(plan, windows, run)
        with run.stage("calibration"):
            calibration, groups = calibrate(plan, windows, pool, track)
        with run.stage("gene groups"):
            arguments = (calibration, groups, run.path / layout.WINDOWS, config.samples, pool, track)
            labels = information_labels(plan.folder, sample_activations(plan, *arguments), calibration, groups, config)
            atomic_write_json(run.path / layout.GENE_GROUPS, labels)
    return tied(plan, labels)


def plan_of_run(run: RunDirectory) -> Plan:
    """The plan that ``run`` was made with, its gene groups included."""
    plan = make_plan(run.config)
    labels = read_labels(run)
    return plan if labels is None else tied(plan, labels)


def read_labels(run: RunDirectory) -> dict[str, str] | None:
    """By tensor the group that mutual information found for it; None if it has not been asked."""
    file = run.path / layout.GENE_GROUPS
    labels: dict[str, str] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return labels


def tied(plan: Plan, labels: Mapping[str, str]) -> Plan:
    space, budget = tied_space(plan.config, plan.folder, plan.space, labels)
    return replace(plan, space=space, budget=budget)


def information_labels(
    folder: ModelFolder, samples: Path, calibration: Path, groups: Sequence[str], config: GeneGroups
) -> dict[str, str]:
    """By tensor its group, by what the norms of the tensors' outputs share; a tensor without activations has none."""
    members = {name: group_tensors(group_file(calibration, name)) for name in groups}
    names, series = layer_series(folder, samples, members)
    assert config.count is not None
    affinity = pairwise_information(series).normalized().numpy()
    labels = group(affinity, min(config.count, len(names)), "spectral")
    return {name: f"group {label}" for name, label in zip(names, labels.tolist(), strict=True)}
