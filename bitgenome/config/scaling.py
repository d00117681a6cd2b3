"""Channel scaling as a configuration says it."""

from typing import Literal

from pydantic import Field

from bitgenome.config.file import Section
from quantizers.rounding.channel_scaling import ScalingSettings


class ScalingConfig(Section):
    """Channel scaling, folded into the tensors before each input; the function stays the same.

    ``smoothquant``: max|X|^alpha / max|W|^(1 - alpha); ``awq``: alpha searched for every input.
    """

    kind: Literal["none", "smoothquant", "awq"] = "none"
    alpha: float = Field(0.5, ge=0, le=1, description="of smoothquant")
    grid: int = Field(20, ge=1, le=1000, description="values of alpha that awq tries")
    protect: float = Field(0.0, ge=0, lt=1, description="share of columns, the most salient, that are doubled")

    @property
    def settings(self) -> ScalingSettings:
        return ScalingSettings(**self.model_dump())
