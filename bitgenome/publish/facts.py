"""Gathers what a model card says of a finished run, and the files that go with it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import yaml

from bitgenome.common import layout
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from bitgenome.config.run import RunConfig
from bitgenome.publish.base import Base, base_of
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.run_record import PARENT
from bitgenome.storage.run_result import RunResult
from exporters.files.gguf_reader import read_gguf

WITH_IT = (
    layout.RECIPE,
    layout.RECIPE_COMMAND,
    layout.IMATRIX,
)  # published beside the GGUF
ELSEWHERE = {"name", "storage_path", "storage_url", "workers", "model", "template"}  # settings that a card leaves out


@dataclass(frozen=True)
class TypeShare:
    """Says of one GGUF type how many tensors of a file have it, and how many of its weights."""

    name: str
    tensors: int
    weights: int


@dataclass(frozen=True)
class Facts:
    """Holds what a card says of a file."""

    base: Base
    file: str
    file_bytes: int
    bits_per_weight: float
    types: tuple[TypeShare, ...]  # the most weights first
    result: RunResult
    proof: Mapping[str, Any]
    full_precision: str  # what it means
    config: RunConfig
    command: str
    files: Mapping[str, Path]  # to be published, by name


def facts_of(run: RunDirectory) -> Facts:
    """Return the facts of a finished run whose file is as it was shipped, and proved.

    Raises UserError where it is not.
    """
    again = f"bitgenome resume {run.location}"
    result = RunResult.read(run.path)
    if result is None or result.proof is None:
        raise UserError(
            f"expected a finished run whose file llama.cpp has run, found no proof in {run.location}: {again}"
        )
    gguf = run.path / result.gguf
    if not gguf.is_file() or digest_of_file(gguf) != result.gguf_sha256:
        raise UserError(
            f"expected the file that was shipped at {gguf}, found {'another' if gguf.is_file() else 'none'}: "
            f"bitgenome export {run.location} writes it again"
        )
    contents, config = read_gguf(gguf), run.config
    tensors, weights = Counter[str](), Counter[str]()
    for tensor in contents.tensors.values():
        tensors[tensor.type_name] += 1
        weights[tensor.type_name] += prod(tensor.shape)
    name = str(contents.key_values.get("general.name") or PurePath(config.model).stem)
    return Facts(
        base=base_of(config.model, name, contents.key_values),
        file=result.gguf,
        file_bytes=gguf.stat().st_size,
        bits_per_weight=result.bits_per_weight,
        types=tuple(TypeShare(kind, tensors[kind], count) for kind, count in weights.most_common()),
        result=result,
        proof=result.proof,
        full_precision=result.model_dump().get("full_precision") or "full precision",
        config=config,
        command=command_of(run, config),
        files={result.gguf: gguf} | {n: run.path / n for n in WITH_IT if (run.path / n).is_file()},
    )


def command_of(run: RunDirectory, config: RunConfig) -> str:
    """Return the command that made the file of a run."""
    parent = run.record.get(PARENT)
    if parent is None:
        return f"bitgenome run {config.name}.yaml"
    budget = config.budget
    size = f"--size {budget.file_size}" if budget.bits_per_weight is None else f"--bits {budget.bits_per_weight:g}"
    return f"bitgenome export {parent} {size}{'' if config.healing.enabled == 'off' else ' --heal'}"


def settings_text(config: RunConfig, model: str) -> str:
    """Return the settings that differ from their defaults as YAML; of paths only the last part, as a card is public."""
    given = config.model_dump(mode="json", exclude_defaults=True, exclude=ELSEWHERE)
    found = {"name": config.name, "model": model, **names_only(given)}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=100).strip()


def names_only(value: Any) -> Any:
    """Return settings with the last part of every path in place of the path."""
    if isinstance(value, dict):
        return {key: names_only(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [names_only(inner) for inner in value]
    if isinstance(value, str) and (PurePath(value).is_absolute() or "://" in value):
        return value.rstrip("/").rpartition("/")[2]
    return value
