"""Estimates from gradients against brute-force Fisher information in float64, and against the KL itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from evaluators.engine.evaluator import GenomeEvaluator
from evaluators.gradient.label_scores import LinearUse, LookupUse, model_scores, sampled_labels
from evaluators.gradient.sensitivity import ESTIMATORS, EstimateSquares, gradient_losses, gradient_tasks
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder
from search.types import Fidelity
from tests.conftest import SmallBank
from tests.small_models import CONFIGS, save_small_model
from workers.pool.base import SerialPool

WORDS = 16  # of the tiny models' vocabulary


def tiny_model(path: Path, model_type: str = "qwen2", *, tied: bool = True, **settings: Any) -> BlockModel:
    """Float64, so that what two ways of computing differ in is an error."""
    folder = save_small_model(path, model_type, tokenizer=False, vocab_size=WORDS, tie_word_embeddings=tied, **settings)
    model = BlockModel(ModelFolder(folder), torch.device("cpu"))
    model.load_all()
    model.model.double()
    return model


def matrices(model: BlockModel) -> list[str]:
    routers = ".mlp.gate.weight"
    return [name for name, shape in model.folder.shapes.items() if len(shape) == 2 and not name.endswith(routers)]


def random_deltas(model: BlockModel, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: model.weight(name).shape for name in matrices(model)}
    return {n: size * torch.randn(shape, dtype=torch.float64, generator=generator) for n, shape in shapes.items()}


def text(windows: int, positions: int) -> Tensor:
    return torch.randint(0, WORDS, (windows, positions), generator=torch.Generator().manual_seed(2))


def draws(windows: int, positions: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(windows, positions, dtype=torch.float64, generator=generator)


def log_probs(model: BlockModel, ids: Tensor) -> Tensor:
    logits = model.run_from(0, model.embed(ids)) @ model.weight(model.head_name).T
    cap = model.head.settings.softcap
    return (cap * (logits / cap).tanh() if cap else logits).log_softmax(-1)


def projected(model: BlockModel, ids: Tensor, uniform: Tensor, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """(n, T) projections by tensor, over all of its uses."""
    found: dict[str, Tensor] = {}
    for use in model_scores(model, ids, uniform):
        found[use.name] = found.get(use.name, 0) + use.projections(deltas[use.name]).view(ids.shape)
    return found


def moved_by(model: BlockModel, deltas: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Log-probabilities of the model with ``deltas`` added, which are taken away again."""
    originals = {name: model.weight(name).data for name in deltas}
    for name, delta in deltas.items():
        model.weight(name).data = originals[name] + delta
    with torch.no_grad():
        moved = log_probs(model, ids)
    for name, original in originals.items():
        model.weight(name).data = original
    return moved


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_projections_of_a_window_sum_to_the_product_with_the_weights_own_gradient(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    assert check_projections(tiny_model(tmp_path, model_type, tied=tied)) == 0


def test_experts_are_projected_at_the_positions_that_chose_them(tmp_path: Path) -> None:
    sizes = {"num_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    assert check_projections(tiny_model(tmp_path, "qwen3_moe", tied=False, **sizes)) > 0


def check_projections(model: BlockModel) -> int:
    """Check a text's projections, window by window; return of how many tensors no position has one."""
    ids, uniform, deltas = text(3, 7), draws(3, 7), random_deltas(model)
    found = projected(model, ids, uniform, deltas)
    unused = deltas.keys() - found.keys()
    for window in range(len(ids)):
        parameters = [model.weight(name).requires_grad_(True) for name in deltas]
        log_p = log_probs(model, ids[window : window + 1])[0]
        labels = sampled_labels(log_p.detach(), uniform[window])
        of_labels = log_p.gather(1, labels[:, None]).sum()
        gradients = torch.autograd.grad(of_labels, parameters, allow_unused=True, materialize_grads=True)
        for parameter, gradient, (name, delta) in zip(parameters, gradients, deltas.items(), strict=True):
            parameter.requires_grad_(False)
            expected = float((gradient * delta).sum())
            projections = found[name][window] if name in found else torch.zeros(1)
            assert float(projections.sum()) == pytest.approx(expected, rel=1e-9, abs=1e-12), name
    return len(unused)


def test_labels_come_as_often_as_the_model_gives_them() -> None:
    logits = torch.randn(1, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    uniform = (torch.arange(20000) + 0.5) / 20000
    found = torch.bincount(sampled_labels(logits.expand(20000, -1), uniform.double()), minlength=WORDS) / 20000
    assert torch.allclose(found.double(), logits.softmax(-1)[0], atol=1e-4)


def brute_force_fisher(model: BlockModel, ids: Tensor, name: str) -> Tensor:
    """(weights, weights) mean over positions of E[g g'], every label of every position weighed by its probability."""
    parameter = model.weight(name).requires_grad_(True)
    log_p = log_probs(model, ids)[0]
    F = torch.zeros(parameter.numel(), parameter.numel(), dtype=torch.float64)
    for position in log_p:
        for label in position:
            (g,) = torch.autograd.grad(label, parameter, retain_graph=True)
            F += float(label.detach().exp()) / len(log_p) * torch.outer(g.flatten(), g.flatten())
    parameter.requires_grad_(False)
    return F


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_squares_of_windows_average_to_the_fisher_form(name: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    one, repeats = text(1, 3), 3000
    delta = random_deltas(model)[name]
    F = brute_force_fisher(model, one, name)
    ids = one.expand(repeats, -1)
    found = projected(model, ids, draws(*ids.shape), random_deltas(model))[name]
    estimate = float(ESTIMATORS["windows"].total(found.flatten(), 3)) / ids.numel()
    assert estimate == pytest.approx(float(delta.flatten() @ F @ delta.flatten()), rel=0.08)  # 3 standard errors


def test_the_estimate_tends_to_the_divergence_as_the_error_tends_to_none(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    (ids, repeats), apart = (text(5, 1), 2000), []
    log_p = log_probs(model, ids).detach()
    strata = ((torch.arange(repeats, dtype=torch.float64) + 0.5) / repeats).repeat(len(ids))[:, None]
    for size in (0.01, 0.001, 0.0001):
        deltas = random_deltas(model, size)
        log_q = moved_by(model, deltas, ids)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        found = projected(model, ids.repeat_interleave(repeats, 0), strata, deltas)
        together = torch.stack(list(found.values())).sum(0)
        estimate = float(ESTIMATORS["positions"].total(together.flatten(), 1)) / 2 / together.numel()
        apart.append(abs(estimate / kl - 1))
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.01 < apart[0], apart


def test_factored_estimates_are_the_sums_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x, s, delta = (torch.randn(*n, dtype=torch.float64, generator=generator) for n in ((9, 4), (9, 3), (3, 4)))
    use = LinearUse("w", x, s)
    gradients = s[:, :, None] * x[:, None, :]  # (P, rows, columns)
    assert torch.allclose(use.projections(delta), (gradients * delta).sum((1, 2)))
    assert torch.allclose(use.diagonal(delta), (gradients * delta).square().sum())
    S, A = s.T @ s / 9, x.T @ x / 9
    assert torch.allclose(use.kronecker(delta), 9 * torch.trace(S @ delta @ A @ delta.T))
    wide = LinearUse("w", s, x)
    assert torch.allclose(wide.projections(delta.T), use.projections(delta))


def test_a_lookup_is_a_linear_layer_of_one_hot_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 2, 2, 5, 1, 0])
    s, delta = (torch.randn(*n, dtype=torch.float64, generator=generator) for n in ((6, 4), (6, 4)))
    lookup = LookupUse("w", ids, s)
    linear = LinearUse("w", torch.nn.functional.one_hot(ids, 6).double(), s)
    for kind in ("projections", "kronecker", "diagonal"):
        assert torch.allclose(getattr(lookup, kind)(delta), getattr(linear, kind)(delta.T)), kind


def test_one_backward_pass_ranks_genes_and_levels_as_their_divergences_do(small_bank: SmallBank) -> None:
    fidelity, genes = Fidelity("search", 1024), (0, 1, 4, 7, 20, 33, 42)
    setup, shape = small_bank.setup(), (4, 256)
    (part,) = SerialPool().map(gradient_tasks(setup, fidelity, shape))
    losses = gradient_losses([part], shape)
    evaluator = GenomeEvaluator(setup)
    exact = np.array([[record["kl"] for record in records] for records in evaluator.sensitivity(genes, fidelity)])
    found = np.stack([losses[gene] for gene in genes])
    assert spearmanr(found.flatten(), exact.flatten()).statistic > 0.98
    assert np.abs(np.log(found / exact)).mean() < 0.25


def test_estimates_do_not_depend_on_how_the_text_is_divided(small_bank: SmallBank) -> None:
    fidelity, setup = Fidelity("search", 512), small_bank.setup()
    whole, *halves = SerialPool().map(
        [EstimateSquares(setup, fidelity, first, windows) for first, windows in ((0, 2), (0, 1), (1, 1))]
    )
    for one, both in zip(gradient_losses([whole], (2, 256)), gradient_losses(halves, (2, 256)), strict=True):
        assert np.allclose(one, both, rtol=1e-4)
