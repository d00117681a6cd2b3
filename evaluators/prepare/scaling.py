"""Channel scaling of a whole model, folded into the tensors before each input: the same function, other weights.

The inverse scale of an input goes into the tensor that makes it: the norm before q/k/v, gate/up and an untied head, the
rows of v before o, the rows of up before down. Row factors cost nothing, as every grid is fitted row by row.
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
from bitgenome.common.files import atomic_write_bytes
from evaluators.model.families import SCALABLE
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.model.scaled_view import COLUMNS, ROWS, source_of, write_scaled_view
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.calibration import InputGroup, group_file, group_readable
from quantizers.formats.table import format_for
from quantizers.rounding.channel_scaling import SharedColumns, choose_scaling, scaled_hessian
from quantizers.settings import CompensationSettings, ScalingSettings

PRODUCERS = {  # first reader of an input -> what makes the input
    "self_attn.q_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.down_proj": "mlp.up_proj",
    "lm_head": "model.norm",
}
SCHEMA = 1  # raise when scales or the layout of their files change
SEARCH_LEVELS = ("W3", "W4")  # what AWQ's error is measured at


def check_scalable(folder: ModelFolder) -> None:
    """Raises ModelFolderError for a model type whose scales cannot be folded."""
    if folder.model_type not in SCALABLE:
        raise ModelFolderError(
            f"expected a model of type {', '.join(SCALABLE)} for quantization.scaling, found "
            f"{folder.model_type or 'none'!r}: use quantization.scaling.kind: none"
        )


def producer_of(group: str) -> str | None:
    """Module that makes the input of a group; None where nothing can: a tied or looked-up embedding."""
    for reader, producer in PRODUCERS.items():
        if group.endswith(reader):
            return group.removesuffix(reader) + producer
    return None


def shared_columns(folder: ModelFolder, group: str) -> SharedColumns:
    """Query heads of one key-value head read the same rows of v, so their columns of o share a scale."""
    if not group.endswith("self_attn.o_proj"):
        return SharedColumns()
    heads = int(folder.config["num_attention_heads"])
    repeats = heads // int(folder.config.get("num_key_value_heads") or heads)
    return SharedColumns(repeats, folder.shapes[f"{group}.weight"][1] // heads)


def scales_file(directory: Path, group: str) -> Path:
    return directory / "scales" / f"{group}.safetensors"


def scaling_done(directory: Path, group: str) -> bool:
    """Whether a group's scaled Hessian and its scales are there and whole."""
    try:
        with safe_open(scales_file(directory, group), framework="pt"):
            return group_readable(group_file(directory, group))
    except (OSError, SafetensorError):
        return False


@dataclass(frozen=True)
class ScaleGroup:
    """Pool task: choose the scales of one input group; write them, and the group as the scaled model has it."""

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
        """Where it writes."""
        return (self.directory,)

    def run(self, state: dict[Any, Any]) -> str:
        """Name of the group."""
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
    """What was chosen for a group: alpha, whether weighted, and the error relative to no scaling."""
    with safe_open(scales_file(directory, group), framework="pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    return record


def folded_factors(folder: ModelFolder, directory: Path, groups: Sequence[str]) -> dict[str, Tensor]:
    """Factors of rows and columns of every tensor that the chosen scales touch, for ``write_scaled_view``."""
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
    """1 / s on the norm, or on the rows and bias of the linear, that makes the group's input."""
    producer, shared = producer_of(group), shared_columns(folder, group)
    inverse = 1 / shared.mean(s)
    tensors = [f"{producer}.{kind}" for kind in ("weight", "bias")]
    return {tensor + ROWS: inverse for tensor in tensors if tensor in folder.shapes}


def view_done(folder: ModelFolder, directory: Path) -> bool:
    """Whether the scaled view in ``directory`` is written, and reads the weights of ``folder``."""
    return source_of(directory / layout.SCALED_MODEL) == folder.path.resolve()


def write_scaled_model(folder: ModelFolder, directory: Path, groups: Sequence[str]) -> ModelFolder:
    """The scaled view of ``folder`` in ``directory``, from the scales of all its groups."""
    path = directory / layout.SCALED_MODEL
    write_scaled_view(path, folder.path, folded_factors(folder, directory, groups))
    return ModelFolder(path)
