"""This module divides the rows of a head or a lookup table into groups that share a Hessian.

How groups of other kinds do is in quantizers.statistics.row_groups.
"""

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

PROJECTED = 64  # dimensions in which rows are compared
ROWS = 8192  # that are projected at once


def grouped_rows(W: Tensor, counts: Tensor, groups: int) -> Tensor:
    """Return the group (V,) of each row of W (V, D), at most ``groups``, all of them with rows.

    Rows are clustered by direction; ``counts`` (V,) is how often each one's token occurs in the text.
    """
    if groups == 1:
        return torch.zeros(len(W), dtype=torch.long, device=W.device)
    directions = torch.cat([_directions(part) for part in W.split(ROWS)])
    means = KMeans(groups, n_init=1, random_state=0)
    with threadpool_limits(1):  # several threads add up in any order
        found = means.fit_predict(directions.cpu().numpy(), sample_weight=(counts.double() + 1).sqrt().cpu().numpy())
    return torch.from_numpy(found).long().unique(return_inverse=True)[1].to(W.device)


def _directions(W: Tensor) -> Tensor:
    """Return the directions of rows (V, D), in at most PROJECTED dimensions."""
    found = normalize(W.float(), dim=1)
    if W.shape[1] <= PROJECTED:
        return found
    projection = torch.randn(W.shape[1], PROJECTED, generator=torch.Generator().manual_seed(0))
    return found @ projection.to(W.device)
