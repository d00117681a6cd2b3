"""Settings of evaluation and healing; importing them loads no model code."""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.section import Section

Compute = Literal["auto", "float32", "bfloat16", "float16"]  # dtype of the blocks' matrix products in the search
Activations = Literal["auto", "float", "q8"]  # inputs of quantized layers: unrounded, or in llama.cpp's 8-bit blocks
WARM_UP = 0.05  # share of the steps in which the learning rate rises linearly
# Learning rate per square root of the KL: the tensors' distance to their optimum grows with that root. Measured change
# of the test KL of the embedded model, with attention at Q3_K, MLP at Q2_K and embedding at Q6_K (KL 0.047), after 30
# steps of 1,024 tokens, by learning rate: -12.1 % at 0.0025, -12.8 % at 0.0045, -11.8 % at 0.009. Uniform Q4_K (KL
# 0.010) gains nothing at 0.01.
RATE_PER_ROOT_KL = 0.02
# Learning rate of the multipliers of block scales, relative to that of float32 tensors. Validation KL of the embedded
# model at 3.5 bits (.03033), 120 steps: .02774 without scales, .02668 at 0.3, .02667 at 0.6, .02728 at 1.2.
SCALE_RATE = 0.4  # between the two that are alike


class HealingSettings(Section):
    """Settings of healing, which tunes the file's float32 tensors (norms, biases) and block scales after the search.

    The tuned values are used only if the KL on validation text falls.
    """

    enabled: Literal["auto", "on", "off"] = Field(
        "auto", description="auto and on take the tuned values if they help; on warns if they do not"
    )
    variant: Literal["auto", "full", "blockwise"] = Field(
        "auto", description="the whole model, or one block in memory; auto: the whole where it fits"
    )
    scales: bool = Field(
        True,
        description="tune d and dmin of packed blocks too; block by block not those of embeddings",
    )
    steps: int = Field(120, ge=1, description="of the whole model, or of each block")
    batch_tokens: int = Field(1024, ge=1, description="tokens of calibration text a step, at least one window")
    learning_rate: float | None = Field(None, gt=0, description="of Adam at its highest; by default by the divergence")
    loss: Literal["kl", "distillation"] = Field(
        "kl", description="to the full-precision model, or with the text's own tokens"
    )
    temperature: float | None = Field(None, gt=0, description="of both models' logits; 1 for kl, 4 for distillation")
    alpha: float | None = Field(None, ge=0, le=1, description="weight of the text's own next token; 0.3")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of windows")

    @field_validator("enabled", mode="before")
    @classmethod
    def yaml_on_off(cls, value: Any) -> Any:
        """Map the booleans that YAML makes of a bare on or off back to these words."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Raise ValueError for an ``alpha`` that the loss does not use."""
        if self.alpha is not None and self.loss == "kl":
            raise ValueError(f"expected alpha only with loss: distillation, found {self.alpha} with loss: kl")
        return self

    @property
    def chosen_temperature(self) -> float:
        """The temperature that was set, else the default of the loss: 1 for kl, 4 for distillation."""
        return self.temperature or (1.0 if self.loss == "kl" else 4.0)

    @property
    def chosen_alpha(self) -> float:
        """The weight of the next-token loss: 0 for kl, else the one that was set or 0.3."""
        if self.loss == "kl":
            return 0.0
        return 0.3 if self.alpha is None else self.alpha

    def with_rate_for(self, kl: float) -> "HealingSettings":
        """Return these settings with a learning rate: the one that was set, else one that suits a KL of ``kl`` nats."""
        rate = self.learning_rate or RATE_PER_ROOT_KL * math.sqrt(max(kl, 0.0))
        return self.model_copy(update={"learning_rate": rate})

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that influence the tuned values, by name; they belong in a digest."""
        chosen = self.model_dump(include={"scales", "steps", "batch_tokens", "learning_rate", "variant", "seed"})
        chosen |= {"scale_rate": SCALE_RATE} if self.scales else {}
        return chosen | {"temperature": self.chosen_temperature, "alpha": self.chosen_alpha}

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step`` (from 0): half a cosine down to zero, with a linear warm-up."""
        assert self.learning_rate is not None, "with_rate_for chooses one"
        rise = max(1, round(WARM_UP * self.steps))
        return self.learning_rate * min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batch_windows(self, window: int) -> int:
        """Return how many windows of ``window`` tokens one step takes, at least one."""
        return max(1, self.batch_tokens // window)
