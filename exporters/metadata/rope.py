"""Translates rotary embedding settings from config.json to llama.cpp's keys and Llama 3's frequency factors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporters.metadata.architectures import UnsupportedArchitectureError

DEFAULT_THETA = 10000.0  # transformers' default for the four architectures
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of both transformers and llama.cpp


@dataclass(frozen=True)
class Rope:
    """Rotary embedding settings of a model.

    ``kind`` is "default", "linear", "yarn" or "llama3"; ``parameters`` are transformers' own for that kind.
    """

    theta: float
    kind: str
    parameters: Mapping[str, Any]


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Return the settings in ``rope_parameters`` (transformers 5) or in ``rope_theta`` and ``rope_scaling`` (older).

    Raises UnsupportedArchitectureError for a scaling that llama.cpp would compute differently.
    """
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise UnsupportedArchitectureError(f"expected an object for {key} in config.json, found {given!r}")
        parameters |= given
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or DEFAULT_THETA
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    partial = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if not isinstance(kind, str) or kind not in _ALLOWED:
        raise UnsupportedArchitectureError(
            f"expected rope scaling of type {', '.join(_ALLOWED)}, found {kind!r} in config.json"
        )
    if partial != 1.0:
        raise UnsupportedArchitectureError(f"expected rotary embedding on whole heads, found a factor of {partial}")
    extra = {name for name, value in parameters.items() if value is not None} - _ALLOWED[kind]
    if extra and kind != "default":
        raise UnsupportedArchitectureError(
            f"rope scaling {kind!r} with {', '.join(sorted(extra))} has no equivalent in llama.cpp"
        )
    required = _ALLOWED[kind] - (set() if kind == "llama3" else OPTIONAL)
    numbers = {name: parameters.get(name) for name in _ALLOWED[kind] if name in required or parameters.get(name)}
    for name, value in {"rope_theta": theta, **numbers}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UnsupportedArchitectureError(
                f"expected a positive number as {name} for rope scaling {kind!r} in config.json, found {value!r}"
            )
    return Rope(float(theta), kind, parameters)


OPTIONAL = {"original_max_position_embeddings", *YARN_DEFAULTS}  # have defaults, except in llama3
_ALLOWED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def scaling_keys(rope: Rope, context: int) -> dict[str, str | float | int]:
    """Return llama.cpp's ``rope.scaling.*`` keys for linear and YaRN scaling, and none for other kinds.

    ``context`` is the model's context length in tokens, YaRN's default for the original one.
    """
    if rope.kind not in ("linear", "yarn"):
        return {}
    keys: dict[str, str | float | int] = {
        "rope.scaling.type": rope.kind,
        "rope.scaling.factor": float(rope.parameters["factor"]),
    }
    if rope.kind == "yarn":
        original = rope.parameters.get("original_max_position_embeddings") or context
        keys["rope.scaling.original_context_length"] = int(original)
        for name, default in YARN_DEFAULTS.items():
            keys[f"rope.scaling.yarn_{name}"] = float(rope.parameters.get(name) or default)
    return keys


def frequency_factors(rope: Rope, head_dim: int) -> np.ndarray | None:
    """Return the divisors, float32 (head_dim / 2,), of the rotary frequencies for Llama 3's scaling, else None.

    Low frequencies are divided by ``factor``, high ones kept, and those in between interpolated. Source:
    ``_compute_llama3_parameters`` of transformers.
    """
    if rope.kind != "llama3":
        return None
    factor, low, high, context = (
        float(rope.parameters[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelengths = 2 * math.pi * rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
