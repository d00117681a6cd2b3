"""KL, logit error and perplexity are those of float64 log-softmax."""

import math

import pytest
import torch

from evaluators.engine.divergence import Reference, kl_of_differences
from evaluators.model.head import Head

VOCABULARY, HIDDEN = 700, 48


def case(
    noise: float, dtype: torch.dtype = torch.float32, softcap: float | None = None
) -> tuple[torch.Tensor, Head, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 50, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) / 4
    other = hidden + noise * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (2, 50), generator=generator)
    return hidden.to(dtype), Head(head.to(dtype), softcap), other.to(dtype), ids


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("noise", "tolerance"), [(1.0, 1e-5), (1e-2, 1e-4), (1e-4, 2e-2)])
def test_divergence_equals_the_textbook_formulas_in_float64(
    noise: float, tolerance: float, softcap: float | None
) -> None:
    hidden, head, other, ids = case(noise, torch.float64)
    p, q = (h @ head.weight.T for h in (hidden, other))
    if softcap:
        p, q = (softcap * (logits / softcap).tanh() for logits in (p, q))
    mse = float((p - q).square().mean())
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    loss = -q[:, :-1].gather(2, ids[:, 1:, None]).mean()
    hidden, head, other, ids = case(noise, softcap=softcap)
    found = Reference(hidden, head, ids).compare(other, head)
    assert found.kl == pytest.approx(kl, rel=tolerance)
    assert found.logit_mse == pytest.approx(mse, rel=tolerance)
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    hidden, head, _, ids = case(0.0)
    found = Reference(hidden, head, ids).compare(hidden, head)
    assert (found.kl, found.logit_mse) == (0.0, 0.0)


def test_references_too_large_to_keep_give_the_same() -> None:
    hidden, head, other, ids = case(0.1)
    kept = Reference(hidden, head, ids).compare(other, head)
    assert Reference(hidden, head, ids, cache_bytes=0).compare(other, head) == kept


def test_logits_far_apart_neither_overflow_nor_lose_the_divergence() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]])
    difference = torch.tensor([[0.0, 200.0, 0.0]])
    kl, _ = kl_of_differences(p, difference)
    assert float(kl) == pytest.approx(200 + math.log(0.5) - 100, rel=1e-6)


def test_logits_that_are_not_finite_are_an_error() -> None:
    hidden, head, other, ids = case(0.1)
    other[0, 3, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        Reference(hidden, head, ids).compare(other, head)


def test_the_divergence_of_a_text_is_the_mean_of_its_windows() -> None:
    hidden, head, other, ids = case(0.1)
    whole = Reference(hidden, head, ids).compare(other, head)
    each = [
        Reference(h[None], head, i[None]).compare(o[None], head).kl for h, o, i in zip(hidden, other, ids, strict=True)
    ]
    assert whole.window_kl == pytest.approx(each, rel=1e-5)
    assert whole.kl == pytest.approx(sum(each) / len(each), rel=1e-5)
