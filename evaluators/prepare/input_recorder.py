"""This module measures what the linear layers of one block read while the block runs.

Layers that read the same tensor (q/k/v, gate/up) form one input group and share one Hessian. An expert of a mixture has
inputs of its own: those of the positions that chose it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from evaluators.model.experts import expert_parts
from evaluators.model.folder import ModelFolderError
from evaluators.prepare.input_group import InputGroup
from quantizers.statistics.hessian import HessianAccumulator, mean_of, shrunk
from quantizers.statistics.moments import InputStatistics, StatisticsAccumulator

log = logging.getLogger(__name__)

# An expert's Hessian leans on the mean over all experts of the layer as if that were so many tokens of its own, times
# the number of columns: fewer tokens than columns leave directions that none of them has.
SHRINKAGE = 0.25


class InputAccumulator:
    """Accumulates the Hessian and the moments of one input, of ``columns`` features."""

    def __init__(self, columns: int, device: torch.device):
        self.hessian = HessianAccumulator(columns, device)
        self._moments = StatisticsAccumulator(columns, device)

    def add(self, x: Tensor, reader: str) -> None:
        """Add inputs x (..., columns).

        Raises ModelFolderError for a value that is not finite, naming ``reader``, the tensor that multiplies x.
        """
        if not x.isfinite().all():
            raise ModelFolderError(
                f"expected finite activations, found {int((~x.isfinite()).sum())} of {x.numel()} not finite in the "
                f"input of {reader}"
            )
        self.hessian.add(x)
        self._moments.add(x)

    def statistics(self) -> InputStatistics:
        """Return the moments. Raises ValueError before the first input."""
        return self._moments.statistics()

    def result(self) -> tuple[Tensor, InputStatistics]:
        """Return the Hessian float32 (columns, columns) and the moments. Raises ValueError before the first input."""
        return self.hessian.matrix(), self.statistics()


class InputRecorder:
    """Accumulates Hessians and moments of the inputs of ``linears``, the linear layers of one block, while it runs.

    Layers belong to one input group if they read the same memory within a pass; a group goes by its first reader.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]):
        self._linears = linears
        self._accumulators: dict[str, InputAccumulator] = {}  # by the first tensor of a group
        self._members: dict[str, list[str]] = {}
        self._alive: list[Tensor] = []  # inputs of this pass, kept so that their addresses are not reused
        self._readers: dict[int, str] = {}  # first reader, by address
        self._moments: dict[tuple[str, str], StatisticsAccumulator] = {}  # of all experts, by mixture and kind
        self._handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in linears.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first = self._readers.get(x.data_ptr())
            if first is None:
                first = self._readers[x.data_ptr()] = name
                self._alive.append(x)
                self._accumulator(name, x).add(x, name)
                if parts := expert_parts(name):
                    pool = (parts.mixture, parts.kind)
                    self._moments.setdefault(pool, StatisticsAccumulator(x.shape[-1], x.device)).add(x)
            members = self._members.setdefault(first, [])
            if name not in members:
                members.append(name)

        return record

    def _accumulator(self, name: str, x: Tensor) -> InputAccumulator:
        if name not in self._accumulators:
            self._accumulators[name] = InputAccumulator(x.shape[-1], x.device)
        return self._accumulators[name]

    def end_pass(self) -> None:
        """Release the inputs of the pass; call it after every chunk."""
        self._alive.clear()
        self._readers.clear()

    def groups(self) -> Iterator[InputGroup]:
        """Remove the hooks and yield the input groups in the order in which the block first read them.

        Those of experts come last, each mixture's in the order of its experts.
        """
        for handle in self._handles:
            handle.remove()
        pools: dict[tuple[str, str], dict[int, list[str]]] = {}
        for first, members in self._members.items():
            if parts := expert_parts(first):
                pools.setdefault((parts.mixture, parts.kind), {})[parts.expert] = members
            else:
                yield _group(members, *self._accumulators.pop(first).result())
        for (mixture, kind), experts in pools.items():
            yield from self._expert_groups(mixture, kind, experts)

    def _expert_groups(self, mixture: str, kind: str, reached: Mapping[int, list[str]]) -> Iterator[InputGroup]:
        """Yield the groups of the input of the layers ``kind``; ``reached`` holds the tensors that read it, by expert.

        A Hessian is shrunk towards the mean, and scaled to the share of positions that chose its expert, so that errors
        of experts add up to the error of their layer's output.
        """
        every = [parts for name in self._linears if (parts := expert_parts(name)) and parts.mixture == mixture]
        readers = [parts.kind for name in next(iter(reached.values())) if (parts := expert_parts(name))]
        hessians = {expert: self._accumulators[names[0]].hessian for expert, names in reached.items()}
        mean, total = mean_of(list(hessians.values())), sum(own.count for own in hessians.values())
        pooled = self._moments[mixture, kind].statistics()
        experts, strength = 1 + max(parts.expert for parts in every), SHRINKAGE * len(mean)
        counts = [hessians[expert].count if expert in hessians else 0 for expert in range(experts)]
        warn_of_few(f"{mixture}*.{kind}", counts, strength)
        for expert, count in enumerate(counts):
            own = self._accumulators.pop(reached[expert][0]) if expert in reached else None
            H = shrunk(own.hessian if own else None, mean, strength)
            H *= (count + 1) / (total + experts)  # never 0: then nothing would be known of the input
            names = [f"{mixture}{expert}.{reader}" for reader in readers]
            yield _group(names, H, own.statistics() if own else pooled, count)


def warn_of_few(name: str, counts: Sequence[int], strength: float) -> None:
    """Warn of experts that fewer positions chose than ``strength``; ``counts`` has one number per expert."""
    few = [count for count in counts if count < strength]
    if few:
        log.warning(
            "%s: %d of %d experts read fewer than %d positions of the calibration text, the least %d: they lean on the "
            "mean over experts, and more text would help",
            name, len(few), len(counts), strength, min(few),
        )  # fmt: skip


def _group(members: list[str], H: Tensor, statistics: InputStatistics, count: int | None = None) -> InputGroup:
    if not statistics.mean_square.any():
        for name in members:
            log.warning("the input of %s is always zero: all of its columns are rounded alike", name)
    return InputGroup(members[0].removesuffix(".weight"), tuple(members), H, statistics, count)
