"""What a decoder block reads beside hidden states: masks, positions, rotary embeddings, as transformers makes them.

Shapes: B windows, T positions, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from evaluators.model.families import FAMILIES
from evaluators.model.folder import ModelFolder, ModelFolderError


def attention_of(folder: ModelFolder) -> str:
    """Attention implementation of the folder's model type. Raises ModelFolderError for one that is not supported."""
    if folder.model_type not in FAMILIES:
        raise ModelFolderError(
            f"expected a model of type {', '.join(FAMILIES)}, which run block by block, found "
            f"{folder.model_type or 'none'!r} in {folder.path}"
        )
    return FAMILIES[folder.model_type].attention


class _Recorder(nn.Module):
    """Stands for a block and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden


class BlockArguments:
    """The arguments of every block, from the forward pass of a decoder without blocks; kept for the last shape asked.

    So the mask of a sliding window, the rotary embedding of a layer type and the frequencies of a long text are
    transformers' own. A mask of None is plain causal attention.
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
        """Keyword arguments of ``block`` for hidden states (B, T, D); they broadcast over windows."""
        shape = (hidden.shape[1:], hidden.dtype, hidden.device)
        if shape != self._shape:
            self._record(hidden)
            self._shape = shape
        return self._recorders[block].arguments

    @torch.inference_mode(False)  # a gradient may pass by what is kept
    @torch.no_grad()
    def _record(self, hidden: Tensor) -> None:
        # new for each length: frequencies that follow the length remember the longest text
        self._decoder.rotary_emb = self._rotary(self._config).to(hidden.device)
        nothing = torch.zeros(1, 1, 1, dtype=hidden.dtype, device=hidden.device)
        self._decoder(inputs_embeds=nothing.expand(1, *hidden.shape[1:]), use_cache=False)
