"""Runs a study from configuration to report: calibration as in a run, then each method measured once and kept."""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.errors import UserError, expecting
from bitgenome.common.files import atomic_write_bytes, atomic_write_json, cut_torn_tail
from bitgenome.config.study import Study, StudyConfig
from bitgenome.observe.progress import Track, tracker
from bitgenome.plan.text import check_text, ready_windows
from bitgenome.run.calibration import calibrate, sample_activations
from bitgenome.run.session import open_session
from bitgenome.run.writing import written_windows
from bitgenome.storage.lease import Lease
from bitgenome.storage.mirror import RunMirror, mirrored
from bitgenome.storage.opened import note_model, open_model
from bitgenome.study.grouping_report import costs, write_grouping_report
from bitgenome.study.report import write_report
from evaluators.data.windows import TokenWindows
from evaluators.model.checks import check_model
from evaluators.model.folder import ModelFolder
from evaluators.prepare.activation_samples import sample_positions
from evaluators.study.bench import MeasureMethod, MethodResult, StudySetup
from evaluators.study.layer import LayerRecord
from evaluators.study.methods import Method
from evaluators.study.mutual_information import MutualInformation
from exporters.metadata.tensor_names import quantizable_tensors
from search.types import Fidelity
from workers.pool.base import Pool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyPlan:
    """Holds a study that can be run: its model exists and its text fits."""

    study: Study
    folder: ModelFolder

    @property
    def config(self) -> StudyConfig:
        """Settings of the study."""
        return self.study.config

    @property
    def path(self) -> Path:
        """Directory of the study."""
        return self.config.storage_path / self.config.name


def plan_study(study: Study) -> StudyPlan:
    """Check model, architecture, methods and text, and return the plan.

    Raises UserError for the first that does not fit.
    """
    folder = open_model(study.config)
    check_model(folder)
    columns = min(shape[-1] for shape in quantizable_tensors(folder).values())
    for method in study.methods:
        try:
            method.check(columns)
        except ValueError as error:
            raise UserError(f"{method.label}: {error}") from None
    check_text(study.config.text, folder)
    plan = StudyPlan(study, folder)
    if (plan.path / layout.RECORD).is_file():
        raise UserError(f"expected a directory for a study, found a run at {plan.path}: choose another name")
    return plan


class ResultsLog:
    """Keeps results by digest of method, model, text and damping, one JSON line each, appended as they come."""

    def __init__(self, path: Path):
        self.path = path
        cut_torn_tail(path)
        lines = path.read_bytes().splitlines() if path.is_file() else []
        with expecting("results of a study, a line each", path, "remove what is damaged: it is measured again"):
            self.found = {record["digest"]: result_of(record["result"]) for record in map(json.loads, lines)}

    def append(self, digest: str, result: MethodResult) -> None:
        """Keep one result."""
        self.found[digest] = result
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"digest": digest, "result": result.to_json()}) + "\n")


def result_of(record: dict[str, Any]) -> MethodResult:
    """Return the result in a JSON record."""
    layers = [{**r, "channels": {int(b): n for b, n in r["channels"].items()}} for r in record["layers"]]
    return MethodResult(**record | {"layers": tuple(LayerRecord(**r) for r in layers)})


def run_study(study: Study, console: Console) -> tuple[Path, list[MethodResult]]:
    """Measure every method that has no result yet, write tables and picture, and return the directory and all results.

    Raises UserError for what the user can fix, and TaskError or WorkersLostError if the workers fail.
    """
    plan = plan_study(study)
    ready = ready_windows(plan)  # before there is a directory: text that is too short leaves nothing behind
    if any(method.needs_samples for method in study.methods):
        text = study.config.text
        sample_positions(max(1, text.tokens.calibration // text.window), text.window, study.config.activation_samples)
    location = f"{study.config.storage_root}/{study.config.name}"
    with (
        Lease(location, f"the study {location}") as lease,
        mirrored(location) as mirror,
        open_session(study.config, plan.folder, plan.path) as pool,
    ):
        note_model(study.config, plan.folder)
        track = tracker(console)
        windows = written_windows(plan, ready, pool, track, lambda stage: nullcontext())
        return plan.path, StudyRun(plan, windows, pool, track, lease, mirror).results()


@dataclass(frozen=True)
class StudyRun:
    """Runs a study over a pool."""

    plan: StudyPlan
    windows: TokenWindows
    pool: Pool
    track: Track
    lease: Lease
    mirror: RunMirror | None  # None: storage is a local directory

    @cached_property
    def setup(self) -> StudySetup:
        """What workers need to measure methods; calibrates unless an earlier run or study did."""
        plan, config = self.plan, self.plan.config
        plan.folder.check_values()
        windows_file = (plan.path / layout.WINDOWS).resolve()
        atomic_write_bytes(windows_file, self.windows.to_bytes())
        calibration, groups = calibrate(plan, self.windows, self.pool, self.track)
        fidelity = Fidelity("test", config.text.tokens.test)
        damping, whole = config.quantization.damping, config.tensors == "all"
        samples = None
        if any(method.needs_samples for method in plan.study.methods):
            count = config.activation_samples
            samples = sample_activations(plan, calibration, groups, windows_file, count, self.pool, self.track)
        key = digest_of(plan.folder.digest, calibration.name, self.windows.digest, asdict(fidelity), damping, whole)
        return StudySetup(
            plan.folder.path, calibration, tuple(groups), windows_file, fidelity, damping, whole, samples, key
        )

    def results(self) -> list[MethodResult]:
        """Measure the missing methods, write the report, and return all results in the order of the methods."""
        archive = ResultsLog(self.plan.path / layout.STUDY_RESULTS)
        wanted = {self.digest(method): method for method in self.plan.study.methods}
        missing = {digest: method for digest, method in wanted.items() if digest not in archive.found}
        if done := len(wanted) - len(missing):
            log.info("%d of %d methods are measured already", done, len(wanted))
        tasks = [MeasureMethod(self.setup, method) for method in missing.values()]
        answers = self.track(self.pool.map(tasks), len(tasks), "measuring methods")
        for digest, result in zip(missing, answers, strict=True):
            self.lease.check()
            archive.append(digest, result)
            if self.mirror is not None:
                self.mirror.push()
            log.info("%s: %.3f bits, KL %.5f", result.label, result.average_bits, result.kl)
        results = [archive.found[digest] for digest in wanted]
        atomic_write_json(self.plan.path / layout.STUDY, self.record())
        write_report(self.plan.path, self.plan.config, results, self.grouping_section(results))
        return results

    def grouping_section(self, results: list[MethodResult]) -> str:
        """Return Markdown, with pictures, of the first method of mutual information, or "" if there is none."""
        grouped = [method for method in self.plan.study.methods if isinstance(method, MutualInformation)]
        if not grouped:
            return ""
        return "\n".join(["", write_grouping_report(self.plan.path, self.setup, grouped[0]), *costs(results)])

    def digest(self, method: Method) -> str:
        """Return the digest by which a method's result is kept."""
        samples = [self.plan.config.activation_samples] if method.needs_samples else []
        return digest_of(self.setup.key, method.model_dump(mode="json"), *samples)

    def record(self) -> dict[str, Any]:
        """Return configuration and digests, for study.json."""
        return {
            "config": self.plan.config.model_dump(mode="json"),
            "methods": [method.model_dump(mode="json") for method in self.plan.study.methods],
            "model": self.plan.folder.digest,
            "text": self.windows.digest,
        }
