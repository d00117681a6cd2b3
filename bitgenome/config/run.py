"""The configuration of a run: what a YAML file may say, checked before any work."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.devices import Compute
from bitgenome.config.file import Section, parse_section, read_settings
from bitgenome.config.pruning import PruningConfig
from bitgenome.config.scaling import ScalingConfig
from bitgenome.config.search import SearchConfig
from bitgenome.config.sensitivity import SensitivityConfig
from bitgenome.config.storage import StoredSection
from bitgenome.config.workers import WorkersConfig
from evaluators.data.stdlib import SPLITS
from evaluators.prepare.bank import Importance
from quantizers.formats.table import LEVEL_FORMATS, LEVEL_PRESETS
from search.budget import parse_size
from search.fitness import FitnessSettings
from search.loop.ladder import Ladder

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


class TokensConfig(Section):
    """Tokens of each split.

    Of the search text, sensitivities read the first ``sensitivity`` tokens, genomes the rungs of ``search.ladder``.
    """

    calibration: int = Field(98304, gt=0)
    sensitivity: int = Field(4096, gt=0)
    search: int = Field(8192, gt=0)
    validation: int = Field(16384, gt=0)
    test: int = Field(16384, gt=0)

    @model_validator(mode="after")
    def nested(self) -> Self:
        if self.sensitivity > self.search:
            raise ValueError(f"expected sensitivity at most search ({self.search}), found {self.sensitivity}")
        return self


class TextConfig(Section):
    """Where calibration, search, validation and test text come from; the splits are always disjoint.

    ``stdlib`` reads held-out modules of the running interpreter's standard library; ``file`` divides one text file by
    ``shares``; ``files`` names one file a split.
    """

    source: Literal["stdlib", "file", "files"] = "stdlib"
    splits: Path = Path("models/stdlib-6m/splits.json")
    path: Path | None = None
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {"calibration": 0.4, "search": 0.2, "validation": 0.2, "test": 0.2}
    )
    files: dict[str, Path] | None = None
    window: int = Field(512, ge=8, description="tokens that are read together")
    tokens: TokensConfig = TokensConfig()
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def complete(self) -> Self:
        if self.source == "file" and self.path is None:
            raise ValueError("expected text.path for source: file, found none")
        if self.source == "files" and set(self.files or {}) != set(SPLITS):
            raise ValueError(
                f"expected text.files for {', '.join(SPLITS)}, found {', '.join(self.files or {}) or 'none'}"
            )
        if set(self.shares) != set(SPLITS):
            raise ValueError(f"expected text.shares for {', '.join(SPLITS)}, found {', '.join(self.shares)}")
        return self


class QuantizationConfig(Section):
    """How the bank is built."""

    damping: float = Field(0.01, gt=0, description="of the Hessian's mean diagonal")
    upstream_level: str | None = Field(
        None, description="level of the blocks before the one that is calibrated (sequential); none: full precision"
    )
    compensation: bool = Field(True, description="spread each column's error over later ones (SparseGPT, GPTQ)")
    refinement_rounds: int = Field(2, ge=0, le=20, description="of scales and integers; twice as many if pruned")
    importance: Importance = Field("conditional", description="of the columns that a block's scales are fitted to")
    pruning: PruningConfig = Field(PruningConfig(), description="in the same pass; nothing by default")
    scaling: ScalingConfig = Field(ScalingConfig(), description="of channels, before rounding; none by default")

    @field_validator("upstream_level")
    @classmethod
    def known(cls, level: str | None) -> str | None:
        if level is not None and level not in LEVEL_FORMATS:
            raise ValueError(f"expected a level among {', '.join(LEVEL_FORMATS)}, found {level}")
        return level


class EvaluationConfig(Section):
    """How a genome is run: ``activations`` in floats, or q8, the 8-bit blocks that llama.cpp multiplies; ``compute``,
    the type that blocks multiply in while searching, auto for float32 on CPUs and bfloat16 on accelerators.
    """

    activations: Literal["float", "q8"] = "float"
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


class FitnessConfig(Section):
    """``distortion``: kl_weight * KL + reconstruction_weight * reconstruction.

    ``weighted``: alpha / MSE + beta * compression, to be maximized.
    """

    kind: Literal["distortion", "weighted"] = "distortion"
    kl_weight: float = Field(1.0, ge=0)
    reconstruction_weight: float = Field(0.0, ge=0)
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def something(self) -> Self:
        FitnessSettings(**self.model_dump())
        return self


class HealingConfig(Section):
    """Tuning of the tensors that the file keeps in float32, after the search; taken only if validation text gains."""

    enabled: Literal["auto", "on", "off"] = "auto"
    variant: Literal["full", "blockwise"] = Field("full", description="the whole model, or one block in memory")
    steps: int = Field(60, ge=1, description="of the whole model, or of each block")
    batch_tokens: int = Field(1024, ge=1, description="tokens of calibration text a step, at least one window")
    learning_rate: float | None = Field(None, gt=0, description="of Adam at its highest; by default by the divergence")
    loss: Literal["kl", "distillation"] = "kl"
    temperature: float | None = Field(None, gt=0, description="of both models' logits; 1 for kl, 4 for distillation")
    alpha: float | None = Field(None, ge=0, le=1, description="weight of the text's own next token; 0.3")
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("enabled", mode="before")
    @classmethod
    def yaml_on_off(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # a bare on or off in YAML

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.alpha is not None and self.loss == "kl":
            raise ValueError(f"expected alpha only with loss: distillation, found {self.alpha} with loss: kl")
        return self

    @property
    def chosen_temperature(self) -> float:
        return self.temperature or (1.0 if self.loss == "kl" else 4.0)

    @property
    def chosen_alpha(self) -> float:
        if self.loss == "kl":
            return 0.0
        return 0.3 if self.alpha is None else self.alpha


class RunConfig(StoredSection):
    """One search: a model, a budget, and how to go from one to the other."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(description="Hugging Face folder or id")
    budget: BudgetConfig
    levels: tuple[str, ...] = LEVEL_PRESETS["fine"]
    text: TextConfig = TextConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    fitness: FitnessConfig = FitnessConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    search: SearchConfig = SearchConfig()
    healing: HealingConfig = HealingConfig()
    workers: WorkersConfig = WorkersConfig()

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


def absolute_text(text: TextConfig) -> TextConfig:
    files = None if text.files is None else {split: path.absolute() for split, path in text.files.items()}
    found = {"splits": text.splits.absolute(), "path": text.path and text.path.absolute(), "files": files}
    return text.model_copy(update=found)


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Validate ``data``; ``source`` names it in errors. Raises UserError for the first problem."""
    return parse_section(RunConfig, data, source)
