"""The stage between search and export: the winner's float32 tensors tuned by distillation, if that helps."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitgenome.artefacts import Track, digest_of
from bitgenome.config import HealingConfig
from bitgenome.plan import Plan
from bitgenome.run_directory import RunDirectory
from evaluators.evaluator import EvaluatorSetup
from evaluators.healing import Healed, HealingCheckpoint, HealingSettings, HealSteps, MeasureHealing
from evaluators.healing_blocks import HealBlock
from exporters.tensor_names import tensor_table
from search.errors import UserError
from search.types import Fidelity, Genome
from workers.pool import Pool, Task

log = logging.getLogger(__name__)

HEALED_FILE = "healed.safetensors"
CHECKPOINT_FILE = "healing-checkpoint.safetensors"
CHECKPOINT_STEPS = 10
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Healing:
    """The outcome: float32 tensors by Hugging Face name, none where the guard refused them, and the figures."""

    key: str  # digest of everything that decided it
    tensors: Mapping[str, Tensor]
    figures: Mapping[str, Healed]  # by split
    variant: str

    @property
    def applied(self) -> bool:
        return bool(self.tensors)

    def to_json(self) -> dict[str, Any]:
        figures = {split: asdict(healed) for split, healed in self.figures.items()}
        return {"key": self.key, "applied": self.applied, "variant": self.variant, **figures}

    def save(self, run: Path) -> None:
        HealingCheckpoint(run / HEALED_FILE, self.key).save(self.tensors, **self.to_json())

    @classmethod
    def load(cls, run: Path, key: str) -> "Healing | None":
        """What ``save`` left; None if there is nothing whole with that key."""
        found = HealingCheckpoint(run / HEALED_FILE, key).load()
        if found is None:
            return None
        tensors, record = found
        figures = {split: Healed.from_json(record[split]) for split in SPLITS}
        return cls(key, tensors, figures, record["variant"])


def float_tensors(plan: Plan) -> tuple[str, ...]:
    """Hugging Face names of the tensors that the file keeps in float32."""
    return tuple(entry.hf_name for entry in tensor_table(plan.folder) if not entry.quantizable)


def settings_of(config: HealingConfig) -> HealingSettings:
    return HealingSettings(
        **config.model_dump(include={"steps", "batch_tokens", "learning_rate", "variant", "seed"}),
        temperature=config.chosen_temperature,
        alpha=config.chosen_alpha,
    )


def heal(
    plan: Plan, setup: EvaluatorSetup, genome: Genome, run: RunDirectory, pool: Pool, track: Track
) -> Healing | None:
    """Tune the float32 tensors of ``genome``, or continue, or read what is there; None where healing is off.

    They are taken only if the divergence on validation text falls, with ``enabled: on`` as with ``auto``.
    """
    config = plan.config.healing
    if config.enabled == "off":
        return None
    settings = settings_of(config)
    digests = (plan.folder.digest, run.record["digests"]["text"], setup.bank.name)
    tokens = {split: getattr(plan.config.text.tokens, split) for split in SPLITS}
    key = digest_of(*digests, tokens, list(genome), asdict(settings))
    if done := Healing.load(run.path, key):
        return done
    checkpoint = HealingCheckpoint((run.path / CHECKPOINT_FILE).resolve(), key)
    begun = checkpoint.load(tensors=False)
    threads = begun[1]["threads"] if begun else os.cpu_count() or 1  # other threads would sum in another order
    shared = (setup, genome, float_tensors(plan), settings, checkpoint, threads)
    fidelities = tuple(Fidelity(split, tokens[split]) for split in SPLITS)
    figures = (heal_whole if settings.variant == "full" else heal_blocks)(plan, shared, fidelities, pool, track)
    trained = checkpoint.load()
    assert trained is not None, "the last task saved it"
    better = figures["validation"].better
    tensors = {name: trained[0][name] for name in float_tensors(plan)} if better else {}
    healing = Healing(key, tensors, figures, settings.variant)
    healing.save(run.path)
    checkpoint.path.unlink()
    log.log(logging.INFO if better or config.enabled == "auto" else logging.WARNING, verdict(healing))
    return healing


Shared = tuple[EvaluatorSetup, Genome, tuple[str, ...], HealingSettings, HealingCheckpoint, int]
Figures = dict[str, Healed]


def one_after_another(pool: Pool, tasks: Sequence[Task]) -> Iterator[Any]:
    """Results of tasks that each begin where the one before ended."""
    for task in tasks:
        yield from pool.map([task])


def heal_whole(plan: Plan, shared: Shared, fidelities: Sequence[Fidelity], pool: Pool, track: Track) -> Figures:
    """Train with the whole model in memory, then measure."""
    setup, genome, names, settings, checkpoint, _ = shared
    stops = [*range(CHECKPOINT_STEPS, settings.steps, CHECKPOINT_STEPS), settings.steps]
    steps = [HealSteps(*shared, stop) for stop in stops]
    for _ in track(one_after_another(pool, steps), len(steps), "healing"):
        pass
    measures = [MeasureHealing(setup, genome, names, checkpoint, fidelity) for fidelity in fidelities]
    measured = track(pool.map(measures), len(measures), "measuring what healing did")
    return {fidelity.split: healed for fidelity, healed in zip(fidelities, measured, strict=True)}


def heal_blocks(plan: Plan, shared: Shared, fidelities: Sequence[Fidelity], pool: Pool, track: Track) -> Figures:
    """Train and measure with one block in memory."""
    parts = int(plan.folder.config["num_hidden_layers"]) + 1  # the last is the output norm
    tasks = [HealBlock(*shared, tuple(fidelities), part) for part in range(parts)]
    *_, figures = track(one_after_another(pool, tasks), len(tasks), "healing blocks")
    return figures


def verdict(healing: Healing) -> str:
    """One sentence for the log and the closing table."""
    figures = healing.figures["validation"]
    after = "no finite logits" if figures.after is None else f"{figures.after.kl:.5f}"
    outcome = "applied" if healing.applied else "refused, the file is as searched"
    return f"Healing ({healing.variant}) {outcome}: KL on validation text {figures.before.kl:.5f} before, {after} after"


def shipped_healing(run: Path, best: Mapping[str, Any]) -> Healing | None:
    """What belongs in the file of a finished run whose record is ``best``; None if healing was not applied.

    Raises UserError if the run's artefact is missing or damaged.
    """
    record = best.get("healing")
    if not record or not record["applied"]:
        return None
    healing = Healing.load(run, record["key"])
    if healing is None or not healing.applied:
        raise UserError(
            f"expected the tuned tensors in {run / HEALED_FILE}, found none that can be read: bitgenome resume {run}"
        )
    return healing
