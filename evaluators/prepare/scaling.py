"""This module scales the input channels of a whole model, so that the same function has weights easier to quantize.

The columns of the layers that read an input are multiplied by its scales. The inverse scales are folded into the tensor
that makes the input: the norm before q/k/v, gate/up and an untied head, the rows of v before o, the rows of up before
down. Row factors cost no accuracy, as every grid is fitted row by row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save
from torch import Tensor

from bitgenome.common import layout
from bitgenome.common.devices import best_device
from bitgenome.common.errors import UserError
from bitgenome.common.files import atomic_write_bytes
from evaluators.model.families import SCALABLE
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.model.scaled_view import COLUMNS, ROWS, source_of, write_scaled_view
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.input_group import InputGroup, group_file, group_readable
from quantizers.formats.table import format_for
from quantizers.rounding.channel_scaling import SharedColumns, choose_scaling, scaled_hessian
from quantizers.settings import CompensationSettings, ScalingSettings

PRODUCERS = {  # first layer that reads an input -> module that makes the input
    "self_attn.q_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.down_proj": "mlp.up_proj",
    "lm_head": "model.norm",
}
SCHEMA = 1  # raise when scales or the layout of their files change
SEARCH_LEVELS = ("W3", "W4")  # levels at which the error of AWQ's candidates is measured


def check_scalable(folder: ModelFolder) -> None:
    """Raise ModelFolderError unless scales can be folded into models of the folder's type."""
    if folder.model_type not in SCALABLE:
        raise ModelFolderError(
            f"expected a model of type {', '.join(SCALABLE)} for quantization.scaling, found "
            f"{folder.model_type or 'none'!r}: use quantization.scaling.kind: none"
        )


def producer_of(group: str) -> str | None:
    """Return the module that makes the input of a group, into which inverse scales are folded.

    None for an embedding, tied or untied, whose input cannot be scaled.
    """
    for reader, producer in PRODUCERS.items():
        if group.endswith(reader):
            return group.removesuffix(reader) + producer
    return None


def shared_columns(folder: ModelFolder, group: str) -> SharedColumns:
    """Return which input columns of a group must share a scale.

    With grouped-query attention the query heads of one key-value head read the same rows of v, so their columns of o
    share a scale. The columns of all other groups are independent.
    """
    if not group.endswith("self_attn.o_proj"):
        return SharedColumns()
    heads = int(folder.config["num_attention_heads"])
    repeats = heads // int(folder.config.get("num_key_value_heads") or heads)
    return SharedColumns(repeats, folder.shapes[f"{group}.weight"][1] // heads)


def scales_file(directory: Path, group: str) -> Path:
    """Return the path of a group's scales in ``directory``."""
    return directory / "scales" / f"{group}.safetensors"


def scaling_done(directory: Path, group: str) -> bool:
    """Return whether the files of a group's scaled Hessian and of its scales exist and are complete."""
    try:
        with safe_open(scales_file(directory, group), framework="pt"):
            return group_readable(group_file(directory, group))
    except (OSError, SafetensorError):
        return False


@dataclass(frozen=True)
class ScaleGroup:
    """Pool task that chooses the scales of one input group and writes them, with the scaled model's input group."""

    model: Path
    group: Path  # file of the InputGroup
    directory: Path
    settings: ScalingSettings
    compensation: CompensationSettings

    @property
    def label(self) -> str:
        return f"scaling[{self.group.stem}]"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> str:
        """Write the scaled group and its scales, and return the group's name.

        A group whose input cannot be scaled is written unchanged, and its file of scales holds only the record.
        """
        folder, group = ModelFolder(self.model), InputGroup.load(self.group)
        vectors, record = {}, {"group": group.name, "alpha": 0.0, "weighted": False, "error": 1.0}
        if producer_of(group.name):
            device = best_device()
            chosen = choose_scaling(
                {name: folder.read(name).to(device, torch.float32) for name in group.tensors},
                list({format_for(level, len(group.hessian)): None for level in SEARCH_LEVELS}),
                group.hessian.to(device),
                replace(group.statistics, **{k: t.to(device) for k, t in group.statistics.tensors().items()}),
                self.settings,
                shared_columns(folder, group.name),
                self.compensation,
            )
            s = vectors["scales"] = chosen.scales.cpu()
            record |= {"alpha": chosen.alpha, "weighted": chosen.weighted, "error": chosen.error}
            group = replace(group, hessian=scaled_hessian(group.hessian, s), statistics=group.statistics.divided(s))
        group.save(group_file(self.directory, group.name))
        file = scales_file(self.directory, group.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, save(vectors, {"record": json.dumps(record)}))
        return group.name


def scaling_record(directory: Path, group: str) -> dict[str, Any]:
    """Return what was chosen for a group: ``alpha``, whether ``weighted``, and ``error`` relative to no scaling."""
    with safe_open(scales_file(directory, group), framework="pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    return record


def folded_factors(folder: ModelFolder, directory: Path, groups: Sequence[str]) -> dict[str, Tensor]:
    """Return the factors of rows and columns of all tensors that the chosen scales change, for ``write_scaled_view``.

    The keys are ``<tensor>:columns`` for tensors that read a scaled input, ``<tensor>:rows`` for those that make one.
    """
    factors: dict[str, Tensor] = {}
    for name in groups:
        s = load_file(scales_file(directory, name)).get("scales")
        if s is None:
            continue
        for tensor in group_tensors(group_file(directory, name)):
            factors[tensor + COLUMNS] = s
        factors |= producer_factors(folder, name, s)
    return factors


def producer_factors(folder: ModelFolder, group: str, s: Tensor) -> Mapping[str, Tensor]:
    """Return the factors 1 / s of the norm, or of the rows and bias of the linear layer, that makes a group's input.

    ``s`` (columns,) are the group's scales; columns that share a scale come from the same row.
    """
    producer, shared = producer_of(group), shared_columns(folder, group)
    inverse = 1 / shared.mean(s)
    tensors = [f"{producer}.{kind}" for kind in ("weight", "bias")]
    return {tensor + ROWS: inverse for tensor in tensors if tensor in folder.shapes}


def view_done(folder: ModelFolder, directory: Path) -> bool:
    """Return whether ``directory`` holds a complete scaled view that reads the weights of ``folder``."""
    view = directory / layout.SCALED_MODEL
    try:
        with safe_open(view / layout.SCALING_FACTORS, framework="pt"):
            return source_of(view) == folder.path.resolve()
    except (OSError, SafetensorError, UserError, KeyError, TypeError):
        return False


def write_scaled_model(folder: ModelFolder, directory: Path, groups: Sequence[str]) -> ModelFolder:
    """Write the scaled view of ``folder`` to ``directory``, from the scales of all ``groups``, and open it."""
    path = directory / layout.SCALED_MODEL
    write_scaled_view(path, folder.path, folded_factors(folder, directory, groups))
    return ModelFolder(path)
