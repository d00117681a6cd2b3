"""Healing tunes float32 tensors alone, ends in the same bits after an interruption, and lowers what it minimizes."""

import dataclasses
from pathlib import Path

import pytest
import torch

from evaluators.bank import Bank
from evaluators.evaluator import GenomeEvaluator
from evaluators.healing import Healed, HealingCheckpoint, HealingSettings, HealSteps, MeasureHealing
from evaluators.healing_blocks import HealBlock, output_error
from evaluators.simulated import genome_formats
from exporters.tensor_names import tensor_table
from search.types import Fidelity
from tests.conftest import SmallBank
from workers.pool import SerialPool

SETTINGS = HealingSettings(steps=6, batch_tokens=512, learning_rate=0.005)
VALIDATION = Fidelity("validation", 2048)


def names(small_bank: SmallBank) -> tuple[str, ...]:
    return tuple(entry.hf_name for entry in tensor_table(small_bank.folder) if not entry.quantizable)


def steps_task(
    small_bank: SmallBank, path: Path, stop: int, settings: HealingSettings = SETTINGS, key: str = "key"
) -> HealSteps:
    checkpoint = HealingCheckpoint(path, key)
    setup, genome = small_bank.setup(), small_bank.space.smallest()
    return HealSteps(setup, genome, names(small_bank), settings, checkpoint, 1, stop)


def measure(task: HealSteps, pool: SerialPool) -> Healed:
    measuring = MeasureHealing(task.setup, task.genome, task.names, task.checkpoint, VALIDATION)
    (healed,) = pool.map([measuring])
    assert isinstance(healed, Healed)
    return healed


def block_task(small_bank: SmallBank, path: Path, block: int) -> HealBlock:
    whole = steps_task(small_bank, path, 0, dataclasses.replace(SETTINGS, steps=3, variant="blockwise"))
    shared = (whole.setup, whole.genome, whole.names, whole.settings, whole.checkpoint, 1)
    return HealBlock(*shared, (VALIDATION,), block)


@pytest.fixture(scope="module")
def healed(small_bank: SmallBank, tmp_path_factory: pytest.TempPathFactory) -> tuple[HealSteps, GenomeEvaluator]:
    """The undisturbed training, and the worker's evaluator behind it."""
    task = steps_task(small_bank, tmp_path_factory.mktemp("healed") / "checkpoint.safetensors", SETTINGS.steps)
    state: dict[str, GenomeEvaluator] = {}
    assert task.run(state) == SETTINGS.steps
    return task, state[task.setup.key]


def test_a_few_steps_lower_the_divergence_on_text_that_was_not_trained_on(
    healed: tuple[HealSteps, GenomeEvaluator],
) -> None:
    task, _ = healed
    figures = measure(task, SerialPool())
    assert figures.better and figures.after is not None
    assert figures.after.kl < 0.97 * figures.before.kl
    plain = GenomeEvaluator(task.setup).evaluate(task.genome, VALIDATION)
    assert figures.before.kl == plain.kl


def test_the_worker_evaluates_behind_healing_as_before(
    small_bank: SmallBank, healed: tuple[HealSteps, GenomeEvaluator]
) -> None:
    task, evaluator = healed
    fidelity = Fidelity("search", 512)
    fresh = GenomeEvaluator(task.setup).evaluate(task.genome, fidelity)
    assert evaluator.evaluate(task.genome, fidelity).kl == fresh.kl
    bank, model = Bank(small_bank.directory), evaluator.block_model
    for name, fmt in genome_formats(small_bank.space, task.genome).items():
        weight = model.weight(name)
        assert torch.equal(weight.data, bank.weights(name, fmt, weight.shape[1], model.device))
    for name in task.names:
        assert torch.equal(model.weight(name).data, small_bank.folder.read(name).float())


def test_an_interrupted_training_ends_in_the_same_bits(
    small_bank: SmallBank, healed: tuple[HealSteps, GenomeEvaluator], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    pool = SerialPool()
    list(pool.map([steps_task(small_bank, path, 2)]))
    list(SerialPool().map([steps_task(small_bank, path, SETTINGS.steps)]))  # a worker that remembers nothing
    assert path.read_bytes() == healed[0].checkpoint.path.read_bytes()


def test_a_checkpoint_of_something_else_or_a_damaged_one_does_not_count(
    healed: tuple[HealSteps, GenomeEvaluator], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = healed[0].checkpoint.path
    assert HealingCheckpoint(path, "another").load() is None
    assert HealingCheckpoint(tmp_path / "none", "key").load() is None
    assert not caplog.text
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:-100])
    assert HealingCheckpoint(torn, "key").load() is None
    assert "healing starts anew" in caplog.text


def test_every_pass_over_the_text_reads_every_window_once() -> None:
    schedule = HealingSettings(steps=9, batch_tokens=128, seed=4).schedule(windows=6, window=64)
    assert schedule.shape == (9, 2)
    for start in (0, 6, 12):
        assert sorted(schedule.flatten()[start : start + 6].tolist()) == list(range(6))


def test_a_learning_rate_that_destroys_the_model_is_told_apart(small_bank: SmallBank, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=2, learning_rate=1e30)
    task, pool = steps_task(small_bank, tmp_path / "c.safetensors", 2, settings), SerialPool()
    list(pool.map([task]))
    assert not measure(task, pool).better


def test_every_block_comes_closer_to_its_full_precision_output(small_bank: SmallBank, tmp_path: Path) -> None:
    path = tmp_path / "blocks.safetensors"
    for block in range(6):
        (figures,) = SerialPool().map([block_task(small_bank, path, block)])
        assert figures == {}
    saved = HealingCheckpoint(path, "key").load()
    assert saved is not None
    assert len(saved[1]["errors"]) == 6
    for before, after in saved[1]["errors"]:
        assert after < before
    between = path.read_bytes()
    (figures,) = SerialPool().map([block_task(small_bank, path, 6)])
    assert figures["validation"].better
    finished = path.read_bytes()
    path.write_bytes(between)  # interrupted in front of the last part
    (again,) = SerialPool().map([block_task(small_bank, path, 6)])
    assert again == figures and path.read_bytes() == finished


def test_the_block_wise_figures_are_those_of_the_whole_model(small_bank: SmallBank, tmp_path: Path) -> None:
    path = tmp_path / "blocks.safetensors"
    *_, figures = (block_task(small_bank, path, block).run({}) for block in range(7))
    whole = measure(steps_task(small_bank, path, 0), SerialPool())
    found = figures["validation"]
    assert found.before.kl == pytest.approx(whole.before.kl, rel=1e-4)
    assert found.after is not None and whole.after is not None
    assert found.after.kl == pytest.approx(whole.after.kl, rel=1e-4)


def test_the_error_of_an_output_is_relative_to_each_position() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
    expected = [
        ((o - t) @ (o - t)) / (t @ t) for o, t in zip(output.reshape(-1, 8), target.reshape(-1, 8), strict=True)
    ]
    assert float(output_error(output, target)) == pytest.approx(float(sum(expected)) / len(expected))
