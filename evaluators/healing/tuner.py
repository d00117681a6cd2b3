"""What every variant of healing shares: its settings, the steps, the checkpoint, and a model's tensors to tune.

Shapes: n windows, T positions.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitgenome.common.files import atomic_write_bytes
from evaluators.model.block_model import BlockModel
from evaluators.settings import HealingSettings

log = logging.getLogger(__name__)

MICRO_TOKENS = 512  # positions of one gradient: their activations are kept at once, and a worker computes them
BETAS = (0.9, 0.99)  # of Adam; few steps, so the second moment must not remember longer than they last
MOMENTS = ("exp_avg", "exp_avg_sq")


def schedule(settings: HealingSettings, windows: int, window: int) -> Tensor:
    """Return (steps, batch) int64: of ``windows`` windows of ``window`` tokens, those of every step.

    Each pass over the text is in a new random order.
    """
    batch = settings.batch_windows(window)
    generator = torch.Generator().manual_seed(settings.seed)
    passes = -(-settings.steps * batch // windows)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])
    return order[: settings.steps * batch].reshape(settings.steps, batch)


class FloatTuner:
    """Adam on named parameters; what it holds between two steps is ``state``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: HealingSettings):
        self.parameters = dict(parameters)
        self.settings = settings
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, betas=BETAS)
        self.done = 0

    def step(self) -> None:
        """One step down the gradients that the parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Parameters by name, and Adam's moments by name and kind once there are any; copies on the CPU."""
        moments = {
            f"{name}:{kind}": self.optimizer.state[parameter][kind].cpu().clone()
            for name, parameter in self.parameters.items()
            for kind in MOMENTS
            if self.done
        }
        return {**self.values(), **moments}

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        """Continue from ``state`` after ``done`` steps."""
        self.done = done
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])
            if done:
                moments = {kind: state[f"{name}:{kind}"].to(parameter.device).clone() for kind in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}


@dataclass(frozen=True)
class HealingCheckpoint:
    """Tensors and a JSON record in one safetensors file, replaced atomically; one of another ``key`` does not count."""

    path: Path
    key: str  # digest of everything that decides the result

    def save(self, tensors: Mapping[str, Tensor], **record: Any) -> None:
        metadata = {"record": json.dumps({"key": self.key, **record})}
        atomic_write_bytes(self.path, save({n: t.contiguous() for n, t in tensors.items()}, metadata))

    def load(self, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (none if not wanted) and record; None if there is no file, or of something else, or damaged."""
        try:
            with safe_open(self.path, framework="pt") as file:
                record: dict[str, Any] = json.loads(file.metadata()["record"])
                if record["key"] != self.key:
                    return None
                names = file.keys() if tensors else ()
                return {name: file.get_tensor(name) for name in names}, record
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("healing starts anew: its checkpoint %s cannot be read (%s)", self.path, error)
            return None


@contextmanager
def tunable(model: BlockModel, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """The loaded parameters of those names, at copies of ``values`` and with gradients inside, as they were behind."""
    parameters = {name: model.weight(name) for name in values}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(model.device, copy=True)
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.data, parameter.grad = originals[name], None


@contextmanager
def repeatable_attention(device: torch.device) -> Iterator[None]:
    """On accelerators, the attention kernel whose gradient is the same every time; a CPU's always is."""
    if device.type == "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def micro_batches(rows: Tensor, window: int) -> tuple[Tensor, ...]:
    """``rows`` (n,) in parts of at most MICRO_TOKENS tokens, at least one window of ``window`` tokens."""
    return rows.split(max(1, MICRO_TOKENS // window))
