"""Tunes the winner's float32 tensors and block scales by distillation, and keeps them if that helps."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.common.errors import UserError
from bitgenome.observe.progress import Track
from bitgenome.plan.memory import healing_variant, stage_healing
from bitgenome.plan.plan import Plan
from bitgenome.storage.run_directory import RunDirectory
from evaluators.engine.evaluator import EvaluatorSetup
from evaluators.healing.blocks import HealBlock
from evaluators.healing.memory import MeasureRoom
from evaluators.healing.scales import ScaledBank, divided, multipliers
from evaluators.healing.tuner import HealingCheckpoint
from evaluators.healing.whole import Healed, MeasureHealing, WholeHealing
from evaluators.model.sizes import ModelShape
from evaluators.prepare.bank import Bank
from search.types import Evaluation, Fidelity
from workers.pool.base import Pool

log = logging.getLogger(__name__)

Trained = tuple[dict[str, Tensor], dict[str, Healed]]  # tuned values by name, figures by split

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Healing:
    """Holds the outcome: tuned values, and the figures before and after.

    There are no values if they were refused because the KL on validation text did not fall.
    """

    key: str  # digest of everything that decided it
    values: Mapping[str, Tensor]  # float32 tensors by Hugging Face name, and multipliers of scales
    figures: Mapping[str, Healed]  # by split
    variant: str

    @property
    def applied(self) -> bool:
        """Whether the tuned values go into the file."""
        return bool(self.values)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the tuned values as JSON values."""
        figures = {split: asdict(healed) for split, healed in self.figures.items()}
        scales = bool(divided(self.values)[1])
        return {"key": self.key, "applied": self.applied, "scales": scales, "variant": self.variant, **figures}

    def save(self, run: Path) -> None:
        """Write values and figures into the run directory ``run``."""
        HealingCheckpoint(run / layout.HEALED, self.key).save(self.values, **self.to_json())

    @classmethod
    def load(cls, run: Path, key: str) -> "Healing | None":
        """Return what ``save`` wrote, or None if there is no complete file with that key."""
        found = HealingCheckpoint(run / layout.HEALED, key).load()
        if found is None:
            return None
        values, record = found
        figures = {split: Healed.from_json(record[split]) for split in SPLITS}
        return cls(key, values, figures, record["variant"])


def float_tensors(plan: Plan) -> tuple[str, ...]:
    """Return the Hugging Face names of the tensors that the file keeps in float32."""
    return plan.file.float_names


def decide_variant(plan: Plan, run: RunDirectory, pool: Pool) -> str:
    """Return the variant of healing, decided once for a run: by settings or a worker's memory; or "off".

    It decides the result, so a resumed run keeps to it. Raises UserError for a configured ``full`` that does not fit.
    """
    if plan.config.healing.enabled == "off":
        return "off"

    def decide() -> str:
        ((free, kind),) = pool.map([MeasureRoom()])
        limit, device = plan.config.evaluation.memory or free, torch.device(kind)
        variant = healing_variant(plan, limit, device)
        if plan.config.healing.variant == "auto" and variant == "blockwise":
            whole = stage_healing(plan, "full", device)
            log.info(
                "healing goes block by block: the whole model takes %.2f GiB of a worker, which has %.2f",
                (whole.device_bytes or whole.host_bytes) / 2**30,
                limit / 2**30,
            )
        return variant

    return run.record.once("healing_variant", decide)


def heal(
    plan: Plan,
    setup: EvaluatorSetup,
    winner: Evaluation,
    windows: tuple[int, int],
    run: RunDirectory,
    pool: Pool,
    track: Track,
    variant: str,
) -> Healing | None:
    """Tune float32 tensors and block scales of ``winner``, continue an interrupted tuning, or load a finished one.

    ``winner`` was measured on validation text; ``windows`` is the shape (n, T) of the calibration text; ``variant`` is
    that of ``decide_variant``. Returns None if healing is off. The values are used only if the KL on validation text
    falls, with ``enabled: on`` as with ``auto``.
    """
    config = plan.config.healing
    if config.enabled == "off":
        return None
    genome = winner.genome
    settings = config.model_copy(update={"variant": variant}).with_rate_for(winner.kl)
    digests = (plan.folder.digest, run.record["digests"]["text"], setup.bank.name, setup.activations)
    tokens = {split: getattr(plan.config.text.tokens, split) for split in SPLITS}
    key = digest_of(*digests, tokens, list(genome), settings.deciding)
    if done := Healing.load(run.path, key):
        return done
    checkpoint = HealingCheckpoint((run.path / layout.HEALING_CHECKPOINT).resolve(), key)
    fidelities = [Fidelity(split, tokens[split]) for split in SPLITS]
    if settings.variant == "full":
        values = {name: plan.folder.read(name).float() for name in float_tensors(plan)}
        if settings.scales:
            values |= multipliers(Bank(setup.bank), setup.space.formats_of(genome))
        training = WholeHealing(setup, genome, values, settings, windows, checkpoint)
        trained, figures = heal_whole(training, fidelities, pool, track)
    else:
        parts = range(ModelShape.of(plan.folder).layers + 1)  # the last is the output norm
        shared = (setup, genome, float_tensors(plan), settings, checkpoint, tuple(fidelities))
        trained, figures = heal_blocks([HealBlock(*shared, part) for part in parts], pool, track)
    better = figures["validation"].better
    healing = Healing(key, trained if better else {}, figures, settings.variant)
    healing.save(run.path)
    checkpoint.path.unlink()
    wanted = better or config.enabled == "auto"  # the closing table says it; events.log has it too
    log.log(logging.DEBUG if wanted else logging.WARNING, verdict(healing))
    return healing


def heal_whole(training: WholeHealing, fidelities: Sequence[Fidelity], pool: Pool, track: Track) -> Trained:
    """Train with the whole model in memory, then measure; return the tuned values and the figures."""
    done = training.checkpoint.load()
    left = training.settings.steps - (done[1]["steps"] if done else 0)
    for _ in track(training.train(pool.map), left, "healing"):
        pass
    saved = training.checkpoint.load()
    assert saved is not None, "saved behind the last step"
    values = {name: saved[0][name] for name in training.values}
    measures = [MeasureHealing(training.setup, training.genome, values, fidelity) for fidelity in fidelities]
    measured = track(pool.map(measures), len(measures), "measuring what healing did")
    return values, {fidelity.split: healed for fidelity, healed in zip(fidelities, measured, strict=True)}


def heal_blocks(tasks: Sequence[HealBlock], pool: Pool, track: Track) -> Trained:
    """Train and measure with one block in memory; return the tuned values and the figures.

    Each task continues from the state in which the one before it ended.
    """
    one_by_one = (result for task in tasks for result in pool.map([task]))
    *_, figures = track(one_by_one, len(tasks), "healing, block by block")
    saved = tasks[-1].checkpoint.load()
    assert saved is not None, "saved behind the last part"
    return saved[0], figures


def verdict(healing: Healing) -> str:
    """Return one sentence on the outcome, for the log and the closing table."""
    figures = healing.figures["validation"]
    after = "no finite logits" if figures.after is None else f"{figures.after.kl:.5f}"
    outcome = "applied" if healing.applied else "refused, the file is as searched"
    return f"Healing ({healing.variant}) {outcome}: KL on validation text {figures.before.kl:.5f} before, {after} after"


def shipped_floats(healing: Healing | None) -> dict[str, Tensor]:
    """Return the float32 tensors by Hugging Face name that go into the file in place of the model's."""
    return divided(healing.values)[0] if healing else {}


def shipped_bank(directory: Path, healing: Healing | None) -> Bank:
    """Return the bank in ``directory`` with the scales that go into the file."""
    return ScaledBank(directory, divided(healing.values)[1] if healing else {})


def shipped_healing(run: Path, best: Mapping[str, Any]) -> Healing | None:
    """Return the healing that belongs in the file of a finished run, or None if it was not applied.

    ``best`` is the object in the run's best.json. Raises UserError if the tuned values are missing or damaged.
    """
    record = best.get("healing")
    if not record or not record["applied"]:
        return None
    healing = Healing.load(run, record["key"])
    if healing is None or not healing.applied:
        raise UserError(
            f"expected the tuned tensors in {run / layout.HEALED}, found none that can be read: bitgenome resume {run}"
        )
    return healing
