"""Reads from a run's directory, or from behind its URL, what its report shows; measures nothing.

Each reading takes in only the evaluations that were appended since the last. A run of an earlier version, or one that
is not finished, lacks files and figures: what is not there is None or empty, and is left out of the report.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bitgenome.common import layout
from bitgenome.common.errors import UserError, expecting
from bitgenome.observe.run_status import RunReader, RunStatus
from bitgenome.storage.run_result import RunResult

MEASURES = ("kl", "gradient", "around_base")  # of sensitivity, in nats per token; only one was measured


class Scored(NamedTuple):
    """Holds what a figure shows of one evaluation of the search: its loss on the draw of the longest text."""

    loss: float
    draw: int
    file_bytes: int


class Measured(NamedTuple):
    """Holds what was measured of a genome on test text."""

    file_bytes: int
    kl: float
    window_kl: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivities:
    """Holds what each gene costs at each of its types: type and cost, from the smallest type on."""

    measure: str
    costs: Mapping[str, Sequence[tuple[str, float]]]  # by gene


@dataclass(frozen=True)
class RunView:
    """Holds what is known of a run."""

    status: RunStatus
    record: Mapping[str, Any]  # run.json
    result: RunResult | None  # best.json
    scored: Sequence[Scored] = ()  # of the search, on its longest text, oldest first
    tokens: int = 0  # of that text
    shorter: int = 0  # evaluations on less text
    tested: Sequence[Measured] = ()
    generations: Sequence[Mapping[str, Any]] = ()
    sensitivities: Sensitivities | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as recorded."""
        found: Mapping[str, Any] = self.record.get("config", {})
        return found

    @property
    def best(self) -> Mapping[str, Any]:
        """All of best.json; empty if there is none."""
        return self.result.model_dump() if self.result else {}

    @property
    def proof(self) -> Mapping[str, Any]:
        """What llama.cpp made of the file; empty until it has run it."""
        return (self.result and self.result.proof) or {}

    @property
    def healing(self) -> Mapping[str, Any]:
        """What healing did; empty if it was off or is to come."""
        return (self.result and self.result.healing) or {}

    @property
    def model(self) -> str:
        """Name of the model, without its folders."""
        return Path(str(self.config.get("model", "")).rstrip("/")).name or "a model"


class RunSource:
    """Reads the run at a path or URL, again and again. Raises UserError if there is none or its files are damaged."""

    def __init__(self, location: str | Path):
        self.location = str(location).rstrip("/")
        self._reader = RunReader(self.location, self._learn)
        self._files = self._reader.files
        self._scored: dict[int, list[Scored]] = {}  # by tokens of the text
        self._tested: list[Measured] = []

    def read(self, finished: bool = False) -> RunView:
        """Return what is there now. ``finished``: the caller is the run's driver, and all is written."""
        status = self._reader.read(running=finished)  # a driver's own lease is not asked for
        if status.state == "damaged":
            raise UserError(status.error or f"expected a run in {self.location}, found another")
        tokens = max(self._scored, default=0)
        content = self._files.content(layout.BEST)
        source, record = f"{self.location}/{layout.BEST}", self._files.record(layout.RECORD)
        return RunView(
            status=_ended(status, record) if finished else status,
            record=record,
            result=RunResult.parse(content, source, self.location) if content else None,
            scored=tuple(self._scored.get(tokens, ())),
            tokens=tokens,
            shorter=sum(len(scored) for count, scored in self._scored.items() if count < tokens),
            tested=tuple(self._tested),
            generations=self._generations(),
            sensitivities=sensitivities_in(self._files.content(layout.SENSITIVITY), self.location),
        )

    def _learn(self, one: Mapping[str, Any]) -> None:
        """Take in an evaluation that came since the last reading."""
        if one["split"] == "search" and one["tokens"] and one["loss"] is not None:
            scored = Scored(float(one["loss"]), int(one.get("draw", 0)), int(one["file_bytes"]))
            self._scored.setdefault(int(one["tokens"]), []).append(scored)
        if one["split"] == "test" and one["kl"] is not None:
            self._tested.append(Measured(one["file_bytes"], one["kl"], tuple(one.get("window_kl", ()))))

    def _generations(self) -> tuple[Mapping[str, Any], ...]:
        lines = self._files.content(layout.GENERATIONS).split(b"\n")[:-1]  # the last may be incomplete
        with expecting("generations", f"{self.location}/{layout.GENERATIONS}", "resume the run"):
            return tuple(json.loads(line) for line in lines)


def sensitivities_in(content: bytes, location: str) -> Sensitivities | None:
    """Return what a sensitivity.parquet holds, None without one or without a cost in nats."""
    if not content:
        return None
    import pandas as pd  # noqa: PLC0415 - slow to import; a run has imported it before

    with expecting("sensitivities", f"{location}/{layout.SENSITIVITY}", "remove it and resume the run"):
        records = pd.read_parquet(io.BytesIO(content)).to_dict("records")
        measure = next((name for name in MEASURES if records and name in records[0]), None)
        if measure is None:
            return None
        costs: dict[str, list[tuple[str, float]]] = {}
        for one in sorted(records, key=lambda one: one["choice"]):
            costs.setdefault(one["gene"], []).append((one["format"], float(one[measure])))
    return Sensitivities(measure, costs)


def _ended(status: RunStatus, record: Mapping[str, Any]) -> RunStatus:
    """Return the state of a run whose driver is about to record that it has finished, with the seconds recorded."""
    return replace(status, state="finished", error=None, seconds_left=None, seconds=record.get("stages", {}))
