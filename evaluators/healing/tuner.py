"""Tools that all variants of healing share: the schedule of windows, the optimizer, checkpoints and tunable tensors.

Shapes: n windows, T positions.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitgenome.common.files import replacing
from evaluators.healing.scales import divided
from evaluators.model.block_model import BlockModel
from evaluators.settings import SCALE_RATE, HealingSettings

log = logging.getLogger(__name__)

MICRO_TOKENS = 512  # tokens of one backward pass, whose activations are in memory at once; also those of one pool task
BETAS = (0.9, 0.99)  # of Adam; there are few steps, so the second moment must not average over more of them
MOMENTS = ("exp_avg", "exp_avg_sq")


def schedule(settings: HealingSettings, windows: int, window: int) -> Tensor:
    """Return the window indices of every step, int64 (steps, batch).

    The text has ``windows`` windows of ``window`` tokens; each pass over it is in a new random order.
    """
    batch = settings.batch_windows(window)
    generator = torch.Generator().manual_seed(settings.seed)
    passes = -(-settings.steps * batch // windows)
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])
    return order[: settings.steps * batch].reshape(settings.steps, batch)


class Tuner:
    """Runs Adam on named parameters with the learning rates of ``settings``; ``state`` is what to checkpoint."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: HealingSettings):
        self.parameters = dict(parameters)
        self.settings = settings
        floats, factors = divided(self.parameters)
        groups = [{"params": list(some.values()), "of_rate": of} for some, of in ((floats, 1.0), (factors, SCALE_RATE))]
        self.optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=0.0, betas=BETAS)
        self.done = 0

    def step(self) -> None:
        """Take one step with the gradients that the parameters hold, then drop them."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["of_rate"] * self.settings.rate(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def values(self) -> dict[str, Tensor]:
        """Return copies of the parameters on the CPU, by name."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Return copies on the CPU of the parameters and, after the first step, of Adam's moments under "name:kind"."""
        moments = {
            f"{name}:{kind}": self.optimizer.state[parameter][kind].cpu().clone()
            for name, parameter in self.parameters.items()
            for kind in MOMENTS
            if self.done
        }
        return {**self.values(), **moments}

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        """Restore ``state``, which was saved after ``done`` steps."""
        self.done = done
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])
            if done:
                moments = {kind: state[f"{name}:{kind}"].to(parameter.device).clone() for kind in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}


@dataclass(frozen=True)
class HealingCheckpoint:
    """Stores tensors and a JSON record in one safetensors file, which is replaced atomically.

    A file that was saved with another ``key`` is treated as missing.
    """

    path: Path
    key: str  # digest of everything that decides the result

    def save(self, tensors: Mapping[str, Tensor], **record: Any) -> None:
        """Replace the file by ``tensors`` and ``record``, whose values must be JSON; no tensor is copied.

        Raises StorageError if the disk is full or cannot be written.
        """
        metadata = {"record": json.dumps({"key": self.key, **record})}
        with replacing(self.path) as temporary:
            try:
                save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata)
            except SafetensorError as error:  # the system's own error, in words
                code = re.search(r"os error (\d+)", str(error))
                raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from None
            with temporary.open("rb") as written:  # a new file, which ``replacing`` does not know
                os.fsync(written.fileno())

    def load(self, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and record, or None if the file is missing, damaged or has another key.

        With ``tensors=False`` only the record is read. A damaged file is logged as a warning.
        """
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
    """Make loaded parameters trainable inside the context, and restore their values at exit.

    Yields the parameters named in ``values`` by name, set to copies of these values.
    """
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
    """Use the attention kernel with a deterministic gradient on accelerators; the CPU's kernels always have one."""
    if device.type == "cpu":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def micro_batches(rows: Tensor, window: int) -> tuple[Tensor, ...]:
    """Split window indices ``rows`` (n,) into parts of at most MICRO_TOKENS tokens, or one ``window``-token window."""
    return rows.split(max(1, MICRO_TOKENS // window))
