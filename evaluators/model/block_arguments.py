"""This module builds what a decoder block takes besides hidden states: mask, positions and rotary embeddings.

All of them are made by transformers. Shapes: B windows, T positions, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from evaluators.model.families import FAMILIES
from evaluators.model.folder import ModelFolder, ModelFolderError


def attention_of(folder: ModelFolder) -> str:
    """Return transformers' attention implementation (``sdpa`` or ``eager``) for the model type of ``folder``.

    Raises ModelFolderError for a model type that is not in ``FAMILIES``.
    """
    if folder.model_type not in FAMILIES:
        raise ModelFolderError(
            f"expected a model of type {', '.join(FAMILIES)}, which run block by block, found "
            f"{folder.model_type or 'none'!r} in {folder.path}"
        )
    return FAMILIES[folder.model_type].attention


class _Recorder(nn.Module):
    """Takes the place of a block, returns its input unchanged and keeps the keyword arguments of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden


class BlockArguments:
    """Provides the keyword arguments of every block, recorded in a forward pass of the decoder without its blocks.

    The mask of a sliding window, the rotary embedding of a layer type and the frequencies for long text are therefore
    transformers' own. A mask of None is plain causal attention. The arguments of the last shape, dtype and device are
    cached.

    ``decoder`` is the transformers module with ``layers``, ``norm`` and ``rotary_emb``; only its types are used.
    """

    def __init__(self, decoder: nn.Module, config: PreTrainedConfig):
        self._rotary = type(decoder.rotary_emb)
        self._config = config
        with torch.device("meta"):
            self._decoder = type(decoder)(config)
        self._decoder.eval()
        self._recorders = [_Recorder() for _ in range(config.num_hidden_layers)]
        self._decoder.layers = nn.ModuleList(self._recorders)
        self._decoder.norm = nn.Identity()
        self._shape: tuple[Any, ...] = ()

    def __call__(self, block: int, hidden: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of ``block`` for ``hidden`` (B, T, D).

        Their first dimension is 1, so that they broadcast over windows.
        """
        shape = (hidden.shape[1:], hidden.dtype, hidden.device)
        if shape != self._shape:
            self._record(hidden)
            self._shape = shape
        return self._recorders[block].arguments

    @torch.inference_mode(False)  # autograd may use the cached tensors, which inference tensors do not allow
    @torch.no_grad()
    def _record(self, hidden: Tensor) -> None:
        # A new module for each length: dynamic rotary frequencies remember the longest text that they have seen.
        self._decoder.rotary_emb = self._rotary(self._config).to(hidden.device)
        nothing = torch.zeros(1, 1, 1, dtype=hidden.dtype, device=hidden.device)
        self._decoder(inputs_embeds=nothing.expand(1, *hidden.shape[1:]), use_cache=False)
