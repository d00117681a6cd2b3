"""This module runs a causal language model block by block, with only the blocks in memory that are loaded.

Shapes: B windows, T positions, D hidden size, V vocabulary. The modules are transformers' own.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from evaluators.model.block_arguments import BlockArguments
from evaluators.model.entrance import Entrance
from evaluators.model.folder import ModelFolder, ModelFolderError
from evaluators.model.head import Head, HeadSettings
from evaluators.model.outline import build_model
from evaluators.model.parts import Parts
from evaluators.model.stand_ins import fill_buffers


class BlockModel:
    """Holds the embedding, decoder blocks, final norm and head of a model folder, loaded part by part.

    Linear layers of blocks, and attention, multiply in the type ``compute``. Hidden states, norms, embedding and head
    are always float32.

    Weights are on the meta device until ``load_block``, ``load_ends`` or ``place`` is called, so a caller that keeps
    one block loaded needs the memory of one block. Raises ModelFolderError for a model that transformers cannot build,
    and for one that cannot run block by block (see ``evaluators.model.parts``).
    """

    def __init__(self, folder: ModelFolder, device: torch.device, compute: torch.dtype = torch.float32):
        self.folder = folder
        self.device = device
        self.compute = compute
        self.model = build_model(folder.path)
        self.config = self.model.config
        self.parts = Parts.of(self.model)
        self.decoder, self.blocks = self.parts.decoder, self.parts.blocks
        self._names = {id(module): name for name, module in self.model.named_modules()}
        parts = (*self.blocks, *self.parts.lookups, *self.parts.entry, self.parts.norm)
        fill_buffers(self.decoder, parts, device)
        self._arguments = BlockArguments(self.parts)
        self._entrance = Entrance(self.parts, device)
        self._head = HeadSettings.of(self.model)
        self._multiplied = {name for block in range(len(self.blocks)) for name, _ in self.linears(block)}

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the token embedding's weight."""
        return f"{self._names[id(self.parts.embedding)]}.weight"

    @property
    def head_name(self) -> str:
        """Hugging Face name of the head's weight, which is the embedding's where the two are tied."""
        return self.embedding_name if self.folder.tied else f"{self._names[id(self.parts.head)]}.weight"

    def block_prefix(self, block: int) -> str:
        """Return the prefix of the names of a block's tensors, such as "model.layers.3."."""
        return f"{self._names[id(self.blocks[block])]}."

    def block_of(self, tensor: str) -> int:
        """Return the block that holds ``tensor``: -1 for a lookup table, the number of blocks for norm and head."""
        if tensor in self.lookup_names:
            return -1
        prefix = self.block_prefix(0).removesuffix("0.")
        if tensor.startswith(prefix):
            return int(tensor.removeprefix(prefix).split(".")[0])
        return len(self.blocks)

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Load the parameters and stored buffers of ``module``; raise ModelFolderError if the folder lacks one."""
        names = list(module.state_dict())
        missing = [prefix + name for name in names if prefix + name not in self.folder.shapes]
        if missing:
            raise ModelFolderError(f"expected tensor {missing[0]} in the weights, found none in {self.folder.path}")
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
            for name in self.head_biases:
                self.place(name, self.as_computed(name, self.folder.read(name)))
        else:
            self._load(self.parts.head, f"{self._names[id(self.parts.head)]}.")

    def load_norm(self) -> None:
        """Load the final norm. Raises ModelFolderError if the folder lacks it."""
        self._load(self.parts.norm, f"{self._names[id(self.parts.norm)]}.")

    def load_embedding(self) -> None:
        """Load the token embedding, and what else runs before the blocks. Raises ModelFolderError if one is missing."""
        for part in (*self.parts.lookups, *self.parts.entry):
            self._load(part, f"{self._names[id(part)]}.")

    def load_all(self) -> None:
        """Load the whole model."""
        self.load_ends()
        for block in range(len(self.blocks)):
            self.load_block(block)

    def parameters_of(self, block: int) -> list[str]:
        """Return the names of a block's parameters and stored buffers, loaded or not, in the order of its modules."""
        prefix = self.block_prefix(block)
        return [prefix + name for name in self.blocks[block].state_dict()]

    @property
    def norm_parameters(self) -> list[str]:
        """Names of the final norm's parameters."""
        return self._tensors([self.parts.norm])

    @property
    def head_biases(self) -> list[str]:
        """Names of the head's parameters beside its weight; none for most models."""
        return [name for name in self._tensors([self.parts.head]) if not name.endswith(".weight")]

    @property
    def lookup_names(self) -> list[str]:
        """Names of the tables that token ids look up, the embedding's first."""
        return [f"{self._names[id(part)]}.weight" for part in self.parts.lookups]

    @property
    def entry_parameters(self) -> list[str]:
        """Names of the other parameters that are used before the first block; none for most models."""
        return self._tensors(self.parts.entry)

    def _tensors(self, modules: Sequence[nn.Module]) -> list[str]:
        return [f"{self._names[id(module)]}.{name}" for module in modules for name in module.state_dict()]

    @property
    def tensor_names(self) -> list[str]:
        """Names of all that must be loaded: embedding, blocks, norm, and the head where it is a tensor of its own."""
        head = [*([] if self.folder.tied else [self.head_name]), *self.head_biases]
        blocks = (name for block in range(len(self.blocks)) for name in self.parameters_of(block))
        return [*self.lookup_names, *self.entry_parameters, *blocks, *self.norm_parameters, *head]

    def tensor_of(self, name: str) -> Tensor:
        """Return the parameter or stored buffer ``name``, loaded or not."""
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(path), leaf)
        return found

    def place(self, name: str, weight: Tensor | None) -> None:
        """Make ``weight`` the parameter ``name``, without a copy; None frees the parameter's memory."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        tensor = torch.empty(self.folder.shapes[name], device="meta") if weight is None else weight
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))

    def weight(self, name: str) -> nn.Parameter:
        """Return the loaded parameter ``name``; assign to its ``data`` to change the model."""
        return self.model.get_parameter(name)

    @property
    def head(self) -> Head:
        """Head with the weight (V, D) that is loaded, which turns final hidden states into logits."""
        return self.head_with(self.weight(self.head_name).data)

    def head_with(self, weight: Tensor) -> Head:
        """Return this model's head with another ``weight`` (V, D)."""
        bias = self.parts.head.bias
        return Head(weight, self._head, None if bias is None else bias.data)

    @property
    def hidden_width(self) -> int:
        """Size D of hidden states."""
        return self.parts.carried.hidden

    @property
    def state_width(self) -> int:
        """Numbers that pass from a block to the next for a position: D, and what a model carries beside it."""
        return self.parts.carried.width

    def leaves_keys(self, block: int) -> bool:
        """Return whether a block's attention leaves keys and values for later blocks, and so must always run."""
        return block in self.parts.carried.leaves

    def embed(self, ids: Tensor) -> Tensor:
        """Return the first block's input (B, T, D) for token ids (B, T)."""
        return self._entrance(ids.to(self.device))

    def lookup_gradients(self, ids: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Return the gradients (B, T, columns) at the rows that ``ids`` look up, by the table's name.

        ``gradient`` (B, T, S) is that at the first block's input.
        """
        return dict(zip(self.lookup_names, self._entrance.row_gradients(ids, gradient), strict=True))

    def norm(self, hidden: Tensor) -> Tensor:
        """Return the final norm's output (..., D) for the last block's output."""
        found: Tensor = self.parts.norm(hidden[..., : self.parts.carried.hidden])
        return found

    def run_block(self, block: int, hidden: Tensor) -> Tensor:
        """Return the output (B, T, D) of one loaded block for its input ``hidden`` (B, T, D), over whole windows."""
        carried = self.parts.carried
        inputs, arguments = carried.unpacked(block, hidden, *self._arguments(block, hidden))
        with nullcontext() if self.compute == torch.float32 else self._autocast():
            output = self.blocks[block](hidden[..., : carried.hidden], *inputs, **arguments)
        found: Tensor = output if self.parts.beside is None else output[0]
        return carried.packed(block, found, hidden, arguments)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute, cache_enabled=False)

    def run_from(self, block: int, hidden: Tensor) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm for the input ``hidden`` (B, T, D) of ``block``."""
        for index in range(block, len(self.blocks)):
            hidden = self.run_block(index, hidden)
        return self.norm(hidden)

    def linears(self, block: int) -> Iterator[tuple[str, nn.Linear]]:
        """Yield (weight name, module) of the linear layers of one block."""
        for name, module in self.blocks[block].named_modules():
            if isinstance(module, nn.Linear):
                yield f"{self.block_prefix(block)}{name}.weight", module
