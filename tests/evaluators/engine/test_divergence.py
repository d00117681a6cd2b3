"""KL, logit error and perplexity are those of float64 log-softmax."""

import math

import pytest
import torch

from evaluators.engine.divergence import Reference, kl_of_differences
from evaluators.model.head import Head, HeadSettings

VOCABULARY, HIDDEN = 700, 48


def case(
    noise: float, dtype: torch.dtype = torch.float32, softcap: float | None = None
) -> tuple[torch.Tensor, Head, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 50, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64) / 4
    other = hidden + noise * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (2, 50), generator=generator)
    return hidden.to(dtype), Head(head.to(dtype), HeadSettings(softcap)), other.to(dtype), ids


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


def test_positions_that_do_not_count_do_not_matter() -> None:
    hidden, head, other, ids = case(0.1)
    expected = Reference(hidden[:, 1:], head, ids[:, 1:]).compare(other[:, 1:], head)
    other[:, 0] = -hidden[:, 0]
    assert Reference(hidden, head, ids, unscored=1).compare(other, head) == expected


@pytest.mark.parametrize("lower", [0.0, -200.0])
@pytest.mark.parametrize("spread", [50, 95, 104, 250, 3000])
def test_logits_far_apart_have_the_divergence_of_float64(spread: float, lower: float) -> None:
    p, q = torch.randn(2, 70, 512, generator=torch.Generator().manual_seed(0))
    p[1:, 3] += spread
    q[1:, 7] += spread
    q[1:] += lower
    expected, other = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl, log_ratio = kl_of_differences(p, p.softmax(-1), q - p)
    assert kl.numpy() == pytest.approx((expected.exp() * (expected - other)).sum(-1).numpy(), rel=1e-5)
    assert log_ratio.numpy() == pytest.approx((q.double().logsumexp(-1) - p.double().logsumexp(-1)).numpy(), abs=1e-3)
    alone, _ = kl_of_differences(p[:1], p[:1].softmax(-1), (q - p)[:1])
    assert torch.equal(kl[:1], alone), "a position far apart must not change the others of its chunk"


def test_a_model_that_is_certain_and_wrong_has_finite_figures() -> None:
    hidden, head, _, ids = case(0.0)
    sharp = Head(head.weight * 400)
    found = Reference(hidden, sharp, ids).compare(-hidden, sharp)
    assert 500 < found.kl < math.inf
    assert found.perplexity < math.inf


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
