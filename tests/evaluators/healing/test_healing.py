"""Healing tunes norms and block scales alone, ends in the same bits once interrupted, and lowers what it minimizes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from evaluators.engine.evaluator import EvaluateGenomes, warm
from evaluators.healing.blocks import HealBlock, output_error
from evaluators.healing.distillation import DistillationLoss
from evaluators.healing.scales import divided, multipliers, scales_name
from evaluators.healing.tuner import HealingCheckpoint, Tuner, schedule
from evaluators.healing.whole import Healed, MeasureHealing, TrainedModel, WholeHealing, gradient_of
from evaluators.prepare.bank import Bank
from evaluators.settings import HealingSettings
from exporters.metadata.tensor_names import tensor_table
from search.types import Fidelity
from tests.conftest import SmallBank
from workers.pool.base import SerialPool

SETTINGS = HealingSettings(steps=6, batch_tokens=768, learning_rate=0.005)  # three windows a step, two to a worker
VALIDATION = Fidelity("validation", 2048)


def own_floats(small_bank: SmallBank) -> dict[str, Tensor]:
    table = tensor_table(small_bank.folder)
    return {entry.hf_name: small_bank.folder.read(entry.hf_name).float() for entry in table if not entry.quantizable}


def whole(small_bank: SmallBank, path: Path, settings: HealingSettings = SETTINGS) -> WholeHealing:
    windows, genome = small_bank.windows.windows["calibration"].shape, small_bank.space.smallest()
    checkpoint = HealingCheckpoint(path, "key")
    values = own_floats(small_bank) | multipliers(Bank(small_bank.directory), small_bank.space.formats_of(genome))
    return WholeHealing(small_bank.setup(), genome, values, settings, windows, checkpoint)


def tuned(training: WholeHealing) -> dict[str, Tensor]:
    saved = training.checkpoint.load()
    assert saved is not None
    return {name: value for name, value in saved[0].items() if name in training.values}


def measure(training: WholeHealing, pool: SerialPool) -> Healed:
    (healed,) = pool.map([MeasureHealing(training.setup, training.genome, tuned(training), VALIDATION)])
    assert isinstance(healed, Healed)
    return healed


def block_task(small_bank: SmallBank, path: Path, block: int) -> HealBlock:
    settings = SETTINGS.model_copy(update={"steps": 3, "batch_tokens": 512, "variant": "blockwise"})
    names, checkpoint = tuple(own_floats(small_bank)), HealingCheckpoint(path, "key")
    genome = small_bank.space.smallest()
    return HealBlock(small_bank.setup(), genome, names, settings, checkpoint, (VALIDATION,), block)


Trained = tuple[WholeHealing, SerialPool]


@pytest.fixture(scope="module")
def trained(small_bank: SmallBank, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The undisturbed training, and the pool that computed it."""
    training, pool = whole(small_bank, tmp_path_factory.mktemp("healed") / "checkpoint.safetensors"), SerialPool()
    assert list(training.train(pool.map)) == [1, 2, 3, 4, 5, 6]
    return training, pool


def test_a_few_steps_lower_the_divergence_on_text_that_was_not_trained_on(trained: Trained) -> None:
    training, pool = trained
    figures = measure(training, pool)
    assert figures.better and figures.after is not None
    assert figures.after.kl < 0.97 * figures.before.kl
    ((plain,),) = SerialPool().map([EvaluateGenomes(training.setup, (training.genome,), VALIDATION, "plain")])
    assert figures.before.kl == plain.kl


def test_training_leaves_the_model_as_it_was(small_bank: SmallBank, trained: Trained) -> None:
    training, pool = trained
    measure(training, pool)
    model = warm(TrainedModel, training.setup, pool._state).model
    for name, own in divided(training.values)[0].items():
        assert torch.equal(model.weight(name).data, own)
    bank, formats = Bank(small_bank.directory), small_bank.space.formats_of(training.genome)
    warm(TrainedModel, training.setup, pool._state).simulated.set_formats(formats)  # after those with tuned scales
    for name, fmt in formats.items():
        weight = model.weight(name).data
        assert torch.equal(weight, bank.weights(name, fmt, weight.shape[1], weight.device))


def test_an_interrupted_training_ends_in_the_same_bits(
    small_bank: SmallBank, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluators.healing.whole.CHECKPOINT_STEPS", 2)
    training = whole(small_bank, tmp_path / "checkpoint.safetensors")
    for done in training.train(SerialPool().map):
        if done == 3:  # one step behind a checkpoint
            break
    assert list(training.train(SerialPool().map)) == [3, 4, 5, 6]
    assert training.checkpoint.path.read_bytes() == trained[0].checkpoint.path.read_bytes()


def test_gradients_of_parts_sum_to_that_of_the_whole_step(
    small_bank: SmallBank, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, pool = trained
    rows = torch.tensor([4, 0, 2])
    found = []
    for micro in (512, 4096):  # two windows and one; all at once
        monkeypatch.setattr("evaluators.healing.tuner.MICRO_TOKENS", micro)
        tuner = Tuner({n: nn.Parameter(t.clone()) for n, t in training.values.items()}, SETTINGS)
        training.accumulate(tuner, rows, training.references(rows[None], pool.map), pool.map)
        found.append(torch.cat([gradient_of(p).flatten() for p in tuner.parameters.values()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4


def test_gradients_of_scales_are_the_slope_of_the_loss(small_bank: SmallBank, trained: Trained) -> None:
    """All scales of some tensors moved together, far enough for fp16; the mean of both sides has no curvature."""
    training, pool = trained
    tuner = Tuner({n: nn.Parameter(t.clone()) for n, t in training.values.items()}, SETTINGS)
    rows = torch.tensor([[1]])
    reference = training.references(rows, pool.map)
    training.accumulate(tuner, rows[0], reference, pool.map)
    model, loss = warm(TrainedModel, training.setup, pool._state), DistillationLoss()
    ids = model.calibration_ids([1])

    def loss_at(tensor: str, factor: float) -> float:
        factors = {tensor: torch.full_like(training.values[scales_name(tensor)], factor)}
        with torch.no_grad(), model.scaled(training.genome, factors):
            hidden = model.simulated.head_input(model.model.run_from(0, model.model.embed(ids)))
            return float(loss(hidden, model.model.head, reference[1][None], model.full_head, ids))

    for name in ("model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"):
        slope = (loss_at(name, 1 + 2**-6) - loss_at(name, 1 - 2**-6)) / 2**-5
        found = float(gradient_of(tuner.parameters[scales_name(name)]).sum())
        assert found == pytest.approx(slope, rel=0.1)


def test_a_checkpoint_of_something_else_or_a_damaged_one_does_not_count(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = trained[0].checkpoint.path
    assert HealingCheckpoint(path, "another").load() is None
    assert HealingCheckpoint(tmp_path / "none", "key").load() is None
    assert not caplog.text
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:-100])
    assert HealingCheckpoint(torn, "key").load() is None
    assert "healing starts anew" in caplog.text


def test_every_pass_over_the_text_reads_every_window_once() -> None:
    order = schedule(HealingSettings(steps=9, batch_tokens=128, seed=4), windows=6, window=64)
    assert order.shape == (9, 2)
    for start in (0, 6, 12):
        assert sorted(order.flatten()[start : start + 6].tolist()) == list(range(6))


def test_a_learning_rate_that_destroys_the_model_is_told_apart(small_bank: SmallBank, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"steps": 2, "batch_tokens": 256, "learning_rate": 1e30})
    training, pool = whole(small_bank, tmp_path / "c.safetensors", settings), SerialPool()
    list(training.train(pool.map))
    assert not measure(training, pool).better


def test_every_block_comes_closer_to_its_full_precision_output_and_the_figures_are_the_whole_model_s(
    small_bank: SmallBank, tmp_path: Path
) -> None:
    path = tmp_path / "blocks.safetensors"
    for block in range(6):
        assert block_task(small_bank, path, block).run({}) == {}
    saved = HealingCheckpoint(path, "key").load()
    assert saved is not None
    assert len(saved[1]["errors"]) == 6
    for before, after in saved[1]["errors"]:
        assert after < before
    between = path.read_bytes()
    figures = block_task(small_bank, path, 6).run({})
    finished = path.read_bytes()
    assert block_task(small_bank, path, 6).run({}) == figures and path.read_bytes() == finished  # killed behind it
    path.write_bytes(between)  # interrupted in front of the last part
    assert block_task(small_bank, path, 6).run({}) == figures and path.read_bytes() == finished
    found, again = figures["validation"], measure(whole(small_bank, path), SerialPool())
    assert found.better and found.after is not None and again.after is not None
    assert found.before.kl == pytest.approx(again.before.kl, rel=1e-4)
    assert found.after.kl == pytest.approx(again.after.kl, rel=1e-4)


def test_the_error_of_an_output_is_relative_to_each_position() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    expected = [
        ((o - t) @ (o - t)) / (t @ t) for o, t in zip(output.reshape(-1, 8), target.reshape(-1, 8), strict=True)
    ]
    assert float(output_error(output, target)) == pytest.approx(float(sum(expected)) / len(expected))
    assert output_error(output, target, unscored=1) == output_error(output[:, 1:], target[:, 1:])
