"""Calibrates: the Hessians of all input groups, kept for every bank of the same model and text."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.files import atomic_write_bytes, atomic_write_text
from bitgenome.observe.progress import Track
from bitgenome.plan.objective import factored_tensors, tensors_by_rows
from bitgenome.plan.plan import Plan
from bitgenome.plan.text import ModelAndText
from bitgenome.storage.shared import build_once, shared_directory
from evaluators.data.windows import TokenWindows
from evaluators.gradient.output_factors import FACTOR_TOKENS, MeasureOutputs
from evaluators.gradient.sensitivity import PART_TOKENS
from evaluators.prepare.activation_samples import SampleActivations
from evaluators.prepare.activation_samples import readable as samples_readable
from evaluators.prepare.calibration import LOOKUP_WEIGHT, Calibrate
from evaluators.prepare.input_group import group_file, group_readable
from evaluators.prepare.input_recorder import SHRINKAGE
from evaluators.prepare.output_factor import factor_readable
from evaluators.prepare.row_hessians import sums_readable
from quantizers.rounding.row_order import MOST_ROWS
from quantizers.statistics.output_damping import DAMPINGS, TRIED_ROWS
from quantizers.statistics.row_clusters import PROJECTED
from quantizers.statistics.row_groups import GROUPS_BYTES, IDENTITY, LEAST_MASS, MOST_GROUPS, ROWS_OF_GROUP
from quantizers.statistics.row_groups import SHRINKAGE as ROW_SHRINKAGE
from workers.pool.base import Pool

log = logging.getLogger(__name__)

CALIBRATION_SCHEMA = 2  # raise when the content of a group's file changes
OUTPUTS_SCHEMA = 2  # raise when the content of an output factor's file changes, or of one of sums for rows


def all_readable(done: Path, readable: Callable[[Path], bool]) -> bool:
    """Return whether the list of groups ``done`` exists, and the file of each group beside it is ``readable``."""
    if not done.is_file():
        return False
    names = group_names(done)
    damaged = [name for name in names if not readable(group_file(done.parent, name))]
    if damaged or not names:
        log.warning("rebuilding %s: %s is damaged", done.parent, damaged[0] if damaged else done.name)
    return bool(names) and not damaged


def group_names(done: Path) -> list[str]:
    """Return the names in a list of groups, [] if the file is damaged."""
    try:
        names = json.loads(done.read_bytes())
    except ValueError:
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def calibration_digest(
    plan: ModelAndText, windows: TokenWindows, upstream_level: str | None, left_out: frozenset[str]
) -> str:
    """Return the digest of everything that decides the Hessians."""
    calibration = windows.windows["calibration"]
    text = hashlib.sha256(calibration.tobytes()).hexdigest()
    inputs = plan.folder.digest, text, calibration.shape, LOOKUP_WEIGHT, upstream_level
    return digest_of(CALIBRATION_SCHEMA, *inputs, *([sorted(left_out)] if left_out else []))


def calibrate(
    plan: ModelAndText,
    windows: TokenWindows,
    pool: Pool,
    track: Track,
    upstream_level: str | None = None,
    left_out: frozenset[str] = frozenset(),
) -> tuple[Path, list[str]]:
    """Compute the input groups' Hessians if they are missing; return their directory and the groups' names in order.

    ``upstream_level`` is the level of the blocks before the one that is calibrated; None: full precision. Inputs that
    only tensors of ``left_out`` read are not measured.
    """
    digest = calibration_digest(plan, windows, upstream_level, left_out)
    directory = shared_directory(plan.config, layout.CALIBRATION_KIND, digest)
    done = directory / layout.GROUPS

    def build() -> None:
        windows_file = directory / layout.WINDOWS
        atomic_write_bytes(windows_file, windows.to_bytes())
        task = Calibrate(plan.folder.path, windows_file, directory, upstream_level, left_out=left_out)
        (groups,) = track(pool.map([task]), 1, "calibrating")
        atomic_write_text(done, json.dumps(list(groups)))

    build_once(plan.config, directory, "the calibration", lambda: all_readable(done, group_readable), build)
    return directory, group_names(done)


def has_hessians(
    plan: ModelAndText, windows: TokenWindows, upstream_level: str | None, left_out: frozenset[str]
) -> bool:
    """Return whether an earlier run has kept all Hessians on this machine."""
    name = calibration_digest(plan, windows, upstream_level, left_out)[:16]
    groups = plan.config.storage_path / layout.SHARED / layout.CALIBRATION_KIND / name / layout.GROUPS
    return all_readable(groups, group_readable)


def measure_outputs(plan: Plan, windows: TokenWindows, pool: Pool, track: Track) -> Path:
    """Measure what the loss says of the tensors if it is missing, and return the directory: see MeasureOutputs."""
    tensors = factored_tensors(plan) + tensors_by_rows(plan)
    text = hashlib.sha256(windows.windows["calibration"].tobytes()).hexdigest()
    how: tuple[Any, ...] = FACTOR_TOKENS, PART_TOKENS, MOST_ROWS, DAMPINGS, TRIED_ROWS, SHRINKAGE, windows.unscored
    how += MOST_GROUPS, ROWS_OF_GROUP, GROUPS_BYTES, ROW_SHRINKAGE, IDENTITY, LEAST_MASS, PROJECTED
    digest = digest_of(OUTPUTS_SCHEMA, plan.folder.digest, text, windows.windows["calibration"].shape, tensors, *how)
    directory = shared_directory(plan.config, layout.OUTPUTS_KIND, digest)
    done = directory / layout.GROUPS

    def measured(path: Path) -> bool:
        return factor_readable(path) or sums_readable(path)

    def build() -> None:
        windows_file = directory / layout.WINDOWS
        atomic_write_bytes(windows_file, windows.to_bytes())
        task = MeasureOutputs(plan.folder.path, windows_file, directory, frozenset(tensors))
        (found,) = track(pool.map([task]), 1, "calibrating outputs")
        atomic_write_text(done, json.dumps(found))

    build_once(plan.config, directory, "the output factors", lambda: all_readable(done, measured), build)
    return directory


def sample_activations(
    plan: ModelAndText, calibration: Path, groups: Sequence[str], windows: Path, samples: int, pool: Pool, track: Track
) -> Path:
    """Sample the activations of the input groups if they are missing, and return the samples' directory.

    ``calibration`` is the directory of the Hessians, ``windows`` the file of token windows, ``samples`` the number of
    positions.
    """
    directory = shared_directory(plan.config, layout.SAMPLES_KIND, digest_of(calibration.name, samples))
    files = tuple(group_file(calibration, name) for name in groups)
    done = directory / layout.GROUPS

    def build() -> None:
        task = SampleActivations(plan.folder.path, windows.resolve(), files, directory, samples)
        for _ in track(pool.map([task]), 1, "sampling activations"):
            pass
        taken = [name for name in groups if group_file(directory, name).is_file()]
        atomic_write_text(done, json.dumps(taken))

    build_once(plan.config, directory, "the activation samples", lambda: all_readable(done, samples_readable), build)
    return directory
