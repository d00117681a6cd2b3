"""Many candidates through the model together, block by block, what they share computed once.

A candidate says which tensors are quantized, and how; the others keep full precision. Candidates that agree in the
embedding and the first blocks have the same hidden states there: the distinct prefixes form a trie, of which every
node is computed once. Within a block, candidates share attention and products that depend on nothing in which they
differ, and a tensor is decoded once for all that hold it at one level.

Results are those of a plain forward of each candidate alone, bit for bit on a CPU: the same operations on the same
numbers, in chunks of whole windows, whose number does not change a window's result there (tests/evaluators/
test_sweep.py). An accelerator may choose other kernels for other sizes.

Shapes: B windows, T positions, D hidden size.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from evaluators.engine.activations import EightBitInputs
from evaluators.engine.batches import Batches
from evaluators.engine.prefix_cache import Chunks, PrefixCache
from evaluators.engine.replay import Replay, input_groups
from evaluators.engine.weights import ModelWeights
from evaluators.model.head import Head
from quantizers.formats.table import QuantFormat

Candidate = Mapping[str, QuantFormat]  # format of every quantized tensor, by Hugging Face name
Choice = tuple[QuantFormat | None, ...]  # formats of the embedding, or of a block's tensors in their order
Path = tuple[int, ...]  # choices by number: shorter to compare
ATTENTION = ".self_attn."  # in the names of its tensors


@dataclass(frozen=True)
class Member:
    """A candidate by its place in the list, its choices (of the embedding, then of each block) and their numbers."""

    index: int
    choices: tuple[Choice, ...]
    path: Path


@dataclass
class Node:
    """Candidates that agree in the first choices, and their hidden states there, some windows each."""

    members: list[Member]
    states: Chunks = field(default_factory=list)


class Sweep:
    """Runs candidates on a text; holds the model's modules, into which weights are placed block by block.

    ``storage`` is where hidden states wait for their next block: the model's device, or the host.
    """

    def __init__(
        self,
        weights: ModelWeights,
        batches: Batches,
        cache: PrefixCache,
        activations: str = "float",
        storage: torch.device | None = None,
    ):
        self.weights = weights
        self.model = weights.model
        self.batches = batches
        self.cache = cache
        self.storage = storage or self.model.device
        self._tensors = [self.model.parameters_of(block) for block in range(len(self.model.blocks))]
        self._numbers: dict[Choice, int] = {}
        self._placed: dict[str, QuantFormat | None] = {}  # of the block at work; the head's, when it is read
        self._replays: dict[int, list[Replay]] = {}  # by block, from its first pass on
        self._inputs = EightBitInputs(self.model, self._placed) if activations == "q8" else None

    @torch.inference_mode()
    def final_states(
        self, ids: Tensor, text: Hashable, candidates: Sequence[Candidate], keep: Iterable[Candidate] = ()
    ) -> list[Tensor]:
        """(B, T, D) behind the output norm for token ids (B, T), of each candidate in order.

        ``text`` names the ids in the prefix cache, which takes what this sweep computes of the prefixes of ``keep``.
        """
        kept = [self._member(-1, candidate).path for candidate in keep]
        waiting = self._prefixes(ids, text, candidates)
        nodes: list[Node] = []
        for block in range(len(self.model.blocks)):
            self._remember(text, block, waiting[block], kept)
            nodes += waiting[block]
            self._fetch_ahead(block + 1, nodes)
            nodes = self._through_block(block, nodes)
            self._remember(text, block + 1, nodes, kept)
        return self._normed([*nodes, *waiting[-1]], len(candidates))

    def _member(self, index: int, candidate: Candidate) -> Member:
        tensors = [[self.model.embedding_name], *self._tensors]
        choices = tuple(tuple(candidate.get(name) for name in names) for names in tensors)
        return Member(index, choices, tuple(self._numbers.setdefault(c, len(self._numbers)) for c in choices))

    def _prefixes(self, ids: Tensor, text: Hashable, candidates: Sequence[Candidate]) -> list[list[Node]]:
        """Nodes that start in front of each block (the last: behind all), by the deepest states that the cache has."""
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
        """Give the cache the states of nodes that are prefixes of ``kept``."""
        prefixes = {path[: depth + 1] for path in kept}
        for node in nodes:
            if (prefix := node.members[0].path[: depth + 1]) in prefixes:
                self.cache.put((text, prefix), node.states)

    def _embedded(self, ids: Tensor, candidate: Candidate) -> Chunks:
        """States in front of the first block; only the rows of the embedding that the text uses are read."""
        name = self.model.embedding_name
        used, places = ids.unique(return_inverse=True)
        self.model.place(name, self.weights.rows(name, candidate.get(name), used))
        states = [self.model.embed(rows).to(self.storage) for rows in self.batches.split(places)]
        self.model.place(name, None)
        return states

    def _through_block(self, block: int, nodes: Sequence[Node]) -> list[Node]:
        """The nodes behind ``block``; those in front of it give up their states one by one."""
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
        """Begin to read the weights that ``nodes`` will need in ``block``."""
        if block < len(self._tensors):
            choices = dict.fromkeys(member.choices[block + 1] for node in nodes for member in node.members)
            self.weights.fetch_ahead(
                (name, fmt) for choice in choices for name, fmt in zip(self._tensors[block], choice, strict=True)
            )

    def _children(self, block: int, node: Node) -> list[Node]:
        """The distinct continuations of a node, those that agree in the first tensors side by side."""
        children: dict[Choice, Node] = {}
        for member in node.members:
            children.setdefault(member.choices[block + 1], Node([])).members.append(member)
        names = [[fmt.name if fmt else "" for fmt in choice] for choice in children]
        return [child for _, child in sorted(zip(names, children.values(), strict=True), key=lambda pair: pair[0])]

    def _run(self, block: int, states: Chunks, children: Sequence[Node]) -> None:
        """States of ``children`` behind ``block``."""

        def forward(chunk: Tensor) -> Tensor:
            if len(chunk) < whole:  # memory ran out: what modules would answer is for more windows
                self._forget(block)
            return self.model.run_block(block, chunk)

        for chunk in states:
            whole, rows = len(chunk), chunk.to(self.model.device)
            for child in children:
                self._place(block, child.members[0].choices[block + 1])
                if block not in self._replays:
                    self._replays[block] = self._replay(block, rows[:1])
                child.states.append(self.batches.run(forward, rows).to(self.storage))
            self._forget(block)

    def _replay(self, block: int, rows: Tensor) -> list[Replay]:
        """Replays of a loaded block's linear layers and of its attention.

        A linear layer depends on its own format and on those of all whose output is made before its input.
        """
        linears = dict(self.model.linears(block))
        groups = input_groups(linears, lambda: self.model.run_block(block, rows))
        found: list[Replay] = []
        before: list[str] = []
        for group in groups:
            found += [Replay(linears[name], partial(self._formats, (*before, name))) for name in group]
            before += group
        attention = tuple(name for name in before if ATTENTION in name)
        module = getattr(self.model.blocks[block], ATTENTION.strip("."), None)
        return found if module is None else [*found, Replay(module, partial(self._formats, attention))]

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
            hidden = torch.cat([self.model.decoder.norm(chunk.to(self.model.device)) for chunk in node.states])
            node.states = []
            found.update(dict.fromkeys((member.index for member in node.members), hidden))
        return [found[index] for index in range(count)]

    def head(self, fmt: QuantFormat | None) -> Head:
        return self.model.head_with(self.weights.get(self.model.head_name, fmt))

    def head_input(self, hidden: Tensor, fmt: QuantFormat | None) -> Tensor:
        """Final hidden states (..., D) as a head of that format reads them."""
        if self._inputs is None:
            return hidden
        self._placed[self.model.head_name] = fmt
        return self._inputs.head_input(hidden)

    @torch.inference_mode()
    def first_overflow(self, ids: Tensor, candidate: Candidate) -> str:
        """Where the candidate's numbers first stop to be finite: ``embedding``, ``block 3`` or ``head``."""
        (nodes, *_) = self._prefixes(ids, object(), [candidate])
        for block in range(len(self.model.blocks)):
            if not all(bool(chunk.isfinite().all()) for chunk in nodes[0].states):
                return f"block {block - 1}" if block else "embedding"
            nodes = self._through_block(block, nodes)
        finite = all(bool(chunk.isfinite().all()) for chunk in nodes[0].states)
        return "head" if finite else f"block {len(self.model.blocks) - 1}"
