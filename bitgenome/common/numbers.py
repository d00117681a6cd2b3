"""Turns measured numbers into those that are reported."""

import math
import sys

LARGEST_LOSS = math.log(sys.float_info.max)
LARGEST_PLAIN = 1e6


def perplexity_of(loss: float) -> float:
    """Return exp(loss) for a cross-entropy in nats per token, at most the largest float.

    A model whose logits lie hundreds of nats apart can be wrong by more than 709 nats on average, where exp overflows;
    JSON files hold no infinity. NaN stays NaN.
    """
    return math.exp(min(loss, LARGEST_LOSS))


def perplexity_text(perplexity: float) -> str:
    """Return a perplexity for people: with three decimals, or from a million on with three digits and an exponent."""
    return f"{perplexity:.3f}" if perplexity < LARGEST_PLAIN else f"{perplexity:.2e}"
