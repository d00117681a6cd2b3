"""An evaluation is a plain load-and-forward of the decoded bytes, whatever ran on the worker before."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.data.windows import TokenWindows
from evaluators.engine.evaluator import EvaluateGenomes, GenomeEvaluator
from evaluators.engine.memory import Load
from evaluators.gradient.label_scores import LinearUse, model_scores
from evaluators.gradient.sensitivity import GradientEvaluator, label_draws
from evaluators.healing.whole import MeasureHealing
from evaluators.prepare.bank import Bank
from search.types import Evaluation, Fidelity, Genome
from tests.conftest import EMBEDDED, SmallBank
from workers.pool.base import SerialPool

FIDELITY = Fidelity("search", 1024)


def random_genomes(small_bank: SmallBank, count: int) -> list[Genome]:
    rng = random.Random(3)
    return [tuple(rng.randrange(len(g.formats)) for g in small_bank.space.genes) for _ in range(count)]


def figures(evaluation: Evaluation) -> tuple[float, ...]:
    return (evaluation.loss, evaluation.kl, evaluation.logit_mse, evaluation.perplexity, evaluation.reconstruction)


@pytest.fixture(scope="module")
def evaluator(small_bank: SmallBank) -> GenomeEvaluator:
    return GenomeEvaluator(small_bank.setup())


def test_an_evaluation_equals_a_plain_forward_of_the_decoded_weights(
    small_bank: SmallBank, evaluator: GenomeEvaluator
) -> None:
    (genome,) = random_genomes(small_bank, 1)
    full = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    bank = Bank(small_bank.directory)
    for name, fmt in small_bank.space.formats_of(genome).items():
        parameter = quantized.get_parameter(name)
        parameter.data = bank.weights(name, fmt, parameter.shape[1], torch.device("cpu"))
    ids = evaluator.ids(FIDELITY)
    with torch.inference_mode():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (full, quantized))
    (found,) = evaluator.evaluate([genome], FIDELITY)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    loss = -q[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found.file_bytes == small_bank.space.file_bytes(genome)


def test_what_follows_bos_alone_is_scored_nowhere(small_bank: SmallBank, tmp_path: Path) -> None:
    """KL, healing's figures and gradients, of windows that begin with one token and say so."""
    ids = small_bank.windows.windows["search"].copy()
    ids[:, 0] = 0
    files = [tmp_path / name for name in ("all", "after-bos")]
    for unscored, file in enumerate(files):
        file.write_bytes(TokenWindows({"search": ids}, "", unscored).to_bytes())
    setups = [replace(small_bank.setup(), windows=file, key=file.name) for file in files]
    (genome,), positions = random_genomes(small_bank, 1), ids.shape[1]
    (every,), (after,) = (GenomeEvaluator(setup).evaluate([genome], FIDELITY) for setup in setups)
    first = np.multiply(every.window_kl, positions) - np.multiply(after.window_kl, positions - 1)
    assert first.min() > 0 and first == pytest.approx(np.full(len(first), first.mean()), rel=1e-4)
    (healed,) = SerialPool().map([MeasureHealing(setups[1], genome, {}, FIDELITY)])
    assert healed.before.kl == after.kl
    labels = label_draws(0, 1, positions)
    model = GradientEvaluator(setups[1]).model
    head, *_ = model_scores(model, torch.from_numpy(ids[:1]), labels, unscored=1)
    both, *_ = model_scores(model, torch.from_numpy(ids[:1]), labels)
    assert isinstance(head, LinearUse) and isinstance(both, LinearUse)
    assert not head.scores[0].any() and both.scores[0].any()
    assert torch.equal(head.scores[1:], both.scores[1:])


def test_results_do_not_depend_on_what_was_evaluated_before(small_bank: SmallBank, evaluator: GenomeEvaluator) -> None:
    genomes = random_genomes(small_bank, 4)
    forward = [figures(e) for e in evaluator.evaluate(genomes, FIDELITY)]
    evaluator.sensitivity([5], FIDELITY)
    backward = [figures(e) for g in reversed(genomes) for e in evaluator.evaluate([g], FIDELITY)][::-1]
    fresh = [figures(e) for e in GenomeEvaluator(small_bank.setup()).evaluate(genomes[:2], FIDELITY)]
    assert forward == backward
    assert forward[:2] == fresh


def test_sensitivity_of_a_gene_is_the_divergence_with_that_gene_alone(
    small_bank: SmallBank, evaluator: GenomeEvaluator
) -> None:
    genes = (0, 4, 20)  # embedding, then tensors of the first and of a later block
    for gene, records in zip(genes, evaluator.sensitivity(genes, FIDELITY), strict=True):
        target = small_bank.space.genes[gene]
        for record, fmt in zip(records, target.formats, strict=True):
            (alone,) = evaluator.divergences([{target.name: fmt}], FIDELITY)
            assert record["kl"] == alone.kl
            assert (record["gene"], record["format"]) == (target.name, fmt.name)


def test_around_a_base_a_choice_costs_what_it_adds_to_the_bases_divergence(
    small_bank: SmallBank, evaluator: GenomeEvaluator
) -> None:
    (base,) = random_genomes(small_bank, 1)
    start = evaluator.evaluate([base], FIDELITY)[0].kl
    genes = (0, 20)
    for gene, records in zip(genes, evaluator.sensitivity(genes, FIDELITY, base), strict=True):
        for choice, record in enumerate(records):
            (moved,) = evaluator.evaluate([(*base[:gene], choice, *base[gene + 1 :])], FIDELITY)
            assert record["kl"] == moved.kl - start
            assert list(record) == ["gene", "choice", "format", "kl", "logit_mse", "reconstruction", "relative"]
        assert records[base[gene]]["kl"] == 0


def test_more_bits_everywhere_diverge_less(small_bank: SmallBank, evaluator: GenomeEvaluator) -> None:
    genes = len(small_bank.space.genes)
    divergences = [e.kl for e in evaluator.evaluate([(choice,) * genes for choice in range(4)], FIDELITY)]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 1e-3


def test_the_loss_weighs_divergence_and_reconstruction(small_bank: SmallBank) -> None:
    setup = small_bank.setup(kl_weight=2.0, reconstruction_weight=3.0)
    ((result,),) = SerialPool().map([EvaluateGenomes(setup, (small_bank.space.smallest(),), FIDELITY, "eval")])
    assert result.loss == pytest.approx(2 * result.kl + 3 * result.reconstruction)


def test_the_weighted_fitness_of_the_original_is_a_choice(small_bank: SmallBank) -> None:
    setup = small_bank.setup(kind="weighted", alpha=0.5, beta=2.0)
    ((result,),) = SerialPool().map([EvaluateGenomes(setup, (small_bank.space.smallest(),), FIDELITY, "eval")])
    compression = 2 * small_bank.space.weights / result.file_bytes
    assert result.loss == pytest.approx(-(0.5 / result.logit_mse + 2 * compression))


def test_text_that_goes_through_in_parts_gives_the_same(small_bank: SmallBank, evaluator: GenomeEvaluator) -> None:
    genomes = random_genomes(small_bank, 5)
    crowded = GenomeEvaluator(replace(small_bank.setup(), load=Load(candidates=3, tokens=512, kept=0), key="parts"))
    crowded.memory = replace(crowded.memory, states=0)
    for fidelity in (FIDELITY, Fidelity("search", 1536), Fidelity("search", 1024, 7), FIDELITY):
        for part in (genomes, genomes[:2]):  # other numbers of candidates leave room for other numbers of windows
            found = [figures(e) for e in crowded.evaluate(part, fidelity)]
            assert found == [figures(e) for e in evaluator.evaluate(part, fidelity)]
