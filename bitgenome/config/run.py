"""The configuration of a run: what a YAML file may say, checked before any work."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.section import Section
from bitgenome.config.file import parse_section, read_settings
from bitgenome.config.quantization import QuantizationConfig
from bitgenome.config.storage import StoredSection
from bitgenome.config.text import TextConfig, absolute_text
from evaluators.settings import Activations, Compute, HealingSettings
from quantizers.formats.table import LEVEL_FORMATS, LEVEL_PRESETS
from search.budget import parse_size
from search.fitness import FitnessSettings
from search.loop.ladder import Ladder
from search.loop.settings import SearchSettings
from workers.cluster.settings import WorkerSettings

Share = Annotated[float, Field(gt=0)]


class BudgetConfig(Section):
    """The size of the whole file, embeddings and metadata included: give exactly one."""

    bits_per_weight: float | None = Field(None, gt=0, description="bits of the file over weights of the model")
    compression_ratio: float | None = Field(None, gt=0, description="file over the model in 16 bits, e.g. 0.25")
    file_size: int | str | None = Field(None, description='bytes, or "3.2 MiB", "4.5GB"')

    @model_validator(mode="after")
    def one_of(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"expected exactly one of bits_per_weight, compression_ratio, file_size, found {found}")
        return self


class EvaluationConfig(Section):
    """How a genome is run: ``activations`` in floats, or q8, the 8-bit blocks that llama.cpp multiplies; ``compute``,
    the type that blocks multiply in while searching, auto for float32 on CPUs and bfloat16 on accelerators.
    """

    activations: Activations = "float"
    compute: Compute = "auto"
    memory: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description='bytes or "6 GiB" for a worker\'s weights and hidden states, beside what its libraries take; by '
        "default its share of what is free",
    )

    @field_validator("memory", mode="before")
    @classmethod
    def size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value


class SensitivityConfig(Section):
    """What the first additive table of a search holds, measured on ``text.tokens.sensitivity`` tokens.

    ``kl``: the KL of every gene at every level, the rest at full precision. ``gradient``: its estimate from one
    backward pass over the text, for large models. ``around_base``: what the level adds to the KL of the uniform genome
    that is nearest to the budget.
    """

    measure: Literal["kl", "gradient", "around_base"] = "kl"


class RunConfig(StoredSection):
    """One search: a model, a budget, and how to go from one to the other."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(description="Hugging Face folder or id")
    budget: BudgetConfig
    levels: tuple[str, ...] = LEVEL_PRESETS["fine"]
    text: TextConfig = TextConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    fitness: FitnessSettings = FitnessSettings()
    sensitivity: SensitivityConfig = SensitivityConfig()
    search: SearchSettings = SearchSettings()
    healing: HealingSettings = HealingSettings()
    workers: WorkerSettings = WorkerSettings()

    @field_validator("levels", mode="before")
    @classmethod
    def preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in LEVEL_PRESETS:
                raise ValueError(f"expected a list of levels or one of {', '.join(LEVEL_PRESETS)}, found {value}")
            return LEVEL_PRESETS[value]
        return value

    @field_validator("levels")
    @classmethod
    def known(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        for level in levels:
            if level not in LEVEL_FORMATS:
                raise ValueError(f"expected levels among {', '.join(LEVEL_FORMATS)}, found {level}")
        if len(set(levels)) < len(levels) or not levels:
            raise ValueError(f"expected one or more different levels, found {', '.join(levels) or 'none'}")
        return levels

    @model_validator(mode="after")
    def text_suffices(self) -> Self:
        _ = self.ladder
        return self

    @property
    def ladder(self) -> Ladder:
        """How much text the genomes of a search read. Raises ValueError if there is not as much."""
        return self.search.text_ladder(self.text.tokens.search, self.text.window)

    def result_keys(self) -> dict[str, Any]:
        """The settings that decide the result. Where it is computed and stored is not among them, nor where model and
        text lie: a run records digests of what it read there.
        """
        places: dict[str, Any] = dict.fromkeys(("workers", "storage_path", "storage_url", "name", "model"), True)
        parts = {"text": {"splits", "path", "files"}, "evaluation": {"memory"}}
        return self.model_dump(mode="json", exclude=places | parts)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.result_keys(), sort_keys=True).encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides such as ``search.generations=20``. Raises UserError with one sentence."""
    return absolute_paths(parse_config(read_settings(path, overrides), str(path)))


def absolute_paths(config: RunConfig) -> RunConfig:
    """``config`` with model folder and text files as absolute paths, so that a run can be resumed from anywhere."""
    return config.model_copy(update={"model": absolute_model(config.model), "text": absolute_text(config.text)})


def absolute_model(model: str) -> str:
    """A folder as an absolute path, a Hugging Face id as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Validate ``data``; ``source`` names it in errors. Raises UserError for the first problem."""
    return parse_section(RunConfig, data, source)
