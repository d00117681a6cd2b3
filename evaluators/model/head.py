"""This module holds the head of a language model, which turns final hidden states into logits.

Shapes: P positions, D hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evaluators.model.errors import ModelFolderError
from evaluators.model.stand_ins import StandIn, Unchanged, replaced

FACTORS = ("logit_scale", "lm_head_multiplier")  # of configurations
PROBE = torch.tensor([[[-30.0, -1.7, -0.3, 0.0, 0.1, 1.0, 2.9, 77.0]]])  # logits before whatever a model does with them


@dataclass(frozen=True)
class HeadSettings:
    """Holds what a model does with the products of head and hidden states.

    A divisor, as Granite has, or a factor, as Cohere has, comes first. A soft cap c, as Gemma 2 has, turns logits into
    c * tanh(logits / c).
    """

    softcap: float | None = None
    divisor: float | None = None
    factor: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "HeadSettings":
        """Return a model's settings. Raises ModelFolderError where it does something else with its logits."""
        config = model.config.get_text_config()
        factors = (getattr(config, name) for name in FACTORS if getattr(config, name, None) is not None)
        divisor, factor = getattr(config, "logits_scaling", None), next(factors, None)
        settings = cls(getattr(config, "final_logit_softcapping", None), divisor, factor)
        given = _after_head(model)
        for found in (settings, cls()):
            if torch.equal(found.apply(PROBE.clone()), given):
                return found
        raise ModelFolderError(
            f"expected a {model.config.model_type} model whose logits are scaled or capped, found "
            f"{given.flatten()[-1]:g} for {PROBE.flatten()[-1]:g}"
        )

    def apply(self, logits: Tensor) -> Tensor:
        """Change ``logits`` in place, and return them."""
        if self.divisor is not None:
            logits.div_(self.divisor)
        if self.factor is not None:
            logits.mul_(self.factor)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class _Output:
    """A decoder's output of PROBE, and of nothing else that one may return."""

    def __getattr__(self, name: str) -> Tensor | None:
        return PROBE.clone() if name == "last_hidden_state" else None

    def __getitem__(self, index: int) -> Tensor:
        return PROBE.clone()


class _Given(StandIn):
    """Takes the place of a decoder: returns PROBE as its hidden states."""

    def forward(self, *_: object, **__: object) -> _Output:
        return _Output()


@torch.no_grad()
def _after_head(model: PreTrainedModel) -> Tensor:
    """Return the logits of a model whose head returns PROBE."""
    head = model.get_output_embeddings()
    children = {name: Unchanged(part) if part is head else _Given(part) for name, part in model.named_children()}
    ids = torch.zeros(1, 1, dtype=torch.long)
    logits: Tensor = replaced(model, children)(input_ids=ids, use_cache=False).logits
    return logits


@dataclass(frozen=True)
class Head:
    """Computes logits with ``weight`` (V, D), ``bias`` (V,) if there is one, and ``settings``."""

    weight: Tensor
    settings: HeadSettings = HeadSettings()
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (P, V) of final hidden states (P, D).

        A soft cap works in place, so backpropagate with ``hidden_gradient``, not with autograd.
        """
        logits = hidden @ self.weight.T if self.bias is None else nn.functional.linear(hidden, self.weight, self.bias)
        return self.settings.apply(logits)

    def hidden_gradient(self, logits: Tensor, gradient: Tensor, out: Tensor) -> None:
        """Write the gradient with respect to the hidden states to ``out`` (P, D), and change ``gradient``.

        Arguments are as for ``to_products``.
        """
        torch.mm(self.to_products(logits, gradient), self.weight, out=out)

    def to_products(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Make ``gradient`` (P, V), with respect to logits, that with respect to the products of states and weight.

        ``logits`` (P, V) are those of ``__call__``. Works in place, and returns ``gradient``.
        """
        how = self.settings
        if how.softcap is not None:
            gradient.mul_(1 - (logits / how.softcap).square_())
        if how.factor is not None:
            gradient.mul_(how.factor)
        if how.divisor is not None:
            gradient.div_(how.divisor)
        return gradient
