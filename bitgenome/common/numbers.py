"""Turns measured numbers into those that are reported."""

import math
import sys

LARGEST_LOSS = math.log(sys.float_info.max)


def perplexity_of(loss: float) -> float:
    """Return exp(loss) for a cross-entropy in nats per token, at most the largest float.

    A model whose logits lie hundreds of nats apart can be wrong by more than 709 nats on average, where exp overflows;
    JSON files hold no infinity. NaN stays NaN.
    """
    return math.exp(min(loss, LARGEST_LOSS))
