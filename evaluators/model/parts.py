"""This module finds the parts of a causal language model by structure: embedding, blocks, final norm and head.

The blocks are the list of modules with one entry per layer. The final norm is the module that runs after the last of
them. The modules are transformers' own.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from evaluators.model.carried import Carried
from evaluators.model.errors import ModelFolderError
from evaluators.model.outline import decoder_of
from evaluators.model.stand_ins import SOME_IDS, Constant, Recorder, Stub, Unchanged, fresh, of_weights, replaced


@dataclass
class Parts:
    """Holds the parts of a model; ``replace_blocks`` gives the decoder with something else in the blocks' place."""

    model: PreTrainedModel
    decoder: PreTrainedModel
    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    lookups: list[nn.Embedding]  # what is looked up by token id: the embedding, first, and any others
    entry: list[nn.Module]  # other modules with weights that run before the first block
    beside: int | None = None  # values that blocks return in a tuple after the hidden states; None: no tuple
    carried: Carried = field(default_factory=lambda: Carried(0, 0))  # what passes between blocks beside hidden states
    by_window: bool = False  # whether what blocks are given has a row for each window

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Parts":
        """Find the parts of a model, on the meta device. Raises ModelFolderError, which says what is missing."""
        decoder, embedding, head = decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings()
        kind = model.config.model_type
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise ModelFolderError(
                f"expected a {kind} model with one embedding and one head, found {type(head).__name__}"
            )
        blocks = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == layers_of(model.config)]
        if not blocks:
            raise ModelFolderError(f"expected a {kind} model with one list of blocks, found none in its decoder")
        found = max(blocks, key=lambda part: sum(p.numel() for p in part.parameters()))
        parts = cls(model, decoder, embedding, found, nn.Identity(), head, [], [])
        parts._run_through()
        return parts

    def _run_through(self) -> None:
        """Find the order of modules in a forward pass without weights; check that blocks follow each other directly."""
        calls: list[Any] = []
        for self.beside in (None, 0, 1):
            recorders = self.recorders(calls)
            calls.clear()
            tables: list[nn.Module] = []
            with suppress(IndexError, ValueError, RuntimeError, TypeError, AttributeError):
                self.stubbed(recorders, torch.device("cpu"), torch.float32, calls, tables)(
                    input_ids=SOME_IDS, use_cache=False
                )
            if [call for call in calls if isinstance(call, Recorder)] == recorders and self._direct(recorders):
                break
        else:
            raise ModelFolderError(
                f"expected a {self.model.config.model_type} model whose blocks pass hidden states to each other, found "
                "one that does more between them"
            )
        width = self.embedding.embedding_dim if recorders[0].hidden is None else recorders[0].hidden.shape[-1]
        self.carried = Carried.of(self.blocks, [recorder.inputs for recorder in recorders], width)
        carried = self.carried.inputs
        others = [
            [value for place, value in enumerate(recorder.inputs) if (block, place) not in carried]
            for block, recorder in enumerate(recorders)
        ]
        if any(of_weights((others, recorder.arguments)) for recorder in recorders):
            raise ModelFolderError(
                f"expected a {self.model.config.model_type} model whose blocks take hidden states alone, found "
                "one that gives each block inputs of its own"
            )
        after = calls[calls.index(recorders[-1]) + 1 :]
        if len(after) != 1:
            raise ModelFolderError(
                f"expected a {self.model.config.model_type} model with one norm after its blocks, found {len(after)}"
            )
        self.norm = after[0]
        given = [value for value in recorders[0].arguments.values() if isinstance(value, torch.Tensor)]
        self.by_window = any(value.ndim > 2 and value.shape[0] != 1 for value in given)
        before = [call for call in dict.fromkeys(calls[: calls.index(recorders[0])]) if call is not self.embedding]
        before = [call for call in before if any(True for _ in call.parameters())]
        self.lookups = [self.embedding, *(part for part in before if part in tables)]
        self.entry = [part for part in before if part not in tables]

    @staticmethod
    def _direct(recorders: list[Recorder]) -> bool:
        return len({recorder.identity for recorder in recorders}) == 1

    def recorders(self, calls: list[Any]) -> list[Recorder]:
        """Return a recorder for each block; each call is appended to ``calls``."""
        return [Recorder(block, calls, self.beside) for block in self.blocks]

    def stubbed(
        self, recorders: list[Recorder], device: torch.device, dtype: torch.dtype, calls: list[Any], tables: list[Any]
    ) -> nn.Module:
        """Return the decoder with ``recorders`` in place of blocks, and without any weights.

        What is looked up by the ids ``SOME_IDS`` is appended to ``tables``.
        """
        return self._replaced(recorders, lambda part: Stub(part, calls, tables, device, dtype), device)

    def entrance(
        self, recorders: list[Recorder], device: torch.device, embeddings: torch.Tensor | None = None
    ) -> nn.Module:
        """Return the decoder with ``recorders`` in place of blocks, and nothing after them.

        Any token ids look up ``embeddings`` (B, T, D) if these are given.
        """

        def change(part: nn.Module) -> nn.Module:
            if part is self.embedding and embeddings is not None:
                return Constant(part, embeddings)
            return Unchanged(part) if part is self.norm else part

        return self._replaced(recorders, change, device)

    def _replaced(
        self, recorders: list[Recorder], change: Callable[[nn.Module], nn.Module], device: torch.device
    ) -> nn.Module:
        children: dict[str, nn.Module] = {}
        for name, part in self.decoder.named_children():
            if part is self.blocks:
                children[name] = nn.ModuleList(recorders)
            elif any(True for _ in part.parameters()) or not any(True for _ in part.buffers()):
                children[name] = change(part)
            else:
                # anew for each length: dynamic rotary frequencies remember the longest text that they have seen
                children[name] = fresh(self.decoder, part, device)
        return replaced(self.decoder, children)


def layers_of(config: PreTrainedConfig) -> int:
    """Return the number of blocks; that of the text part of a multimodal model."""
    return int(config.get_text_config().num_hidden_layers)
