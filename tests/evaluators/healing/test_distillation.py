"""Loss and gradient of chunked distillation are those of the plain formula under float64 autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evaluators.healing.distillation import DistillationLoss
from evaluators.model.head import Head, HeadSettings

WINDOWS, POSITIONS, HIDDEN, VOCABULARY = 2, 90, 24, 300


def case(noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, reference hidden states, reference head, ids; float64."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reference, reference_head = normal(WINDOWS, POSITIONS, HIDDEN), normal(VOCABULARY, HIDDEN) / 3
    hidden = reference + noise * normal(*reference.shape)
    head = reference_head + noise / 10 * normal(*reference_head.shape)
    ids = torch.randint(0, VOCABULARY, (WINDOWS, POSITIONS), generator=generator)
    return hidden, head, reference, reference_head, ids


def plain(
    hidden: Tensor,
    head: Tensor,
    reference: Tensor,
    reference_head: Tensor,
    ids: Tensor,
    loss: DistillationLoss,
    softcap: float | None,
) -> Tensor:
    """(1 - alpha) T^2 KL(softmax(p / T) || softmax(q / T)) + alpha CE(q, next token), as written in the papers."""
    q, p = hidden @ head.T, reference @ reference_head.T
    if softcap:
        q, p = softcap * (q / softcap).tanh(), softcap * (p / softcap).tanh()
    soft_q = functional.log_softmax(q / loss.temperature, -1)
    soft_p = functional.log_softmax(p / loss.temperature, -1)
    kl = (soft_p.exp() * (soft_p - soft_q)).sum(-1).mean()
    hard = functional.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return (1 - loss.alpha) * loss.temperature**2 * kl + loss.alpha * hard


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "capped"])
@pytest.mark.parametrize("chunk", [64, 1000], ids=["three chunks", "one chunk"])
@pytest.mark.parametrize("loss", [DistillationLoss(), DistillationLoss(2.5), DistillationLoss(4.0, 0.3)], ids=str)
@pytest.mark.parametrize("noise", [0.5, 0.01])
def test_loss_and_gradient_equal_float64_autograd_of_the_plain_formula(
    loss: DistillationLoss, noise: float, chunk: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluators.healing.distillation.chunk_positions", lambda head: chunk)
    tensors = case(noise)
    expected_hidden, expected_head = (tensor.clone().requires_grad_(True) for tensor in tensors[:2])
    expected = plain(expected_hidden, expected_head, *tensors[2:], loss, softcap)
    expected.backward()  # type: ignore[no-untyped-call]
    hidden = tensors[0].float().requires_grad_(True)
    head, reference, reference_head = (t.float() for t in tensors[1:4])
    head.requires_grad_(True)
    found = loss(
        hidden, Head(head, HeadSettings(softcap)), reference, Head(reference_head, HeadSettings(softcap)), tensors[4]
    )
    (3 * found).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5 if noise > 0.1 else 2e-3)
    for got, wanted in ((hidden.grad, expected_hidden.grad), (head.grad, expected_head.grad)):
        assert got is not None and wanted is not None
        assert float((got / 3 - wanted).norm() / wanted.norm()) < (1e-5 if noise > 0.1 else 3e-4)


def test_positions_that_do_not_count_have_no_loss_and_no_gradient() -> None:
    hidden, head, reference, reference_head, ids = (t.float() if t.is_floating_point() else t for t in case(0.1))
    loss, heads = DistillationLoss(2.0, 0.3), (Head(head), Head(reference_head))
    short, whole = hidden[:, 1:].clone().requires_grad_(True), hidden.clone().requires_grad_(True)
    expected = loss(short, heads[0], reference[:, 1:], heads[1], ids[:, 1:])
    found = loss(whole, heads[0], reference, heads[1], ids, unscored=1)
    assert found == expected
    (found + expected).backward()
    assert whole.grad is not None and short.grad is not None
    assert not whole.grad[:, 0].any() and torch.equal(whole.grad[:, 1:], short.grad)


def test_a_model_equal_to_its_reference_has_no_soft_loss_and_no_gradient() -> None:
    _, _, reference, head, ids = (t.float() if t.is_floating_point() else t for t in case(0.1))
    hidden = reference.clone().requires_grad_(True)
    loss = DistillationLoss(2.0)(hidden, Head(head), reference, Head(head), ids)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert float(loss.detach()) == 0 and float(hidden.grad.abs().max()) == 0
