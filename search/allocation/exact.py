"""Solvers of the allocation problem over an additive sensitivity table.

The problem is the multiple-choice knapsack: one choice per gene, with the least total loss within the budget. A genetic
search can at best equal these solvers on the table itself; it can gain only what the table does not know.
"""

import logging
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from bitgenome.common.c_output import silent_c_stdout
from search.allocation.moves import Moves
from search.allocation.repair import Repair
from search.allocation.sensitivity import SensitivityTable
from search.budget import Budget
from search.types import Genome, SearchSpace

logger = logging.getLogger(__name__)

NODE_LIMIT = 20_000  # branch-and-bound nodes: meant to be reached first, because it is the same on every machine
TIME_LIMIT = 60.0  # seconds: a last resort, because it is not
OPTIMAL_GAP = 1e-6  # relative, below which a solution counts as optimal
SOLVER_LOSS = 10.0  # total loss that HiGHS sees, far above its absolute tolerances of 1e-6


@dataclass(frozen=True)
class Solution:
    """A solution is a feasible genome, its additive loss, and how far that is above the proven lower bound.

    ``gap`` is relative to the loss of the Lagrangian genome; 0.0 is optimal.
    """

    genome: Genome
    loss: float
    gap: float


def greedy(space: SearchSpace, budget: Budget, table: SensitivityTable) -> Genome:
    """Return the genome reached from the smallest by the upgrades that gain most per byte, until nothing fits.

    Raises ValueError if not even the smallest genome fits.
    """
    return Repair(space, budget, table).fill(space.smallest())


def lagrangian(space: SearchSpace, budget: Budget, table: SensitivityTable) -> Genome:
    """Return the minimum of loss + multiplier * bytes for the least multiplier whose genome fits, then filled greedily.

    Only the vertices of a gene's lower convex hull are minima for some multiplier, and the answer changes only at the
    slopes of the hulls. The steps between vertices, steepest first, are therefore all multipliers worth trying, and
    bisection over their cumulated bytes finds the least that fits. Raises ValueError if not even the smallest genome
    fits.
    """
    repair = Repair(space, budget, table)
    start, steps = _hulls(repair.moves)
    steps.sort(key=lambda step: step[0])  # stable, and slopes grow along a hull: a gene's steps stay in order
    bytes_after = np.cumsum([size for _, size, _, _ in steps], dtype=np.int64)
    taken = int(np.searchsorted(bytes_after, repair.slack(start), side="right"))
    genome = list(start)
    for _, _, gene, choice in steps[:taken]:
        genome[gene] = choice
    return repair.fill(tuple(genome))


def exact(
    space: SearchSpace,
    budget: Budget,
    table: SensitivityTable,
    time_limit: float = TIME_LIMIT,
    node_limit: int = NODE_LIMIT,
) -> Solution:
    """Return the optimum of the table within the budget, by mixed-integer programming (HiGHS).

    ``time_limit`` is in seconds, ``node_limit`` in branch-and-bound nodes. If a limit stops the proof, the better of
    the solver's best and the Lagrangian genome is returned with its gap, and a warning is logged. Raises ValueError if
    not even the smallest genome fits.
    """
    moves = Repair(space, budget, table).moves
    fallback = lagrangian(space, budget, table)
    unit = abs(moves.predict(fallback)) / SOLVER_LOSS or 1.0  # HiGHS's tolerances are absolute, and a KL may be 1e-6
    result = _solve(space, budget, moves, unit, time_limit=time_limit, node_limit=node_limit)
    candidates = [fallback]
    if result.x is not None:
        chosen = [int(np.argmax(x)) for x in np.split(result.x, moves.offset[1:])]
        candidates += [tuple(chosen)] if moves.file_bytes(tuple(chosen)) <= budget.file_bytes else []
    genome = min(candidates, key=moves.predict)
    loss, bound = moves.predict(genome), result.mip_dual_bound
    gap = float("inf") if bound is None else max(0.0, loss / unit - bound) / SOLVER_LOSS
    if result.status == 0 and gap <= OPTIMAL_GAP:
        return Solution(genome, loss, 0.0)
    logger.warning("exact solver stopped before its proof (%s): gap %.3g of %s", result.message, gap, table.measure)
    return Solution(genome, loss, gap)


def _hulls(moves: Moves) -> tuple[Genome, list[tuple[float, int, int, int]]]:
    """Return the genome of least bytes, and every step (slope, bytes, gene, choice) along the lower convex hulls."""
    start, steps = [], []
    for gene, (size, loss) in enumerate(
        zip(np.split(moves.size, moves.offset[1:]), np.split(moves.loss, moves.offset[1:]), strict=True)
    ):
        here = int(np.lexsort((loss, size))[0])
        start.append(here)
        while True:
            larger = np.flatnonzero((size > size[here]) & (loss < loss[here]))
            if not len(larger):
                break
            slopes = (loss[larger] - loss[here]) / (size[larger] - size[here])
            nearest = larger[np.lexsort((-size[larger], slopes))[0]]  # the farthest of equally steep vertices
            steps.append((float(slopes.min()), int(size[nearest] - size[here]), gene, int(nearest)))
            here = int(nearest)
    return tuple(start), steps


def _solve(
    space: SearchSpace, budget: Budget, moves: Moves, loss_unit: float, *, time_limit: float, node_limit: int
) -> OptimizeResult:
    """Minimize loss . x / loss_unit with one choice per gene and bytes within the budget.

    x holds one binary value for each (gene, choice). ``time_limit`` is in seconds.
    """
    steps = moves.size - np.minimum.reduceat(moves.size, moves.offset)[moves.gene]
    unit = gcd(*steps.tolist()) or 1  # makes the integers as small as possible
    room = (budget.file_bytes - moves.fixed_bytes - int((moves.size - steps)[moves.offset].sum())) // unit
    pairs = len(moves.gene)
    one_choice = csr_array((np.ones(pairs), (moves.gene, np.arange(pairs))), shape=(len(space.genes), pairs))
    # HiGHS 1.12 prints a line, whatever its options, where a solution that it found breaks a constraint of the
    # original by rounding (https://github.com/ERGO-Code/HiGHS/issues/2783)
    with silent_c_stdout():
        return milp(
            moves.loss / loss_unit,
            integrality=np.ones(pairs, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_choice, 1, 1),
                LinearConstraint((steps // unit).astype(np.float64)[None, :], -np.inf, room),
            ],
            options={"time_limit": time_limit, "node_limit": node_limit, "mip_rel_gap": OPTIMAL_GAP / 10},
        )
