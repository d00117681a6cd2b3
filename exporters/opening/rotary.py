"""Translates llama.cpp's keys and tensors of rotary embeddings back to transformers' ``rope_parameters``."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from exporters.metadata.rope import DEFAULT_THETA, Rope, frequency_factors
from exporters.opening.source import GgufModel, GgufModelError

FACTORS = "rope_freqs.weight"  # divisors of the frequencies, float32 (head_dim / 2,): Llama 3's scaling
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROTARY_TENSORS = (FACTORS, LONG, SHORT)
SCALING = {  # key -> parameter of transformers
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
READ = {*SCALING, "rope.scaling.type", "rope.freq_base", "rope.dimension_count"}
CLOSE = 1e-5  # relative difference of divisors that were computed in another order
LLAMA3_LOW = 1.0  # low_freq_factor of every model of the kind: the three parameters have a common scale
LLAMA3_HIGH = 4.0  # high_freq_factor of every model of the kind, where the file does not tell it
LLAMA3_CONTEXTS = range(4, 25)  # powers of two


def rope_parameters(model: GgufModel, head_dim: int, usual: str) -> dict[str, Any]:
    """Return what the file says of rotary embeddings: theta, part of the head, and scaling.

    ``usual`` is the kind that the model's configuration has by default: proportional embeddings turn a part of the
    head with the frequencies of the whole.

    Raises GgufModelError for a scaling that transformers does not have.
    """
    keys = model.hyperparameters()
    kind = keys.get("rope.scaling.type", "none")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", DEFAULT_THETA)}
    if (dimensions := keys.get("rope.dimension_count", head_dim)) != head_dim:
        found["partial_rotary_factor"] = dimensions / head_dim
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise GgufModelError(f"expected rope scaling none, linear, yarn or longrope, found {kind!r} in {model.path}")
    given = {name: keys[key] for key, name in SCALING.items() if key in keys}
    if kind == "linear":
        found |= {"rope_type": "linear", "factor": given["factor"]}
    elif kind == "yarn":
        found |= {"rope_type": "yarn", **given}
    elif LONG in model.tensors and SHORT in model.tensors:
        given |= {"long_factor": model.floats(LONG).tolist(), "short_factor": model.floats(SHORT).tolist()}
        found |= {"rope_type": "longrope", **given}
    if FACTORS in model.tensors and usual == "proportional":
        found |= {"rope_type": usual, "partial_rotary_factor": float(np.mean(model.floats(FACTORS) == 1.0))}
    elif FACTORS in model.tensors:
        found |= llama3_scaling(model, found["rope_theta"], dimensions)
    return found


def llama3_scaling(model: GgufModel, theta: float, dimensions: int) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaling that give the file's divisors of rotary frequencies.

    Between the frequencies that it keeps and those that it divides by ``factor``, 1 / divisor is linear in the
    frequency, and the line tells the other two. Raises GgufModelError for divisors that it does not give.
    """
    divisors = model.floats(FACTORS).reshape(-1).astype(np.float64)
    if np.all(divisors == 1.0):
        return {}
    factor = float(divisors.max())
    frequencies = theta ** (-np.arange(0, dimensions, 2, dtype=np.float64) / dimensions) / (2 * math.pi)
    between = (divisors > 1.0) & (divisors < factor)
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    candidates = [(LLAMA3_HIGH, 2.0**power) for power in LLAMA3_CONTEXTS]  # where no frequency is between
    if len(smooth) == 1:
        span = LLAMA3_HIGH - LLAMA3_LOW
        candidates = [(LLAMA3_HIGH, round((smooth[0] * span + LLAMA3_LOW) / frequencies[between][0]))]
    elif len(smooth) > 1:
        slope, offset = np.polyfit(frequencies[between], smooth, 1)
        span = -LLAMA3_LOW / offset
        candidates = [(round(LLAMA3_LOW + span, 3), round(slope * span))]
    for high, original in candidates:
        scaling: Mapping[str, Any] = {
            "factor": round(factor, 5),
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original),
        }
        expected = frequency_factors(Rope(theta, "llama3", scaling), dimensions) if high > LLAMA3_LOW else None
        if expected is not None and np.allclose(expected, divisors, rtol=CLOSE):
            return {"rope_type": "llama3", **scaling}
    raise GgufModelError(
        f"expected the rotary frequencies of Llama 3's scaling in {FACTORS} of {model.path}, found others: take the "
        "Hugging Face folder that the file was made from"
    )
