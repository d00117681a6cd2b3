"""Tuning the float32 tensors of a quantized model (norms, biases) by distillation; every packed tensor stays as it is.

A pool task does some steps, from a checkpoint to a checkpoint, so that progress shows, a lost worker costs little, and
an interrupted training ends in the same bits. Shapes: B windows, T positions, D hidden size.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluators.block_model import BlockModel
from evaluators.devices import computing_with
from evaluators.distillation import DistillationLoss
from evaluators.divergence import Divergence
from evaluators.evaluator import EvaluatorSetup, GenomeEvaluator, warm_evaluator
from evaluators.simulated import final_hidden, genome_formats
from search.files import atomic_write_bytes
from search.types import Fidelity, Genome

log = logging.getLogger(__name__)

MICRO_TOKENS = 1024  # positions whose activations are kept at once
WARM_UP = 0.05  # of all steps, at a learning rate that rises linearly
BETAS = (0.9, 0.99)  # of Adam; few steps, so the second moment must not remember longer than they last
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class HealingSettings:
    """How the tensors are tuned; ``steps`` of ``batch_tokens`` tokens, those of each block in the blockwise variant."""

    steps: int = 60
    batch_tokens: int = 1536
    learning_rate: float = 0.01
    temperature: float = 1.0
    alpha: float = 0.0  # weight of the text's own next token
    variant: Literal["full", "blockwise"] = "full"
    seed: int = 0

    @property
    def loss(self) -> DistillationLoss:
        return DistillationLoss(self.temperature, self.alpha)

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: a linear rise, then half a cosine down to zero."""
        rise = max(1, round(WARM_UP * self.steps))
        return self.learning_rate * min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batch_windows(self, window: int) -> int:
        """Windows of ``window`` tokens in one step."""
        return max(1, self.batch_tokens // window)

    def schedule(self, windows: int, window: int) -> Tensor:
        """(steps, batch) int64: the windows of every step; each pass over the text is in a new random order."""
        batch = self.batch_windows(window)
        generator = torch.Generator().manual_seed(self.seed)
        passes = -(-self.steps * batch // windows)
        order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(passes)])
        return order[: self.steps * batch].reshape(self.steps, batch)


class FloatTuner:
    """Adam on the parameters of a loaded model; what it holds between two steps is ``state``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: HealingSettings):
        self.parameters = dict(parameters)
        self.settings = settings
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, betas=BETAS)
        self.done = 0

    def step(self, losses: Iterable[Tensor]) -> float:
        """One step down the sum of ``losses``, each differentiated before the next is computed; returns the sum."""
        total = 0.0
        for loss in losses:
            loss.backward()
            total += float(loss.detach())
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return total

    def state(self) -> dict[str, Tensor]:
        """Parameters by name and Adam's moments by name and kind, copies on the CPU."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[name] = parameter.detach().cpu().clone()
            for kind in MOMENTS:
                tensors[f"{name}:{kind}"] = self.optimizer.state[parameter][kind].cpu().clone()
        return tensors

    def load(self, state: Mapping[str, Tensor], done: int) -> None:
        """Continue from ``state`` after ``done`` steps."""
        self.done = done
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])
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
def tunable(model: BlockModel, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The loaded parameters ``names``, free to change inside and back at their values behind."""
    parameters = {name: model.weight(name) for name in names}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.clone()
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


def tune(tuner: FloatTuner, schedule: Tensor, stop: int, loss_of: Callable[[Tensor], Tensor], window: int) -> None:
    """Steps up to ``stop``; ``loss_of`` is the mean loss of some windows (n,), which have ``window`` tokens."""
    for step in range(tuner.done, stop):
        rows = schedule[step]
        tuner.step(loss_of(part) * (len(part) / len(rows)) for part in micro_batches(rows, window))


@dataclass(frozen=True)
class HealSteps:
    """Pool task: steps of the full variant up to ``stop``, with every core of its machine, as nothing else runs."""

    setup: EvaluatorSetup
    genome: Genome
    names: tuple[str, ...]  # Hugging Face names of the float32 tensors
    settings: HealingSettings
    checkpoint: HealingCheckpoint
    threads: int
    stop: int

    @property
    def label(self) -> str:
        return f"heal[{self.stop}/{self.settings.steps}]"

    def run(self, state: dict[Any, Any]) -> int:
        """Steps done."""
        evaluator = warm_evaluator(self.setup, state)
        with computing_with(self.threads), repeatable_attention(evaluator.block_model.device):
            return self.advance(evaluator)

    def advance(self, evaluator: GenomeEvaluator) -> int:
        model, simulated = evaluator.block_model, evaluator.simulated
        ids = torch.from_numpy(evaluator.windows.windows["calibration"])
        schedule = self.settings.schedule(*ids.shape)
        tensors, record = self.checkpoint.load() or ({}, {"steps": 0})
        done = int(record["steps"])
        if done >= self.stop:
            return done
        used = schedule[done : self.stop].unique()
        simulated.set_formats({})
        reference = dict(zip(used.tolist(), final_hidden(model, ids[used]).clone(), strict=True))
        reference_head = simulated.full_weight(model.head_name)
        simulated.set_formats(genome_formats(evaluator.space, self.genome))
        with tunable(model, self.names) as parameters:
            tuner = FloatTuner(parameters, self.settings)
            if done:
                tuner.load(tensors, done)

            def loss_of(rows: Tensor) -> Tensor:
                hidden = model.run_from(0, model.embed(ids[rows]))
                target = torch.stack([reference[row] for row in rows.tolist()])
                loss = self.settings.loss
                return loss(hidden, model.head_weight.detach(), target, reference_head, ids[rows].to(model.device))

            tune(tuner, schedule, self.stop, loss_of, ids.shape[1])
            self.checkpoint.save(tuner.state(), steps=tuner.done, threads=self.threads)
        return self.stop


@dataclass(frozen=True)
class Healed:
    """What healing did on one split: divergences from the full-precision model; None where they are not finite."""

    before: Divergence
    after: Divergence | None

    @classmethod
    def measured(cls, before: Callable[[], Divergence], after: Callable[[], Divergence]) -> "Healed":
        """Both divergences, measured in this order. Raises FloatingPointError if the first is not finite."""
        found = before()
        try:
            return cls(found, after())
        except (FloatingPointError, OverflowError):  # of the KL, of the perplexity
            return cls(found, None)

    @property
    def better(self) -> bool:
        return self.after is not None and self.after.kl < self.before.kl

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Healed":
        after = record["after"]
        return cls(Divergence(**record["before"]), None if after is None else Divergence(**after))


@dataclass(frozen=True)
class MeasureHealing:
    """Pool task: divergence of a genome with the model's own float32 tensors and with the tuned ones."""

    setup: EvaluatorSetup
    genome: Genome
    names: tuple[str, ...]
    checkpoint: HealingCheckpoint
    fidelity: Fidelity

    @property
    def label(self) -> str:
        return f"healed[{self.fidelity.split}]"

    def run(self, state: dict[Any, Any]) -> Healed:
        evaluator = warm_evaluator(self.setup, state)
        formats = genome_formats(evaluator.space, self.genome)
        saved = self.checkpoint.load()
        assert saved is not None, "measured after the last step"
        evaluator.reference(self.fidelity)  # of the model's own tensors, so outside of ``tunable``

        def after() -> Divergence:
            with tunable(evaluator.block_model, self.names) as parameters:
                for name, parameter in parameters.items():
                    parameter.data.copy_(saved[0][name])
                return evaluator.divergence(formats, self.fidelity)

        return Healed.measured(lambda: evaluator.divergence(formats, self.fidelity), after)
