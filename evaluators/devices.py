"""The only place that names accelerators."""

import torch


def best_device() -> torch.device:
    """cuda where there is one, else cpu. Not mps yet: it has no float64, which Hessians are factored in."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
