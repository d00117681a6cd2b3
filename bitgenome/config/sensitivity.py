"""The setting of the sensitivities that a search starts from."""

from typing import Literal

from bitgenome.config.file import Section


class SensitivityConfig(Section):
    """What the first additive table of a search holds, measured on ``text.tokens.sensitivity`` tokens.

    ``kl``: the KL of every gene at every level, the rest at full precision. ``gradient``: its estimate from one
    backward pass over the text, for large models. ``around_base``: what the level adds to the KL of the uniform genome
    that is nearest to the budget.
    """

    measure: Literal["kl", "gradient", "around_base"] = "kl"
