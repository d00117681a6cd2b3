"""Defines the configuration of a study: a model, text, and the methods to compare on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bitgenome.common.errors import UserError
from bitgenome.config.file import parse_section, read_settings
from bitgenome.config.paths import UserPathOrName
from bitgenome.config.quantization import QuantizationConfig
from bitgenome.config.run import absolute_model
from bitgenome.config.storage import Name, StoredSection
from bitgenome.config.text import TextConfig, absolute_text
from evaluators.study.catalogue import METHODS
from evaluators.study.methods import Method
from workers.cluster.settings import WorkerSettings

SWEEP = "sweep"  # key of a method: settings with a list of values each, tried in every combination


class StudyConfig(StoredSection):
    """Settings of a study, all but its methods."""

    name: Name = Field(description="name of the study and of its directory below storage_path")
    model: UserPathOrName = Field(description="Hugging Face folder or id")
    tensors: Literal["blocks", "all"] = Field("blocks", description="all: embedding and head too")
    activation_samples: int = Field(2048, ge=2, description="positions of calibration text, for mutual information")
    text: TextConfig = Field(TextConfig(), description="calibration and test text")
    quantization: QuantizationConfig = Field(QuantizationConfig(), description="damping and upstream level")
    workers: WorkerSettings = Field(WorkerSettings(), description="the Ray cluster; never changes the result")


@dataclass(frozen=True)
class Study:
    """A study's settings and its methods, with sweeps expanded."""

    config: StudyConfig
    methods: tuple[Method, ...]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study from a YAML file, with overrides such as ``text.tokens.test=4096``.

    Paths of model and text become absolute. Raises UserError (one sentence) for the first problem.
    """
    data = read_settings(path, overrides)
    if "methods" not in data:
        raise UserError(f"expected key 'methods' in {path}, found none: known kinds are {', '.join(METHODS)}")
    methods = parse_methods(data.pop("methods"), str(path))
    config = parse_section(StudyConfig, data, str(path))
    paths = {"model": absolute_model(config.model), "text": absolute_text(config.text)}
    return Study(config.model_copy(update=paths), methods)


def parse_methods(items: Any, source: str) -> tuple[Method, ...]:
    """Return the methods of a list of mappings with ``kind`` and settings; ``source`` names it in errors.

    Raises UserError for anything else, and for two methods of the same label.
    """
    if not isinstance(items, list) or not items:
        raise UserError(f"expected a list of methods in {source}, found {items!r}")
    methods = [m for i, item in enumerate(items) for m in expand(item, f"methods[{i}] of {source}")]
    labels = [method.label for method in methods]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"expected methods of different labels in {source}, found {twice!r} twice: give one a name")
    return tuple(methods)


def expand(item: Any, source: str) -> list[Method]:
    """Return one method, or one for every combination of its ``sweep``; ``source`` names it in errors.

    Raises UserError for an unknown kind, and for settings that do not fit it.
    """
    if not isinstance(item, dict) or item.get("kind") not in METHODS:
        found = item.get("kind", "none") if isinstance(item, dict) else item
        raise UserError(f"expected a kind among {', '.join(METHODS)} in {source}, found {found!r}")
    kind = METHODS[item["kind"]]
    settings = {key: value for key, value in item.items() if key != SWEEP}
    sweep = item.get(SWEEP, {})
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise UserError(f"expected sweep to give a list of values for each setting in {source}, found {sweep!r}")
    if both := sorted(sweep.keys() & settings.keys()):
        raise UserError(f"expected {both[0]} once in {source}, found it beside its sweep")
    combinations = product(*sweep.values())
    return [parse_section(kind, settings | dict(zip(sweep, values, strict=True)), source) for values in combinations]
