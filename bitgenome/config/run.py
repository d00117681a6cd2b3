"""Defines the configuration of a run: what its YAML file may hold, validated before any work."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.section import Section
from bitgenome.config.export import ExportConfig
from bitgenome.config.file import parse_section, read_settings
from bitgenome.config.paths import UserPath, UserPathOrName, expanded
from bitgenome.config.quantization import QuantizationConfig
from bitgenome.config.storage import Name, StoredSection
from bitgenome.config.text import TextConfig, absolute_text
from evaluators.settings import Activations, Compute, HealingSettings
from quantizers.formats.table import LEVEL_PRESETS, level_named
from search.budget import parse_size
from search.fitness import FitnessSettings
from search.loop.ladder import Ladder
from search.loop.settings import SearchSettings
from workers.cluster.settings import WorkerSettings


class BudgetConfig(Section):
    """Settings of the size of the whole file, embeddings and metadata included; exactly one is given."""

    bits_per_weight: float | None = Field(None, gt=0, description="bits of the file over weights of the model")
    compression_ratio: float | None = Field(None, gt=0, description="file over the model in 16 bits, e.g. 0.25")
    file_size: int | str | None = Field(None, description='bytes, or "3.2 MiB", "4.5GB"')

    @model_validator(mode="after")
    def one_of(self) -> Self:
        """Raise ValueError unless exactly one size is given."""
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"expected exactly one of bits_per_weight, compression_ratio, file_size, found {found}")
        return self


class EvaluationConfig(Section):
    """Settings of how a genome is evaluated.

    ``activations``: in floats, q8, the 8-bit blocks that llama.cpp multiplies, or auto, which measures whether they
    matter. ``compute``: the type in which blocks
    multiply during the search; auto is float32 on CPUs and bfloat16 on accelerators.
    """

    activations: Activations = Field(
        "auto",
        description="inputs of products: float, q8 (the 8-bit blocks that llama.cpp multiplies), or auto, which is q8 "
        "where they change the KL of a uniform genome by more than 2 %",
    )
    compute: Compute = Field(
        "auto", description="type of the search's products; auto: float32 on CPUs, bfloat16 on accelerators"
    )
    memory: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description='bytes or "6 GiB" for a worker\'s weights and hidden states, beside what its libraries take; by '
        "default its share of what is free",
    )

    @field_validator("memory", mode="before")
    @classmethod
    def size(cls, value: Any) -> Any:
        """Return a size given as text, such as 6 GiB, in bytes."""
        return parse_size(value) if isinstance(value, str) else value


class SensitivityConfig(Section):
    """Settings of the first additive table of a search, measured on ``text.tokens.sensitivity`` tokens.

    - ``kl``: the KL of every gene at every level, with all other genes at full precision.
    - ``gradient``: an estimate of that KL from one backward pass over the text, for large models.
    - ``around_base``: what the level adds to the KL of the uniform genome that is nearest to the budget.
    """

    measure: Literal["kl", "gradient", "around_base"] = Field(
        "kl", description="KL, its estimate from gradients, or KL around a uniform genome"
    )


class RunConfig(StoredSection):
    """Configuration of a run: a model, a budget, and how to search for a genome within it."""

    name: Name = Field(description="name of the run and of its directory below storage_path")
    model: UserPathOrName = Field(description="Hugging Face folder or id, or a GGUF file")
    template: UserPath | None = Field(
        None,
        description="a GGUF file of the model in F16, BF16 or F32, made by `bitgenome convert`: the run's file is as "
        "this one, but for the bytes of what is searched; a GGUF model in floats is its own",
    )
    budget: BudgetConfig = Field(description="largest size of the file")
    levels: tuple[str, ...] = Field(
        LEVEL_PRESETS["fine"],
        description="levels that a tensor may take: fine, classic, all, or a list such as [W2, W4, W8], also by names "
        "of GGUF types, such as [Q2_K, Q4_K, Q8_0]",
    )
    text: TextConfig = Field(TextConfig(), description="calibration, search, validation and test text")
    quantization: QuantizationConfig = Field(QuantizationConfig(), description="rounding, pruning and channel scaling")
    evaluation: EvaluationConfig = Field(
        EvaluationConfig(), description="activations, number type and memory of evaluations"
    )
    fitness: FitnessSettings = Field(FitnessSettings(), description="the loss that the search minimizes")
    sensitivity: SensitivityConfig = Field(
        SensitivityConfig(), description="how each tensor's cost at each level is measured"
    )
    search: SearchSettings = Field(SearchSettings(), description="strategy, its settings, and the text it reads")
    healing: HealingSettings = Field(HealingSettings(), description="of norms and block scales, after the search")
    export: ExportConfig = Field(ExportConfig(), description="the file; never changes the result")
    llamacpp_mix: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether llama.cpp's own file of the nearest size is made and measured beside the run's; auto: for "
        "models of up to 250 million weights; never changes the result",
    )
    workers: WorkerSettings = Field(WorkerSettings(), description="the Ray cluster; never changes the result")

    @field_validator("llamacpp_mix", mode="before")
    @classmethod
    def word(cls, value: Any) -> Any:
        """Return on or off for true or false, which is how YAML reads these words."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("levels", mode="before")
    @classmethod
    def preset(cls, value: Any) -> Any:
        """Return the levels of a preset that is given by name. Raises ValueError for an unknown name."""
        if isinstance(value, str):
            if value not in LEVEL_PRESETS:
                raise ValueError(f"expected a list of levels or one of {', '.join(LEVEL_PRESETS)}, found {value}")
            return LEVEL_PRESETS[value]
        return value

    @field_validator("levels")
    @classmethod
    def known(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        """Return the levels that are given by their own names or by those of GGUF types.

        Raises ValueError for an unknown level, a repeated one, or none at all.
        """
        found = tuple(map(level_named, levels))
        if len(set(found)) < len(found) or not found:
            raise ValueError(f"expected one or more different levels, found {', '.join(levels) or 'none'}")
        return found

    @model_validator(mode="after")
    def text_suffices(self) -> Self:
        """Raise ValueError if the ladder does not fit the search text."""
        _ = self.ladder
        return self

    @model_validator(mode="after")
    def hessians_suffice(self) -> Self:
        """Raise ValueError if Hessians are to be removed that are read again."""
        if self.quantization.keep_hessians is False and self.reads_hessians_again:
            reader = "quantization.scaling" if self.quantization.scaling.active else "search.mutation_prior"
            raise ValueError(f"expected quantization.keep_hessians auto or true with {reader}, found false")
        return self

    @property
    def reads_hessians_again(self) -> bool:
        """Whether another stage than calibration and bank reads the Hessians."""
        return self.quantization.scaling.active or self.search.mutation_prior != "none"

    @property
    def ladder(self) -> Ladder:
        """The rungs of text on which genomes are evaluated. Raises ValueError if they do not fit the search text."""
        return self.search.text_ladder(self.text.tokens.search, self.text.window)

    def result_keys(self) -> dict[str, Any]:
        """Return the settings that decide the result, as JSON values.

        Where the run is computed and stored is left out. So are the paths of model, template and text: a run records
        digests of what it read there. Of the mixes that a search starts from their names count.
        """
        places: dict[str, Any] = dict.fromkeys(
            ("workers", "storage_path", "storage_url", "name", "model", "template", "export", "llamacpp_mix"),
            True,
        )
        parts = {"evaluation": {"memory"}, "quantization": {"keep_hessians", "imatrix"}, "search": {"seeds"}}
        keys = self.model_dump(mode="json", exclude=places | parts) | {"text": self.text.result_keys()}
        if self.search.seeds:
            keys["search"]["seeds"] = [PurePath(seed).name for seed in self.search.seeds]
        return keys

    @property
    def digest(self) -> str:
        """The sha256 (hexadecimal) of ``result_keys``."""
        return hashlib.sha256(json.dumps(self.result_keys(), sort_keys=True).encode()).hexdigest()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration from a YAML file, with overrides such as ``search.generations=20``.

    Paths of model and text become absolute. Raises UserError (one sentence) for the first problem.
    """
    return absolute_paths(parse_config(read_settings(path, overrides), str(path)))


def absolute_paths(config: RunConfig) -> RunConfig:
    """Return ``config`` with absolute paths, so that a run can be resumed from any directory."""
    found = {"model": absolute_model(config.model), "text": absolute_text(config.text)}
    found |= {"template": config.template and config.template.absolute()}
    seeds = tuple(absolute_seed(seed) for seed in config.search.seeds)
    found |= {"search": config.search.model_copy(update={"seeds": seeds})}
    return config.model_copy(update=found | {"quantization": config.quantization.absolute()})


def absolute_model(model: str) -> str:
    """Return the absolute path of a model's directory or file; anything else, such as an id, as it is."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def absolute_seed(seed: str) -> str:
    """Return the absolute path of a recipe or run to start from; anything else, such as a run's name, as it is."""
    path = expanded(Path(seed))
    return str(path.absolute()) if path.exists() else seed


def parse_config(data: dict[str, Any], source: str) -> RunConfig:
    """Return ``data`` as a run's configuration; ``source`` names it in errors.

    Raises UserError for the first problem.
    """
    return parse_section(RunConfig, data, source)
