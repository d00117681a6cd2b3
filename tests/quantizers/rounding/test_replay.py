"""Recorded kernels give the bytes of the functions that were recorded, and no function waits for the device."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import KernelCount
from bitgenome.common import replay
from quantizers.formats.codebooks import CODEBOOK_GRIDS
from quantizers.formats.table import FORMATS
from quantizers.rounding import codebook_loop, codebook_search
from quantizers.rounding.sparsegpt import compensate
from tests.quantizers.recorded import recorded
from tests.quantizers.weights import correlated_hessian, heavy_tailed

__all__ = ["recorded"]

QUICK = ("Q2_K", "Q4_1", "IQ4_XS")  # of every kind one: affine and symmetric, nested and not, with a table
MOST_LAUNCHES = 1  # one by one, of a column and level beside recordings; without them there are some 36
SCALAR = [name for name, fmt in FORMATS.items() if not fmt.is_float and name not in CODEBOOK_GRIDS]


def rounded(W: Tensor, H: Tensor, names: Sequence[str]) -> dict[str, list[int]]:
    found = compensate({"w": W}, {"w": [FORMATS[name] for name in names]}, H)["w"]
    return {name: level.packed.data.tolist() for name, level in found.items()}


@pytest.mark.parametrize("names", [QUICK, pytest.param(SCALAR, marks=pytest.mark.long)])
def test_replays_write_the_bytes_of_the_path_without_recordings(
    names: Sequence[str], monkeypatch: pytest.MonkeyPatch, recorded: replay.Recordings
) -> None:
    W = heavy_tailed(40, 512)
    W[3], W[5] = 0, 1e4 * W[5]
    H = correlated_hessian(512)
    recorded.enabled = False
    expected = rounded(W, H, names)
    recorded.enabled = True
    replays = 0
    once = replay._Recording.run

    def counted(self: replay._Recording, tensors: list[Tensor]) -> replay.Tensors:
        nonlocal replays
        replays += 1
        return once(self, tensors)

    monkeypatch.setattr(replay._Recording, "run", counted)
    assert rounded(W, H, names) == expected
    assert recorded.enabled
    assert replays > 4 * len(names)
    for recording in filter(None, recorded._kept.values()):
        recording.replay = lambda: None  # the device's work
    with KernelCount() as launched:
        rounded(W, H, names)
    assert launched.kernels < MOST_LAUNCHES * len(W.T) * len(names)


@pytest.mark.parametrize(
    "name", ["IQ2_XXS", *(pytest.param(n, marks=pytest.mark.long) for n in CODEBOOK_GRIDS if n != "IQ2_XXS")]
)
def test_codewords_are_found_without_waiting(
    name: str, monkeypatch: pytest.MonkeyPatch, recorded: replay.Recordings
) -> None:
    W, H = heavy_tailed(32, 512), correlated_hessian(512)
    recorded.enabled = False
    expected = compensate({"w": W}, {"w": [FORMATS[name]]}, H)["w"][name]
    for module in (codebook_loop, codebook_search):
        monkeypatch.setattr(module, "never_waits", lambda device: True)
    eager = compensate({"w": W}, {"w": [FORMATS[name]]}, H)["w"][name]
    recorded.enabled = True
    found = compensate({"w": W}, {"w": [FORMATS[name]]}, H)["w"][name]
    assert recorded.enabled
    assert torch.equal(found.packed.data, eager.packed.data)
    assert (found.packed.data == expected.packed.data).float().mean() > 0.99
    assert found.error == pytest.approx(expected.error, rel=1e-4)


def test_what_cannot_be_recorded_runs_as_it_is(recorded: replay.Recordings, caplog: pytest.LogCaptureFixture) -> None:
    def doubled(x: Tensor) -> list[Tensor]:
        return [2 * x if x.sum().item() > 0 else x]

    for value in (1.0, 2.0, 3.0):
        (found,) = replay.replayed(doubled, (), (torch.full((2, 2), value),))
        assert torch.equal(found, torch.full((2, 2), 2 * value))
    assert not recorded.enabled
    assert "one by one" in caplog.text


def test_recordings_keep_within_their_bytes(recorded: replay.Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_BYTES", 3000)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)

    def negative(x: Tensor) -> list[Tensor]:
        return [-x]

    for _ in range(3):
        for size in (10, 20, 30):  # 400, 1600 and 3600 bytes, and as much again of results
            x = torch.full((size, size), float(size))
            (found,) = replay.replayed(negative, (), (x,))
            assert torch.equal(found, -x)
    kept = [r for r in recorded._kept.values() if r is not None]
    assert [tuple(r.inputs[0].shape) for r in kept] == [(30, 30)]
