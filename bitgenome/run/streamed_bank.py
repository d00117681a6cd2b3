"""Builds the bank as calibration goes, a stretch of blocks at a time; a Hessian is removed when its tensors are done.

All Hessians of a model of 8B take 33 GB, of 70B 327 GB; here at most ``HESSIANS_AT_ONCE`` bytes are on disk, or one
block's. What stays of an input group are its moments. A bank that is damaged later, and one with other levels, is
calibrated again.
"""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.files import atomic_write_json, json_object
from bitgenome.observe.progress import Track
from bitgenome.plan.disk import stretches
from bitgenome.plan.plan import Plan
from bitgenome.run.bank import BankBuild
from bitgenome.run.calibration import calibration_digest
from bitgenome.run.compute import recorded_device
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.shared import build_once, pull_shared, push_shared, remove_shared, shared_directory
from evaluators.data.windows import TokenWindows
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.calibration import Calibrate
from evaluators.prepare.hidden_states import saved_blocks, states_file
from evaluators.prepare.input_group import copy_statistics, group_file, statistics_readable
from workers.pool.base import Pool

log = logging.getLogger(__name__)


def build_streamed(
    plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track, outputs: Path | None = None
) -> tuple[Path, list[str], Path]:
    """Build what is missing of the bank; return the directory of the groups' moments, their names, and the bank's.

    ``outputs`` is the directory of the output factors if rounding looks at the loss.
    """
    stream = Stream.of(plan, windows, run, pool, track)
    bank = BankBuild(plan, stream.statistics.name, recorded_device(run), outputs)
    stream = replace(stream, bank=bank)
    return stream.statistics, stream.build(), bank.directory


def input_statistics(
    plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track
) -> tuple[Path, list[str]]:
    """Gather the moments of all input groups if they are missing; return their directory and the groups' names."""
    stream = Stream.of(plan, windows, run, pool, track)
    return stream.statistics, stream.build()


@dataclass(frozen=True)
class Stream:
    """Goes through the blocks of a model, stretch by stretch."""

    plan: Plan
    run: RunDirectory
    pool: Pool
    track: Track
    statistics: Path  # shared directory of the groups' moments, and of the list of the groups with their blocks
    bank: BankBuild | None = None  # without one, only moments are gathered

    @classmethod
    def of(cls, plan: Plan, windows: TokenWindows, run: RunDirectory, pool: Pool, track: Track) -> "Stream":
        """Return the stream for a run that only gathers moments."""
        digest = calibration_digest(plan, windows, plan.config.quantization.upstream_level, plan.file.left_out)
        statistics = shared_directory(plan.config, layout.STATISTICS_KIND, digest)
        return cls(plan, run, pool, track, statistics)

    @property
    def place(self) -> Path:
        """Directory whose lease is held meanwhile."""
        return self.bank.directory if self.bank else self.statistics

    @property
    def passing(self) -> Path:
        """Directory of what is removed in the end; hidden, and so never sent, unless other machines need it."""
        return self.place / (f".{layout.PASSING}" if self.pool.one_machine else layout.PASSING)

    def groups(self) -> dict[str, int]:
        """Return the input groups that are known, in order, with their blocks."""
        file = self.statistics / layout.GROUPS
        found = json_object(file.read_bytes()) if file.is_file() else {}
        return {name: block for name, block in found.items() if isinstance(block, int)}

    def measured(self, blocks: range) -> list[str] | None:
        """Return the groups of ``blocks``; None if some are unknown, or their moments cannot be read."""
        found = {name: block for name, block in self.groups().items() if block in blocks}
        whole = set(found.values()) == set(blocks)
        return list(found) if whole and all(statistics_readable(self.file(name)) for name in found) else None

    def file(self, group: str) -> Path:
        """Return the path of a group's moments."""
        return group_file(self.statistics, group)

    def build(self) -> list[str]:
        """Build what is missing, and return the names of all groups in order."""
        config = self.plan.config
        pull_shared(config, self.statistics)
        build_once(config, self.place, "the bank" if self.bank else "the moments of inputs", self._done, self._build)
        push_shared(config, self.statistics)
        return list(self.groups())

    def _done(self) -> bool:
        measured = all(self.measured(blocks) is not None for blocks in stretches(self.plan))
        return measured and (self.bank is None or self.bank.done())

    def _build(self) -> None:
        self.passing.mkdir(exist_ok=True)
        if self.bank:
            self.bank.remove_damaged()
        for blocks in stretches(self.plan):
            self._stretch(blocks)
        if self.bank:
            self.bank.finish()
        remove_shared(self.plan.config, self.passing)
        shutil.rmtree(self.passing, ignore_errors=True)

    def _stretch(self, blocks: range) -> None:
        """Calibrate ``blocks``, build their tensors, and remove their Hessians."""
        measured = self.measured(blocks)
        done = measured is not None and (self.bank is None or not self._missing(measured))
        names = self._calibrate(blocks) if measured is None or not done else measured
        if self.bank and not done:
            with self.run.stage("bank"):
                tasks = self.bank.tasks(group_file(self.passing, name) for name in names)
                what = f"building the bank, {self._text(blocks)}"
                for _ in self.track(self.pool.map(tasks), len(tasks), what):
                    pass
        for name in names:
            remove_shared(self.plan.config, group_file(self.passing, name))  # also what an earlier attempt left

    def _text(self, blocks: range) -> str:
        last = blocks == stretches(self.plan)[-1]
        return f"blocks {blocks.start + 1} to {blocks.stop - last}{' and head' if last else ''}"

    def _missing(self, groups: list[str]) -> set[str]:
        assert self.bank is not None
        return self.bank.missing() & {tensor for name in groups for tensor in group_tensors(self.file(name))}

    def _calibrate(self, blocks: range) -> list[str]:
        """Measure ``blocks``, keep the moments, and return the names of their groups."""
        windows = (self.run.path / layout.WINDOWS).resolve()
        begin = next((block for block in saved_blocks(self.passing) if block <= blocks.start), None)
        states = None if begin is None else states_file(self.passing, begin)
        upstream = self.plan.config.quantization.upstream_level
        task = Calibrate(
            self.plan.folder.path, windows, self.passing, upstream, blocks.start, blocks.stop, states,
            self.plan.file.left_out,
        )  # fmt: skip
        with self.run.stage("calibration"):
            (found,) = self.track(self.pool.map([task]), 1, f"calibrating {self._text(blocks)}")
            for name in found:
                copy_statistics(group_file(self.passing, name), self.file(name))
            others = {name: block for name, block in self.groups().items() if block not in blocks}
            known = sorted((others | found).items(), key=lambda item: item[1])
            atomic_write_json(self.statistics / layout.GROUPS, dict(known))
        return list(found)
