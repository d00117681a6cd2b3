"""This module computes the input of the first block from token ids: the embedding, and what a decoder does with it.

Shapes: B windows, T positions, D hidden size.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from evaluators.model.parts import Parts


class Entrance:
    """Returns the first block's input for token ids; the modules that run before it must be loaded.

    Most decoders pass the embeddings on as they are, or times a number; others run whole, up to their first block.
    """

    def __init__(self, parts: Parts, device: torch.device):
        self._parts = parts
        self._factor: float | None = None
        runs = device.type != "meta"  # a model of shapes alone is not run
        self.plain = runs and len(parts.lookups) == 1 and not parts.entry and self._is_product()

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the first block's input (B, T, D) for token ids (B, T)."""
        if not self.plain:
            return self._run(ids)
        embeddings: Tensor = self._parts.embedding(ids)
        return embeddings if self._factor is None else embeddings * self._factor

    def row_gradients(self, ids: Tensor, gradient: Tensor) -> list[Tensor]:
        """Return the gradients (B, T, columns) at each table's looked-up rows, given that at the first block's input.

        The modules before the first block must be loaded unless this is a product.
        """
        scales = [getattr(part, "embed_scale", 1.0) for part in self._parts.lookups]  # Gemma scales what it looks up
        if self.plain:
            return [gradient * scales[0] * (1.0 if self._factor is None else self._factor)]
        rows: dict[nn.Module, Tensor] = {}

        def follow(module: nn.Module, given: object, output: Tensor) -> Tensor:
            rows[module] = output.detach().requires_grad_(True)
            return rows[module]

        with torch.enable_grad(), ExitStack() as hooks:
            for part in self._parts.lookups:
                hooks.enter_context(part.register_forward_hook(follow))
            found = self._run(ids)
        at_rows = torch.autograd.grad(found, [rows[part] for part in self._parts.lookups], gradient)
        return [at * scale for at, scale in zip(at_rows, scales, strict=True)]

    @torch.no_grad()
    def _is_product(self) -> bool:
        """Find the factor by which the decoder multiplies embeddings; return whether it does no more than that."""
        width = self._parts.embedding.embedding_dim
        values = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
        found = self._run(values)
        if torch.equal(found, values):
            return True
        self._factor = float(self._run(torch.ones_like(values)).flatten()[0])
        return torch.equal(found, values * self._factor)

    def _run(self, given: Tensor) -> Tensor:
        """Return the first block's input for token ids (B, T), or for embeddings (B, T, D) that are not looked up."""
        recorders = self._parts.recorders([])
        looked_up = given.is_floating_point()
        decoder = self._parts.entrance(recorders, given.device, given if looked_up else None)
        ids = torch.zeros(given.shape[:2], dtype=torch.long, device=given.device) if looked_up else given
        decoder(input_ids=ids, use_cache=False)
        found = recorders[0].hidden
        assert found is not None, "every decoder runs its first block"
        return found if looked_up else self._parts.carried.state(found, [recorder.inputs for recorder in recorders])
