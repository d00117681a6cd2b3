"""A sweep runs many candidates through the model together, block by block, and computes what they share once.

A candidate says which tensors are quantized, and how; the others keep full precision. Candidates that agree in the
embedding and the first blocks have the same hidden states there. Their distinct prefixes form a trie, and every node of
it is computed once. Within a block, candidates share attention and matrix products that do not depend on where they
differ, and a tensor is decoded once for all candidates that hold it at the same level.

Results are those of a plain forward pass of each candidate alone, bit for bit on a CPU: the same operations on the same
numbers, in chunks of whole windows, whose number does not change a window's result there (tests/evaluators/
test_sweep.py). An accelerator may choose other kernels for other sizes.

Shapes: B windows, T positions, D hidden size.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from bitgenome.common.steps import steps
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.batches import Batches
from evaluators.engine.prefix_cache import Chunks, PrefixCache
from evaluators.engine.replay import Replay, input_groups
from evaluators.engine.weights import ModelWeights, embedded
from evaluators.model.head import Head
from quantizers.formats.table import QuantFormat

Candidate = Mapping[str, QuantFormat]  # format of every quantized tensor, by Hugging Face name
Choice = tuple[QuantFormat | None, ...]  # formats of the lookup tables, or of a block's tensors in their order
Path = tuple[int, ...]  # numbers of the choices, which are faster to compare
ATTENTION = ".self_attn."  # part of the names of its tensors


@dataclass(frozen=True)
class Member:
    """Holds a candidate's index in the list, its choices (lookup tables, then each block) and the numbers of these."""

    index: int
    choices: tuple[Choice, ...]
    path: Path


@dataclass
class Node:
    """A node of the trie holds candidates that agree in their first choices, and their hidden states after these."""

    members: list[Member]
    states: Chunks = field(default_factory=list)


class Sweep:
    """Runs candidates on a text, with the weights of one block at a time placed in the model's modules.

    ``activations`` "q8" rounds the inputs of quantized layers to llama.cpp's 8-bit blocks; "float" does not.
    Hidden states stay on the model's device between blocks; the memory of a sweep is divided with room for them.
    """

    def __init__(
        self,
        weights: ModelWeights,
        batches: Batches,
        cache: PrefixCache,
        activations: str = "float",
    ):
        self.weights = weights
        self.model = weights.model
        self.batches = batches
        self.cache = cache
        self._tensors = [self.model.parameters_of(block) for block in range(len(self.model.blocks))]
        self._numbers: dict[Choice, int] = {}
        self._placed: dict[str, QuantFormat | None] = {}  # formats in the running block, and the head's when it is used
        self._replays: dict[int, list[Replay]] = {}  # by block, made in its first pass
        self._inputs = EightBitInputs(self.model, self._placed) if activations == "q8" else None

    def close(self) -> None:
        """Drop all weights, states and patches of modules, so that the memory is free once the caller drops this."""
        for replay in chain.from_iterable(self._replays.values()):
            replay.close()
        self._replays = {}
        self.cache.clear()
        self.weights.close()

    @torch.inference_mode()
    def final_states(
        self, ids: Tensor, text: Hashable, candidates: Sequence[Candidate], keep: Iterable[Candidate] = ()
    ) -> list[Tensor]:
        """Return each candidate's hidden states (B, T, D) after the final norm, in order, for token ids (B, T).

        ``text`` identifies ``ids`` in the prefix cache. States that this sweep computes for the prefixes of ``keep``
        are added to the cache.
        """
        kept = [self._member(-1, candidate).path for candidate in keep]
        waiting = self._prefixes(ids, text, candidates)
        nodes: list[Node] = []
        blocks = len(self.model.blocks)
        for block in steps(range(blocks), blocks, "block"):
            self._remember(text, block, waiting[block], kept)
            nodes += waiting[block]
            self._fetch_ahead(block + 1, nodes)
            nodes = self._through_block(block, nodes)
            self._remember(text, block + 1, nodes, kept)
        return self._normed([*nodes, *waiting[-1]], len(candidates))

    def _member(self, index: int, candidate: Candidate) -> Member:
        tensors = [self.model.lookup_names, *self._tensors]
        choices = tuple(tuple(candidate.get(name) for name in names) for names in tensors)
        return Member(index, choices, tuple(self._numbers.setdefault(c, len(self._numbers)) for c in choices))

    def _prefixes(self, ids: Tensor, text: Hashable, candidates: Sequence[Candidate]) -> list[list[Node]]:
        """Return the nodes to start before each block (last entry: after all), from the deepest states in the cache."""
        starts: list[dict[Path, Node]] = [{} for _ in range(len(self.model.blocks) + 1)]
        for index, candidate in enumerate(candidates):
            member = self._member(index, candidate)
            depth = len(starts)
            cached = None
            while cached is None and depth > 0:
                depth -= 1
                cached = self.cache.get((text, member.path[: depth + 1]))
            prefix = member.path[: depth + 1]
            if prefix not in starts[depth]:
                starts[depth][prefix] = Node([], list(cached or self._embedded(ids, candidate)))
            starts[depth][prefix].members.append(member)
        return [list(nodes.values()) for nodes in starts]

    def _remember(self, text: Hashable, depth: int, nodes: Sequence[Node], kept: Sequence[Path]) -> None:
        """Add the states of nodes that are prefixes of ``kept`` to the cache."""
        prefixes = {path[: depth + 1] for path in kept}
        for node in nodes:
            if (prefix := node.members[0].path[: depth + 1]) in prefixes:
                self.cache.put((text, prefix), node.states)

    def _embedded(self, ids: Tensor, candidate: Candidate) -> Chunks:
        """Return the states before the first block."""
        return list(embedded(self.weights, candidate, ids, self.batches.windows))

    def _through_block(self, block: int, nodes: Sequence[Node]) -> list[Node]:
        """Return the nodes after ``block``; the states of ``nodes``, before it, are freed one by one."""
        behind = []
        for node in nodes:
            children = self._children(block, node)
            self._run(block, node.states, children)
            behind += children
            node.states = []
        self._unload(self._tensors[block])
        self.weights.release()
        return behind

    def _fetch_ahead(self, block: int, nodes: Sequence[Node]) -> None:
        """Start reading the weights that ``nodes`` will need in ``block``."""
        if block < len(self._tensors):
            choices = dict.fromkeys(member.choices[block + 1] for node in nodes for member in node.members)
            self.weights.fetch_ahead(
                (name, fmt) for choice in choices for name, fmt in zip(self._tensors[block], choice, strict=True)
            )

    def _children(self, block: int, node: Node) -> list[Node]:
        """Return the distinct continuations of a node, sorted so that those with equal first formats are adjacent."""
        children: dict[Choice, Node] = {}
        for member in node.members:
            children.setdefault(member.choices[block + 1], Node([])).members.append(member)
        names = [[fmt.name if fmt else "" for fmt in choice] for choice in children]
        return [child for _, child in sorted(zip(names, children.values(), strict=True), key=lambda pair: pair[0])]

    def _run(self, block: int, states: Chunks, children: Sequence[Node]) -> None:
        """Compute the states of ``children`` after ``block`` from their parent's ``states`` before it."""

        def forward(chunk: Tensor) -> Tensor:
            if len(chunk) < whole:  # memory ran out: replayed outputs would be those of more windows
                self._forget(block)
            return self.model.run_block(block, chunk)

        for chunk in states:
            whole = len(chunk)
            for child in children:
                self._place(block, child.members[0].choices[block + 1])
                if block not in self._replays:
                    self._replays[block] = self._replay(block, chunk[:1])
                child.states.append(self.batches.run(forward, chunk))
            self._forget(block)

    def _replay(self, block: int, rows: Tensor) -> list[Replay]:
        """Return replays of a loaded block's linear layers and of its attention.

        A linear layer depends on its own format and on those of all layers that run before its input group.
        """
        linears = dict(self.model.linears(block))
        groups = input_groups(linears, lambda: self.model.run_block(block, rows))
        found: list[Replay] = []
        called = {name for group in groups for name in group}
        before = [name for name in linears if name not in called]  # experts that other rows may choose
        for group in groups:
            found += [Replay(linears[name], partial(self._formats, (*before, name))) for name in group]
            before += group
        attention = tuple(name for name in before if ATTENTION in name)
        module = getattr(self.model.blocks[block], ATTENTION.strip("."), None)
        return (
            found
            if module is None or self.model.leaves_keys(block)
            else [*found, Replay(module, partial(self._formats, attention))]
        )

    def _formats(self, names: tuple[str, ...]) -> Choice:
        return tuple(self._placed[name] for name in names)

    def _forget(self, block: int) -> None:
        for replay in self._replays[block]:
            replay.forget()

    def _place(self, block: int, choice: Choice) -> None:
        for name, fmt in zip(self._tensors[block], choice, strict=True):
            if name not in self._placed or self._placed[name] != fmt:
                self.model.place(name, self.weights.get(name, fmt))
                self._placed[name] = fmt

    def _unload(self, names: Iterable[str]) -> None:
        for name in names:
            if self._placed.pop(name, self) is not self:
                self.model.place(name, None)

    def _normed(self, nodes: Sequence[Node], count: int) -> list[Tensor]:
        for name in self.model.norm_parameters:
            self.model.place(name, self.weights.get(name, None))
        found: dict[int, Tensor] = {}
        for node in nodes:
            hidden = torch.cat([self.model.norm(chunk) for chunk in node.states])
            node.states = []
            found.update(dict.fromkeys((member.index for member in node.members), hidden))
        return [found[index] for index in range(count)]

    def head(self, fmt: QuantFormat | None) -> Head:
        """Return the head with its weight in the format ``fmt``; None is full precision."""
        for name in self.model.head_biases:
            self.model.place(name, self.weights.get(name, None))
        return self.model.head_with(self.weights.get(self.model.head_name, fmt))

    def head_input(self, hidden: Tensor, fmt: QuantFormat | None) -> Tensor:
        """Return final hidden states (..., D) as a head in the format ``fmt`` reads them, in 8 bits or unchanged."""
        if self._inputs is None:
            return hidden
        self._placed[self.model.head_name] = fmt
        return self._inputs.head_input(hidden)

    @torch.inference_mode()
    def first_overflow(self, ids: Tensor, candidate: Candidate) -> str:
        """Return where the candidate's values first are not finite: "embedding", "block 0" and so on, or "head"."""
        (nodes, *_) = self._prefixes(ids, object(), [candidate])
        for block in range(len(self.model.blocks)):
            if not all(bool(chunk.isfinite().all()) for chunk in nodes[0].states):
                return f"block {block - 1}" if block else "embedding"
            nodes = self._through_block(block, nodes)
        finite = all(bool(chunk.isfinite().all()) for chunk in nodes[0].states)
        return "head" if finite else f"block {len(self.model.blocks) - 1}"
