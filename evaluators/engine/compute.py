"""Says what a worker's device is and in which type it multiplies, and refuses a device that cannot keep to a run's."""

from dataclasses import dataclass
from typing import Any

import torch

from bitgenome.common.devices import best_device, compute_type, device_name
from bitgenome.common.errors import UserError
from evaluators.settings import Compute


@dataclass(frozen=True)
class WorkerDevice:
    """Describes the device of a worker."""

    kind: str  # "cpu", or the accelerator's type in torch
    name: str
    compute: str  # name of the type that suits it: what ``auto`` means there


@dataclass(frozen=True)
class DescribeDevice:
    """Pool task that describes the device of the worker that runs it."""

    label: str = "device"

    def run(self, state: dict[Any, Any]) -> WorkerDevice:
        """Return the description."""
        device = best_device()
        return WorkerDevice(device.type, device_name(device), name_of(compute_type("auto", device)))


def name_of(kind: torch.dtype) -> str:
    """Return the name of a torch type without "torch."."""
    return str(kind).removeprefix("torch.")


def check_native(compute: Compute, device: torch.device) -> None:
    """Raise UserError if a run that chose ``compute`` on its first worker's device runs on one that has to emulate it.

    It would be slow there, and its results others'.
    """
    if compute not in {"float32", name_of(compute_type("auto", device))}:
        raise UserError(
            f"expected workers whose device multiplies in {compute}, as the run was begun with by evaluation.compute: "
            f"auto, found a worker on {device_name(device)}: give the run workers of one kind"
        )
