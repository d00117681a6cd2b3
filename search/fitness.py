"""Fitness functions, which turn the measurements of a genome into the one number that the search minimizes."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bitgenome.common.section import Section
from search.budget import F16_BYTES

SMALLEST_MSE = 1e-12  # keeps 1 / MSE finite for an output that did not change


class FitnessSettings(Section):
    """Settings of the fitness: which loss to use, and the weights of its terms.

    ``distortion`` is kl_weight * KL + reconstruction_weight * reconstruction, to be minimized. ``weighted`` is the
    fitness of the first mixed-precision searches, alpha * (1 / MSE) + beta * compression, to be maximized.
    """

    kind: Literal["distortion", "weighted"] = Field("distortion", description="which loss")
    kl_weight: float = Field(1.0, ge=0, description="of distortion")
    reconstruction_weight: float = Field(0.0, ge=0, description="of distortion")
    alpha: float = Field(1.0, ge=0, description="of weighted")
    beta: float = Field(1.0, ge=0, description="of weighted")

    @model_validator(mode="after")
    def something(self) -> Self:
        """Raise ValueError if both weights of the chosen fitness are zero."""
        pair = (self.kl_weight, self.reconstruction_weight) if self.kind == "distortion" else (self.alpha, self.beta)
        if max(pair) == 0:
            raise ValueError(f"both weights of the {self.kind} fitness are zero: nothing is left to search for")
        return self


def distortion_loss(kl: float, reconstruction: float, kl_weight: float, reconstruction_weight: float) -> float:
    """Return kl_weight * KL + reconstruction_weight * reconstruction.

    KL is in nats per token; reconstruction is the relative Hessian-weighted error.
    """
    # A term with weight zero is left out, even one that was not measured (NaN).
    terms = ((kl_weight, kl), (reconstruction_weight, reconstruction))
    return sum(weight * value for weight, value in terms if weight)


def compression_of(file_bytes: int, weights: int) -> float:
    """Return how many times smaller the file is than its weights at F16; larger is better."""
    return F16_BYTES * weights / file_bytes


def weighted_fitness(logit_mse: float, compression: float, alpha: float, beta: float) -> float:
    """Return alpha * (1 / MSE) + beta * compression, as in the first mixed-precision searches; larger is better."""
    return alpha / max(logit_mse, SMALLEST_MSE) + beta * compression


def search_loss(
    settings: FitnessSettings, *, kl: float, logit_mse: float, reconstruction: float, file_bytes: int, weights: int
) -> float:
    """Return the loss of a genome as Evaluation.loss holds it; smaller is better.

    ``kl`` is in nats per token, ``reconstruction`` is the relative Hessian-weighted error, and ``weights`` is the
    number of weights in the whole file. The weighted fitness grows with quality, so its loss is its negative.
    """
    if settings.kind == "weighted":
        return -weighted_fitness(logit_mse, compression_of(file_bytes, weights), settings.alpha, settings.beta)
    return distortion_loss(kl, reconstruction, settings.kl_weight, settings.reconstruction_weight)
