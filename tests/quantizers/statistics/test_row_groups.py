"""Hessians of rows: each group's own, leaning on all the more the less was seen of it."""

import pytest
import torch

from quantizers.statistics.row_clusters import grouped_rows
from quantizers.statistics.row_groups import (
    GROUPS_BYTES,
    IDENTITY,
    MOST_GROUPS,
    SHRINKAGE,
    RowAccumulator,
    number_of_groups,
    row_entries,
)

V, D, P = 6, 4, 40
LABELS = torch.tensor([0, 1, 1, 2, 2, 2])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_group_sums_what_its_rows_weigh() -> None:
    x, weights = random(P, D), random(P, V, seed=1).abs()
    found = RowAccumulator(LABELS, D)
    for part in (slice(0, 7), slice(7, P)):
        found.add_outputs(x[part], weights[part])
    sums = found.result()
    for group in range(3):
        w = weights[:, group == LABELS].sum(1)
        assert torch.allclose(sums.sums[group], torch.einsum("p,pi,pj->ij", w, x, x), rtol=1e-5)
        assert float(sums.seen[group]) == pytest.approx(float(w.sum() ** 2 / w.square().sum()), rel=1e-5)


def test_a_lookup_counts_the_positions_of_its_tokens() -> None:
    ids, scores = torch.tensor([0, 3, 3, 5, 1]), random(5, D)
    found = RowAccumulator(LABELS, D)
    found.add_rows(ids, scores)
    sums = found.result()
    assert sums.seen.tolist() == [1, 1, 3]
    assert torch.allclose(sums.sums[2], scores[1:4].T @ scores[1:4])


def test_hessians_lean_on_all_and_have_the_scale_of_a_row() -> None:
    found = RowAccumulator(LABELS, D)
    found.add_rows(torch.tensor([0] * 30 + [3] * 2), random(32, D))
    sums = found.result()
    hessians = list(sums.hessians())
    mean = sums.sums.sum(0) / sums.sums.sum(0).trace()
    seen, prior = 30, SHRINKAGE * D
    own = sums.sums[0] / sums.sums[0].trace()
    apart = torch.eye(D) * IDENTITY / D
    expected = ((own * seen + mean * prior) / (seen + prior) + apart) * sums.sums[0].trace()
    assert torch.allclose(hessians[0], expected, rtol=1e-5)
    of_three = float(sums.sums[2].trace()) / 3
    assert float(hessians[2].trace()) == pytest.approx(of_three * (1 + IDENTITY))
    unseen = hessians[1]
    assert torch.allclose(unseen / unseen.trace(), (mean + apart) / (1 + IDENTITY), atol=1e-6)
    assert 0 < unseen.trace() < 1e-4 * hessians[0].trace()


def test_uses_of_a_tied_matrix_add_up() -> None:
    head, lookup = RowAccumulator(LABELS, D), RowAccumulator(LABELS, D)
    head.add_outputs(random(P, D), torch.ones(P, V))
    lookup.add_rows(torch.tensor([0, 1]), random(2, D))
    total, more = head.result(), lookup.result()
    before = total.sums.clone(), total.seen.clone()
    total.add(more)
    assert torch.equal(total.sums, before[0] + more.sums) and torch.equal(total.seen, before[1] + more.seen)


def test_nothing_seen_is_said() -> None:
    sums = RowAccumulator(LABELS, D).result()
    assert not sums.any
    with pytest.raises(ValueError, match="have seen nothing"):
        next(sums.hessians())
    sums.sums[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="Hessians of rows hold non-finite values"):
        _ = sums.any
    with pytest.raises(ValueError, match="same groups"):
        sums.add(RowAccumulator(LABELS.flip(0), D).result())


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_rows_that_point_the_same_way_share_a_group() -> None:
    centres = random(8, 96)
    W = centres.repeat_interleave(20, 0) * random(160, 1, seed=1).abs() + 0.01 * random(160, 96, seed=2)
    labels = grouped_rows(W, torch.ones(160), 8)
    assert torch.equal(labels, grouped_rows(W, torch.ones(160), 8))
    assert all(len(part.unique()) == 1 for part in labels.split(20)) and len(labels.unique()) == 8
    same = grouped_rows(torch.ones(64, 96), torch.zeros(64), 4)  # rows that cannot be told apart
    assert same.unique().tolist() == list(range(len(same.unique())))


def test_groups_have_rows_enough_and_fit() -> None:
    assert number_of_groups(100, 64) == 1
    assert number_of_groups(4096, 256) == 32
    assert number_of_groups(49152, 576) == MOST_GROUPS
    assert 4 * row_entries(128256, 4096) <= GROUPS_BYTES
    assert number_of_groups(262144, 32768) == 1
