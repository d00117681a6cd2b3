"""Settings of evaluation and healing, apart from the models that they steer."""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bitgenome.common.section import Section

Compute = Literal["auto", "float32", "bfloat16", "float16"]  # type that blocks multiply in while searching
Activations = Literal["float", "q8"]  # inputs of quantized products: as they are, or in llama.cpp's 8-bit blocks
WARM_UP = 0.05  # of all steps, at a learning rate that rises linearly
# The tensors' distance to their optimum grows as the root of the divergence. Test KL of the embedded model with
# attention at Q3_K, MLP at Q2_K and embedding at Q6_K (KL 0.047) after 30 steps of 1,024 tokens, by learning rate:
# -12.1 % at 0.0025, -12.8 % at 0.0045, -11.8 % at 0.009. Uniform Q4_K (KL 0.010) gains nothing at 0.01.
RATE_PER_ROOT_KL = 0.02


class HealingSettings(Section):
    """Tuning of the tensors that the file keeps in float32, after the search; taken only if validation text gains."""

    enabled: Literal["auto", "on", "off"] = "auto"
    variant: Literal["full", "blockwise"] = Field("full", description="the whole model, or one block in memory")
    steps: int = Field(60, ge=1, description="of the whole model, or of each block")
    batch_tokens: int = Field(1024, ge=1, description="tokens of calibration text a step, at least one window")
    learning_rate: float | None = Field(None, gt=0, description="of Adam at its highest; by default by the divergence")
    loss: Literal["kl", "distillation"] = "kl"
    temperature: float | None = Field(None, gt=0, description="of both models' logits; 1 for kl, 4 for distillation")
    alpha: float | None = Field(None, ge=0, le=1, description="weight of the text's own next token; 0.3")
    seed: int = Field(0, ge=0, lt=2**32)

    @field_validator("enabled", mode="before")
    @classmethod
    def yaml_on_off(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # a bare on or off in YAML

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.alpha is not None and self.loss == "kl":
            raise ValueError(f"expected alpha only with loss: distillation, found {self.alpha} with loss: kl")
        return self

    @property
    def chosen_temperature(self) -> float:
        """The temperature given, else that of the loss."""
        return self.temperature or (1.0 if self.loss == "kl" else 4.0)

    @property
    def chosen_alpha(self) -> float:
        """The weight given, else that of the loss."""
        if self.loss == "kl":
            return 0.0
        return 0.3 if self.alpha is None else self.alpha

    def with_rate_for(self, kl: float) -> "HealingSettings":
        """Return these settings with a learning rate, where none is given that for a divergence of ``kl``."""
        rate = self.learning_rate or RATE_PER_ROOT_KL * math.sqrt(max(kl, 0.0))
        return self.model_copy(update={"learning_rate": rate})

    @property
    def deciding(self) -> dict[str, Any]:
        """What of them decides the tuned tensors, by name."""
        chosen = self.model_dump(include={"steps", "batch_tokens", "learning_rate", "variant", "seed"})
        return chosen | {"temperature": self.chosen_temperature, "alpha": self.chosen_alpha}

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``: a linear rise, then half a cosine down to zero."""
        assert self.learning_rate is not None, "with_rate_for chooses one"
        rise = max(1, round(WARM_UP * self.steps))
        return self.learning_rate * min(1, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batch_windows(self, window: int) -> int:
        """Return the windows of ``window`` tokens in one step."""
        return max(1, self.batch_tokens // window)
