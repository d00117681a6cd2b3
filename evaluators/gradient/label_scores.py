"""One backward pass that yields the inputs and output scores of every weight, with labels sampled from the model.

A score is the gradient of the labels' log-likelihood. The backward pass goes block by block: the forward pass keeps
only the input of every block, and each block is run again for its gradients. No gradient of a weight is formed, and
only one block needs to be in memory.

Shapes: n windows, T positions, P = n * T, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bitgenome.common.steps import steps
from evaluators.data.windows import scored
from evaluators.engine.divergence import chunk_positions
from evaluators.healing.tuner import micro_batches, repeatable_attention
from evaluators.model.block_model import BlockModel
from evaluators.model.experts import ExpertLinear
from evaluators.model.head import Head


@dataclass(frozen=True)
class LinearUse:
    """One use of a linear layer's weight W (rows, columns): y = W x at P positions.

    ``inputs`` holds x (P, columns), ``scores`` the gradient s (P, rows) of the labels' log-likelihood at y. Those of
    an expert are the positions ``reads`` (P,) that chose it, among all N ``of`` the text.
    """

    name: str
    inputs: Tensor
    scores: Tensor
    reads: Tensor | None = None
    of: int = 0

    def projections(self, delta: Tensor) -> Tensor:
        """Return s' delta x (N,), how ``delta`` (rows, columns) changes the labels' log-likelihood to first order.

        It is zero at positions that do not read the weight; N is P where all do.
        """
        if delta.shape[0] <= delta.shape[1]:
            found = (self.inputs @ delta.T).mul_(self.scores).sum(-1)
        else:
            found = (self.scores @ delta).mul_(self.inputs).sum(-1)
        return found if self.reads is None else found.new_zeros(self.of).index_copy_(0, self.reads, found)

    def kronecker(self, delta: Tensor) -> Tensor:
        """Return the scalar P tr(S delta A delta'), S = E[s s'], A = E[x x'] (Martens and Grosse 2015, one layer)."""
        moved = self.scores @ delta
        return (moved @ self._input_moments).mul_(moved).sum()

    def diagonal(self, delta: Tensor) -> Tensor:
        """Return the scalar sum over positions and weights of (s_i x_j delta_ij)^2."""
        return (self._weight_moments * delta.square()).sum()

    @cached_property
    def _input_moments(self) -> Tensor:
        return self.inputs.T @ self.inputs / len(self.inputs)

    @cached_property
    def _weight_moments(self) -> Tensor:
        return self.scores.square().T @ self.inputs.square()


@dataclass(frozen=True)
class LookupUse:
    """One use of an embedding W (V, columns): y = W[id] at P positions.

    ``ids`` (P,) are the tokens, ``scores`` s (P, columns) the gradient at y. It is a LinearUse with one-hot inputs x.
    """

    name: str
    ids: Tensor
    scores: Tensor

    def projections(self, delta: Tensor) -> Tensor:
        """Return the first-order changes (P,) of the labels' log-likelihood, as in LinearUse."""
        return delta[self.ids].mul_(self.scores).sum(-1)

    def kronecker(self, delta: Tensor) -> Tensor:
        """Return the Kronecker-factored scalar, as in LinearUse."""
        moved = delta[self.ids]
        return (moved @ (self.scores.T @ self.scores / len(self.scores))).mul_(moved).sum()

    def diagonal(self, delta: Tensor) -> Tensor:
        """Return the diagonal scalar, as in LinearUse."""
        return (delta[self.ids] * self.scores).square().sum()


Use = LinearUse | LookupUse


def sampled_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return one label (P,) per position, sampled from softmax(``logits``), logits (P, V).

    ``uniform`` (P,) in [0, 1) decides: labels are found by inverting the cumulative distribution.
    """
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
    return found[:, 0].clamp_(max=logits.shape[-1] - 1)


def logit_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient (P, V) of log softmax(logits)[label]: the one-hot labels minus the probabilities.

    ``logits`` are (P, V), ``labels`` (P,).
    """
    scores = logits.softmax(-1).neg_()
    scores[torch.arange(len(labels), device=labels.device), labels] += 1
    return scores


def model_scores(model: BlockModel, ids: Tensor, uniform: Tensor, unscored: int = 0) -> Iterator[Use]:
    """Yield every use of a weight on token ids ``ids`` (n, T), from the head down to the lookup tables.

    ``uniform`` (n, T), float64 in [0, 1), decides the labels; the first ``unscored`` positions of a window have none. A
    tied embedding is yielded twice. Embedding, final norm and head must be loaded. A block that is not loaded is loaded
    while its own uses are yielded.
    """
    ids, uniform = ids.to(model.device), uniform.to(model.device)
    *inputs, hidden = _forward(model, ids)
    top, scores = head_scores(model, hidden, uniform, unscored)
    yield top
    del top
    blocks = len(model.blocks)
    for block in steps(reversed(range(blocks)), blocks, "block"):
        with at_hand(model, block):
            scores, uses = block_uses(model, block, inputs.pop(), scores)
            yield from uses
    for name, at_rows in model.lookup_gradients(ids, scores).items():
        yield LookupUse(name, ids.flatten(), at_rows.flatten(0, 1))


@torch.no_grad()
def _forward(model: BlockModel, ids: Tensor) -> list[Tensor]:
    """Return the input (n, T, D) of every block, and the output of the last."""
    batches = micro_batches(torch.arange(len(ids), device=ids.device), ids.shape[1])
    states = [torch.cat([model.embed(ids[rows]) for rows in batches])]
    for block in range(len(model.blocks)):
        with at_hand(model, block):
            states.append(torch.cat([model.run_block(block, states[-1][rows]) for rows in batches]))
    return states


@contextmanager
def at_hand(model: BlockModel, block: int) -> Iterator[None]:
    """Keep a block loaded inside the context, and unload it at exit unless it was loaded before."""
    missing = next(model.blocks[block].parameters()).is_meta
    if missing:
        model.load_block(block)
    try:
        yield
    finally:
        if missing:
            model.unload_block(block)


def head_scores(model: BlockModel, hidden: Tensor, uniform: Tensor, unscored: int) -> tuple[LinearUse, Tensor]:
    """Return the head's use, and the scores (n, T, D) at the last block's output ``hidden`` (n, T, D).

    The other arguments are as for ``model_scores``. Norm and head must be loaded.
    """
    hidden.requires_grad_(True)
    final = model.norm(hidden)
    counted = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    scored(counted, unscored).fill_(True)
    use, at_final = _head_use(model, final.detach().flatten(0, 1), uniform.flatten(), counted.flatten())
    (scores,) = torch.autograd.grad(final, hidden, at_final.view_as(final))
    return use, scores


def _head_use(model: BlockModel, final: Tensor, uniform: Tensor, counted: Tensor) -> tuple[LinearUse, Tensor]:
    """Return the head's use and the scores (P, D) at the final hidden states ``final`` (P, D).

    Scores are zero at positions that are not ``counted`` (P,).
    This is the only function that holds all P * V scores at once.
    """
    head = model.head
    scores, below = final.new_empty(len(final), len(head.weight)), torch.empty_like(final)
    step = chunk_positions(head)
    for start in range(0, len(final), step):
        part = slice(start, start + step)
        logits = head(final[part])
        scores[part] = logit_scores(logits, sampled_labels(logits, uniform[part]))
        scores[part][~counted[part]] = 0
        head.hidden_gradient(logits, scores[part], out=below[part])  # also makes scores[part] those before a soft cap
    return LinearUse(model.head_name, final, scores), below


@torch.no_grad()
def row_weights(head: Head, final: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield final hidden states (p, D) with the Fisher information (p, V) of each logit before a soft cap, in chunks.

    p_v (1 - p_v) is what a squared change of the product of row v and a state of ``final`` (P, D) counts.
    """
    for part in final.split(chunk_positions(head)):
        logits = head(part)
        spread = logits.softmax(-1)
        spread.mul_(1 - spread).clamp_(min=0).sqrt_()
        yield part, head.to_products(logits, spread).square_()


def block_uses(model: BlockModel, block: int, inputs: Tensor, scores: Tensor) -> tuple[Tensor, list[LinearUse]]:
    """Return the scores (n, T, D) at a block's input, given those at its output, and the uses of its linear layers."""
    below = []
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for rows in micro_batches(torch.arange(len(inputs), device=inputs.device), inputs.shape[1]):
        start = inputs[rows].requires_grad_(True)
        with recorded_linears(model, block) as recorded, repeatable_attention(model.device):
            end = model.run_block(block, start)
            outputs = [output for _, output, _ in recorded.values()]
            first, *at_outputs = torch.autograd.grad(end, [start, *outputs], scores[rows])
        below.append(first)
        for (name, (x, _, reads)), s in zip(recorded.items(), at_outputs, strict=True):
            at = None if reads is None else reads + rows[0] * inputs.shape[1]
            parts.setdefault(name, []).append((x.detach().flatten(0, -2), s.flatten(0, -2), at))
    uses = [_joined(name, found, inputs.shape[0] * inputs.shape[1]) for name, found in parts.items()]
    return torch.cat(below), uses


def _joined(name: str, parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], positions: int) -> LinearUse:
    """Return the use of a weight by all micro-batches of a text of so many ``positions``."""
    inputs, scores, reads = zip(*parts, strict=True)
    some = [part for part in reads if part is not None]
    return LinearUse(name, torch.cat(inputs), torch.cat(scores), torch.cat(some) if some else None, positions)


@contextmanager
def recorded_linears(model: BlockModel, block: int) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor | None]]]:
    """Yield a dict that a forward pass inside fills with (input, output) of the block's linear layers by weight name.

    The third of an expert's are the positions that chose it.
    """
    recorded: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}

    def record(name: str) -> Callable[[nn.Module, Sequence[Tensor], Tensor], None]:
        def hook(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            recorded[name] = (inputs[0], output, module.reads if isinstance(module, ExpertLinear) else None)

        return hook

    handles = [linear.register_forward_hook(record(name)) for name, linear in model.linears(block)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
