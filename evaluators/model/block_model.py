"""This module runs a causal language model block by block, with only the blocks in memory that are loaded.

Shapes: B windows, T positions, D hidden size, V vocabulary. The modules are transformers' own.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from evaluators.model.block_arguments import BlockArguments, attention_of
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.model.head import Head


class BlockModel:
    """Holds the embedding, decoder blocks, final norm and head of a model folder, loaded part by part.

    Linear layers of blocks, and attention, multiply in the type ``compute``. Hidden states, norms, embedding and head
    are always float32.

    Weights are on the meta device until ``load_block``, ``load_ends`` or ``place`` is called, so a caller that keeps
    one block loaded needs the memory of one block. Raises ModelFolderError for a model type that cannot run block by
    block (see ``evaluators.model.families``), and for one that transformers cannot build.
    """

    def __init__(self, folder: ModelFolder, device: torch.device, compute: torch.dtype = torch.float32):
        self.folder = folder
        self.device = device
        self.compute = compute
        attention = attention_of(folder)
        try:
            self.config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
            self.config.pad_token_id = None  # no text here is padded, and the embedding may be cut to the rows in use
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
                )
        except Exception as error:  # whatever transformers makes of a config.json that does not fit
            found = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelFolderError(
                f"expected a model that transformers can build from {folder.path}, found {found}"
            ) from None
        self.model.eval().requires_grad_(False)
        self.decoder = self.model.get_decoder()
        self.blocks: nn.ModuleList = self.decoder.layers
        self._arguments = BlockArguments(self.decoder, self.config)
        embedding = self.decoder.embed_tokens
        if hasattr(embedding, "embed_scale"):  # Gemma's: a buffer that no weights file holds
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._multiplied = {name for block in range(len(self.blocks)) for name, _ in self.linears(block)}

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the token embedding's weight."""
        return f"{self._names[id(self.decoder.embed_tokens)]}.weight"

    @property
    def head_name(self) -> str:
        """Hugging Face name of the head's weight, which is the embedding's where the two are tied."""
        return self.embedding_name if self.folder.tied else "lm_head.weight"

    def block_prefix(self, block: int) -> str:
        """Return the prefix of the names of a block's tensors, such as "model.layers.3."."""
        return f"{self._names[id(self.blocks[block])]}."

    def block_of(self, tensor: str) -> int:
        """Return the index of the block that holds ``tensor``: -1 for embedding, the block count for norm and head."""
        if tensor == self.embedding_name:
            return -1
        prefix = self.block_prefix(0).removesuffix("0.")
        if tensor.startswith(prefix):
            return int(tensor.removeprefix(prefix).split(".")[0])
        return len(self.blocks)

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Load the parameters of ``module``; raise ModelFolderError if the folder lacks one."""
        missing = [prefix + name for name, _ in module.named_parameters() if prefix + name not in self.folder.shapes]
        if missing:
            raise ModelFolderError(f"expected tensor {missing[0]} in the weights, found none in {self.folder.path}")
        names = [name for name, _ in module.named_parameters()]
        state = {name: self.as_computed(prefix + name, self.folder.read(prefix + name)) for name in names}
        module.load_state_dict(state, strict=False, assign=True)

    def as_computed(self, name: str, tensor: Tensor) -> Tensor:
        """Move ``tensor``, all or some rows of the weight ``name``, to the model's device and its compute type."""
        moved = tensor.to(self.device, non_blocking=True)  # as it is stored, which is less, if the memory is pinned
        return moved.to(self.compute if name in self._multiplied else torch.float32)

    def load_block(self, block: int) -> None:
        """Load the weights of a block. Raises ModelFolderError if the folder lacks one of them."""
        self._load(self.blocks[block], self.block_prefix(block))

    def unload_block(self, block: int) -> None:
        """Free the memory of a block's weights."""
        self.blocks[block].to("meta")

    def load_ends(self) -> None:
        """Load embedding, final norm and head. Raises ModelFolderError if the folder lacks one of them."""
        if not self.folder.tied:
            self.load_embedding()
        self.load_head()

    def load_head(self) -> None:
        """Load final norm and head. Raises ModelFolderError if the folder lacks one of them."""
        self.load_norm()
        if self.folder.tied:
            self.load_embedding()
        else:
            self._load(self.model.lm_head, "lm_head.")

    def load_norm(self) -> None:
        """Load the final norm. Raises ModelFolderError if the folder lacks it."""
        self._load(self.decoder.norm, f"{self._names[id(self.decoder.norm)]}.")

    def load_embedding(self) -> None:
        """Load the token embedding. Raises ModelFolderError if the folder lacks it."""
        self._load(self.decoder.embed_tokens, self.embedding_name.removesuffix("weight"))

    def load_all(self) -> None:
        """Load the whole model."""
        self.load_ends()
        for block in range(len(self.blocks)):
            self.load_block(block)

    def parameters_of(self, block: int) -> list[str]:
        """Return the names of a block's parameters, loaded or not, in the order of its modules."""
        prefix = self.block_prefix(block)
        return [prefix + name for name, _ in self.blocks[block].named_parameters()]

    @property
    def norm_parameters(self) -> list[str]:
        """Names of the final norm's parameters."""
        prefix = f"{self._names[id(self.decoder.norm)]}."
        return [prefix + name for name, _ in self.decoder.norm.named_parameters()]

    def place(self, name: str, weight: Tensor | None) -> None:
        """Make ``weight`` the parameter ``name``, without a copy; None frees the parameter's memory."""
        module, _, leaf = name.rpartition(".")
        tensor = torch.empty(self.folder.shapes[name], device="meta") if weight is None else weight
        self.model.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    def weight(self, name: str) -> nn.Parameter:
        """Return the loaded parameter ``name``; assign to its ``data`` to change the model."""
        return self.model.get_parameter(name)

    @property
    def head(self) -> Head:
        """Head with the weight (V, D) that is loaded, which turns final hidden states into logits."""
        return self.head_with(self.weight(self.head_name).data)

    def head_with(self, weight: Tensor) -> Head:
        """Return this model's head with another ``weight`` (V, D)."""
        return Head(weight, getattr(self.config, "final_logit_softcapping", None))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of token ids (B, T)."""
        return self.decoder.embed_tokens(ids.to(self.device))

    def run_block(self, block: int, hidden: Tensor) -> Tensor:
        """Return the output (B, T, D) of one loaded block for its input ``hidden`` (B, T, D), over whole windows."""
        arguments = self._arguments(block, hidden)
        with nullcontext() if self.compute == torch.float32 else self._autocast():
            output: Tensor = self.blocks[block](hidden, **arguments)
        return output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute, cache_enabled=False)

    def run_from(self, block: int, hidden: Tensor) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm for the input ``hidden`` (B, T, D) of ``block``."""
        for index in range(block, len(self.blocks)):
            hidden = self.run_block(index, hidden)
        return self.decoder.norm(hidden)

    def linears(self, block: int) -> Iterator[tuple[str, nn.Linear]]:
        """Yield (weight name, module) of the linear layers of one block."""
        for name, module in self.blocks[block].named_modules():
            if isinstance(module, nn.Linear):
                yield f"{self.block_prefix(block)}{name}.weight", module
