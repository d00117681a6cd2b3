"""Recorded kernels give the bytes of the functions that were recorded, and no function waits for the device."""

import pytest
from torch import Tensor

from bitgenome.common import replay
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.table import FORMATS
from quantizers.rounding.sparsegpt import compensate
from tests.quantizers.recorded import recorded
from tests.quantizers.weights import correlated_hessian, heavy_tailed

__all__ = ["recorded"]

SCALAR = [fmt for fmt in FORMATS.values() if not fmt.is_float and fmt.name not in CODEBOOK_GRIDS]


def rounded(W: Tensor, H: Tensor) -> dict[str, list[int]]:
    return {name: level.packed.data.tolist() for name, level in compensate({"w": W}, {"w": SCALAR}, H)["w"].items()}


def test_replays_write_the_bytes_of_the_path_without_recordings(
    monkeypatch: pytest.MonkeyPatch, recorded: replay.Recordings
) -> None:
    W = heavy_tailed(40, 1024)
    W[3], W[5] = 0, 1e4 * W[5]
    H = correlated_hessian(1024)
    recorded.enabled = False
    expected = rounded(W, H)
    recorded.enabled = True
    replays = 0
    once = replay._Recording.run

    def counted(self: replay._Recording, tensors: list[Tensor]) -> replay.Tensors:
        nonlocal replays
        replays += 1
        return once(self, tensors)

    monkeypatch.setattr(replay._Recording, "run", counted)
    assert rounded(W, H) == expected
    assert recorded.enabled
    assert replays > 100
