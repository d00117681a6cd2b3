"""Runs a batch: several runs as separate processes, a few at a time, on one cluster whose workers they share fairly."""

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console

from bitgenome.batch.children import CHILD, wait_for_orphans
from bitgenome.batch.config import BatchRun
from bitgenome.batch.results import summary, write_results
from bitgenome.batch.shares import Shares
from bitgenome.batch.state import RunState, Stage
from bitgenome.batch.view import BatchView
from bitgenome.common import layout
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_json, atomic_write_text
from bitgenome.config.storage import NAME
from bitgenome.plan.text import keep_windows
from bitgenome.report.run_page import try_report
from bitgenome.storage.lease import Lease
from bitgenome.storage.mirror import mirrored
from bitgenome.storage.run_files import run_files
from bitgenome.storage.worker_limit import withdraw_limit
from workers.cluster.shared_cluster import SharedCluster
from workers.storage.folders import open_folder

log = logging.getLogger(__name__)

SCHEMA = 1
POLL_S = 0.5
PREPARED = (Stage.SEARCHING, Stage.FINISHING, Stage.FINISHED)
START_TIMEOUT_S = 6 * 3600.0  # for a run's workers, which may wait for tasks of other runs: none is stopped for them
STOP_S = 60.0  # for runs that are told to stop to write their checkpoints


@dataclass(frozen=True)
class BatchOrder:
    """Settings of how a batch is run."""

    name: str
    most: int | None = None  # runs at a time; by default as many as there are workers and CPUs
    resume: bool = False


def run_batch(runs: Sequence[BatchRun], order: BatchOrder, console: Console) -> tuple[Path, pd.DataFrame]:
    """Run everything that has no result yet, and return the batch's directory and a frame with a row per run.

    A run that fails does not stop the others. Behind a URL the directory is a mirror, sent at the start and whenever a
    run ends.

    Raises UserError for a batch that was started before, unless it is to be resumed, and for one that another process
    runs.
    """
    if not re.fullmatch(NAME, order.name):
        raise UserError(
            f"expected a batch's name of letters, digits, '.', '_' and '-', found {order.name!r}: choose it by --name"
        )
    path, location = directory_of(runs, order.name)
    if any(run.directory == path for run in runs):
        raise UserError(f"expected runs with other names than their batch's directory, found a run named {path.name}")
    states = begin(runs, path, location, order.resume)
    with Lease(location, f"the batch {location}"), mirrored(location) as mirror:
        make_directory(runs, path)
        for run in runs:
            if run.windows:
                keep_windows(run.plan, run.windows)
        if mirror:
            mirror.push()
        wait_for_orphans(path)
        for run in runs:
            withdraw_limit(run.directory, order.name)  # left by a killed process of this batch
        for state in states:
            if state.stage is Stage.FINISHED:
                complete(state.run)
        view = BatchView(states, console)

        def changed(state: RunState) -> None:
            """Show a change, and write the results whenever a run has ended."""
            said = ""
            if not state.live:
                frame = write_results(path, order.name, states)
                if mirror:
                    mirror.push()
                said = summary(frame[frame.name == state.name].to_dict("records")[0])
            view.changed(state, said)

        view.begun()
        if any(state.stage is Stage.WAITING for state in states):
            cluster = open_cluster(runs)
            try:
                with view.shown():
                    Batch(path, states, Shares(order.name, cluster, order.most), changed).run()
            finally:
                if cluster:
                    cluster.close()
        return path, write_results(path, order.name, states)


def open_cluster(runs: Sequence[BatchRun]) -> SharedCluster | None:
    """Return the cluster of all runs, or None if each run is one process. Raises ClusterError."""
    settings = runs[0].config.workers
    return None if settings.ray == "off" else SharedCluster(settings)


def directory_of(runs: Sequence[BatchRun], name: str) -> tuple[Path, str]:
    """Return the directory of the batch ``name`` on this machine, and its path or URL."""
    config, folder = runs[0].config, f"batch-{name}"
    return config.storage_path / folder, f"{config.storage_root}/{folder}"


def begin(runs: Sequence[BatchRun], path: Path, location: str, resume: bool) -> list[RunState]:
    """Return the state of every run; those that have a result are finished.

    Raises UserError for a batch that was started before and has runs left, unless ``resume``.
    """
    states = [RunState(run, path / layout.LOGS / f"{run.name}.log") for run in runs]
    for state in states:
        if state.run.finished:
            state.stage = Stage.FINISHED
    left = sum(state.stage is not Stage.FINISHED for state in states)
    if left and not resume and open_folder(location).read(layout.BATCH) is not None:
        raise UserError(
            f"expected a new batch, found {location} with {left} of {len(states)} runs unfinished: continue it with "
            "--resume, or give this one another --name"
        )
    return states


def complete(run: BatchRun) -> None:
    """Write the report of a finished run that was killed before it could."""
    if not run_files(run.location).size(layout.REPORT):
        try_report(run.location)


def make_directory(runs: Sequence[BatchRun], path: Path) -> None:
    """Create the directories of a batch, and write its record. Raises UserError if they cannot be created."""
    try:
        for folder in (layout.LOGS, layout.CONFIGS):
            (path / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to create the batch's directory {path}, found {error.strerror}") from None
    record = {
        "schema": SCHEMA,
        "runs": [{"name": r.name, "source": str(r.source), "config_digest": r.config.digest} for r in runs],
    }
    atomic_write_json(path / layout.BATCH, record)


@dataclass
class Batch:
    """Runs everything that is waiting, and calls ``changed`` with each state that changes."""

    path: Path
    states: Sequence[RunState]
    shares: Shares
    changed: Callable[[RunState], None]
    _live: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # by name of the run, the oldest first

    def run(self) -> None:
        """Go on until no run is waiting or live; an interrupt first stops the live ones in order."""
        try:
            while self._start_what_fits() or self._live:
                self._share()
                time.sleep(POLL_S)
                self._look()
        finally:
            try:
                self._stop()
            finally:
                self.shares.close()

    def _start_what_fits(self) -> bool:
        """Start runs while there is room, and return whether any was started."""
        started = False
        left = [state.run for state in self.states if state.live or state.stage is Stage.WAITING]
        while (state := self._next()) and len(self._live) < self.shares.runs_at_a_time(left):
            self._share(state)
            self._start(state)
            started = True
        return started

    def _next(self) -> RunState | None:
        """Return the first waiting run that needs no artefact which another run is preparing, or None."""
        preparing = {s.run.preparation for s in self.states if s.stage is Stage.PREPARING}
        prepared = {s.run.preparation for s in self.states if s.stage in PREPARED}
        waiting = (s for s in self.states if s.stage is Stage.WAITING)
        return next((s for s in waiting if s.run.preparation not in preparing - prepared), None)

    def _share(self, newcomer: RunState | None = None) -> None:
        """Divide the cluster's workers among the live runs and the one about to start."""
        states = [*self._live_states(), *([newcomer] if newcomer else [])]
        self.shares.give([state.run for state in states])

    def _live_states(self) -> list[RunState]:
        """Return the states of the live runs, the oldest first."""
        by_name = {state.name: state for state in self.states}
        return [by_name[name] for name in self._live]

    def _start(self, state: RunState) -> None:
        """Start the process of a run."""
        config = (self.path / layout.CONFIGS / f"{state.name}.yaml").absolute()
        atomic_write_text(config, yaml.safe_dump(settings_of(state.run), sort_keys=False))
        cluster = self.shares.cluster
        environment = {**os.environ, **(cluster.environment if cluster else {})}
        command = [sys.executable, "-m", CHILD, str(os.getpid()), "run", str(config)]
        state.begin()
        with state.log.open("ab") as stream:
            self._live[state.name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,  # Ctrl-C reaches only this process, which stops the runs in order
            )  # fmt: skip
        self.changed(state)

    def _look(self) -> None:
        """Update the live runs, and take note of those that have ended."""
        for state in self._live_states():
            code = self._live[state.name].poll()
            if code is None:
                if state.refresh():
                    self.changed(state)
                continue
            del self._live[state.name]
            self.shares.take_back(state.run.directory)
            state.end(code)
            self.changed(state)

    def _stop(self) -> None:
        """Tell live runs to stop, and wait for their checkpoints.

        A second interrupt, or a wait of more than STOP_S seconds, kills them.
        """
        if not self._live:
            return
        log.info("stopping %d runs", len(self._live))
        for process in self._live.values():
            process.terminate()
        deadline = time.monotonic() + STOP_S
        try:
            for process in self._live.values():
                process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in self._live.values():
                process.kill()
                process.wait()
        self._live.clear()


def settings_of(run: BatchRun) -> dict[str, Any]:
    """Return the configuration for a run's own process, which joins the batch's cluster and waits for its share."""
    settings: dict[str, Any] = run.config.model_dump(mode="json", exclude_none=True)
    if settings["workers"]["ray"] == "local":
        settings["workers"]["ray"] = "auto"
    if "start_timeout" not in run.config.workers.model_fields_set:
        settings["workers"]["start_timeout"] = START_TIMEOUT_S
    return settings
