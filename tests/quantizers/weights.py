"""Weights that tests quantize: seeded heavy-tailed ones, and real ones where the embedded model is there."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

EMBEDDED_MODEL = Path(__file__).parents[2] / "models" / "stdlib-6m" / "model.safetensors"

EXTREME_ROWS = {
    "zeros": torch.zeros(256),
    "constant": torch.full((256,), 0.37),
    "negative constant": torch.full((256,), -0.37),
    "huge": torch.linspace(-3e4, 3e4, 256),
    "beyond fp16": torch.linspace(-1e9, 1e9, 256),
    "tiny": torch.linspace(-1e-6, 1e-6, 256),
    "below fp16": torch.linspace(-1e-20, 1e-20, 256),
    "below float32 normal": torch.linspace(-1e-40, 1e-40, 256),
    "all positive": torch.linspace(0.5, 1.0, 256),
    "single outlier": torch.eye(256)[17] * 50,
    "outlier on noise": torch.linspace(-0.1, 0.1, 256) + torch.eye(256)[200] * -50,
    "one weight a sub-block": (torch.arange(256) % 16 == 3).float(),
}


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Gaussian with row and column scales and a Student t tail (4 degrees of freedom), about 0.05 wide."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    chi = torch.randn(4, rows, columns, generator=generator).square().mean(0).sqrt()
    row_scale = torch.randn(rows, 1, generator=generator).mul(0.3).exp()
    column_scale = torch.randn(1, columns, generator=generator).mul(0.3).exp()
    return 0.05 * normal / chi * row_scale * column_scale


def skewed_importance(columns: int, seed: int = 0) -> Tensor:
    """Log-normal, neighbours correlated, as mean squares of activations are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(columns + 7, generator=generator).unfold(0, 8, 1).sum(1) / 8**0.5
    return noise.mul(1.2).exp()


def correlated_hessian(columns: int, seed: int = 0, samples: int = 2048) -> Tensor:
    """Mean x x^T of inputs that mix a quarter as many sources, with noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(samples, columns // 4, generator=generator) @ mixing / (columns // 4) ** 0.5
    inputs += 0.3 * torch.randn(samples, columns, generator=generator)
    inputs *= skewed_importance(columns, seed).sqrt()
    return inputs.T @ inputs / samples


def embedded_matrices() -> dict[str, Tensor]:
    """Every weight matrix (rows, columns) of the embedded model; {} where it has not been trained."""
    if not EMBEDDED_MODEL.is_file():
        return {}
    return {name: W.float() for name, W in load_file(EMBEDDED_MODEL).items() if W.ndim == 2}


def extreme_rows() -> Tensor:
    """float32 (len(EXTREME_ROWS), 256)."""
    return torch.stack(list(EXTREME_ROWS.values()))
