"""The multiple-choice knapsack: one choice of bits for every unit, least total cost, within one or several limits.

    minimise sum_i cost[i, j_i]   subject to   sum_i use[i, j_i, c] <= limit[c] for every c

`solve` is exact, or the gap is told: how much less another answer could cost at most. Multipliers of the limits
(bisection for one, the linear program of HiGHS for several) turn every choice into a *detour*: how much worse it is
than its unit's best once use has its price. The best answer of all has detours below the gap between any answer and the
bound, so units are taken up in the order of their cheapest detour per use, the answers so far are kept as states (use,
detours), and a state goes when another one dominates it or its bound is no better than the best answer (Pisinger, EJOR
83, 1995). When more states are left than fit, HiGHS (scipy.optimize.milp) solves what could not be excluded, and its
answer is checked in whole numbers. One limit is proven for 10,000 units within seconds; of several that all bind a few
hundred units are, and thousands may keep a gap when the time is up.

`curve` is the trade-off between one use and the cost: its points are the corners of the lower convex hull, each of them
exactly optimal at its own size. Between two corners a limit has to be solved for by `solve`.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-9
"""An answer whose cost, above that of the cheapest choices without limits, is within this part of the bound is best."""

_PRECISION = 1e-13  # of the sum of all units' ranges of cost: what sums of doubles hold
# (states at a time, states in all): a quick look for a good answer, then the search that has to be complete.
_EFFORTS = ((5_000, 3_000_000), (400_000, 12_000_000))
_HIGHS_CHOICES = 2_000
_HIGHS_INFEASIBLE = 2  # 1 is out of time
SECONDS = 8.0
"""Processor time of a solution, unless it is proven before."""
_ROUNDS = 100


@dataclass(frozen=True)
class Solution:
    """A choice for every unit.

    Attributes:
        choices: [units] the index of each unit's choice.
        cost: their sum.
        gap: how much less another answer could cost at most; 0 where this one is proven best (`TOLERANCE`). Seen on
            thousands of units of all sizes whose costs are their bytes (1e-8 of the cost) or those plus a constant
            (1e-6), the known worst cases.
    """

    choices: NDArray[np.int64]
    cost: float
    gap: float


@dataclass(frozen=True)
class Point:
    """A corner of the trade-off curve.

    Attributes:
        use: the sum of uses.
        cost: the sum of costs, the least that is possible with this use.
        unit: whose choice changed from the point before; None at the first.
        choice: that it changed to.
    """

    use: int
    cost: float
    unit: int | None
    choice: int | None


def solve(
    costs: NDArray[np.float64], uses: NDArray[np.int64], limits: NDArray[np.int64], seconds: float = SECONDS
) -> Solution | None:
    """The cheapest choices within the limits.

    Args:
        costs: [units, choices].
        uses: [units, choices, limits] whole numbers.
        limits: [limits]; below 0 is allowed, as uses are.
        seconds: of processor time, after which the best answer so far is taken, with its gap.

    Returns:
        The solution; None where no choices keep within the limits.

    Raises:
        ValueError: no answer was found in the time, and none was excluded.
    """
    deadline = time.process_time() + seconds
    if not len(costs):
        return Solution(np.zeros(0, np.int64), 0.0, 0.0) if (limits >= 0).all() else None
    if (uses.min(axis=1).sum(axis=0) > limits).any():
        return None
    if len(limits) > 1:
        # Limits that nothing reaches say nothing; without the others, one that remains is the easy case.
        kept = uses.max(axis=1).sum(axis=0) > limits
        if not kept.all():
            kept[0] |= not kept.any()
            uses, limits = uses[:, :, kept], limits[kept]
    problem = _Problem(costs, uses, limits, deadline)
    if len(limits) > 1 and np.count_nonzero(problem.prices) == 1:
        # The best answer within the one limit that has a price is best within all of them, if it keeps them.
        one = np.flatnonzero(problem.prices)
        single = _solved(_Problem(costs, uses[:, :, one], limits[one], deadline), deadline, seconds)
        if single is not None and (problem.use_of(single.choices) <= limits).all():
            return single
    return _solved(problem, deadline, seconds)


def _solved(problem: "_Problem", deadline: float, seconds: float) -> Solution | None:
    """The search, and HiGHS for what it leaves."""
    best, complete = None, False
    # Several limits may leave the search without any answer: half of the time is for HiGHS then.
    stop = deadline if len(problem.limits) == 1 else deadline - 0.5 * (deadline - time.process_time())
    for most, work in _EFFORTS:
        if not complete:
            best, complete = problem.search(most, work, best, stop)
    gap = 0.0
    if not complete:
        best, bound, excluded = _integer_program(problem, best, deadline)
        if best is None and not excluded:
            raise ValueError(
                f"no plan was found within {seconds:g} s, and none was proven impossible: ask for more of one of the "
                "limits, or decide on larger parts with --granularity layer"
            )
        gap = 0.0 if best is None else max(0.0, problem.cost_of(best) - bound)
    if best is None:
        return None
    assert (problem.use_of(best) <= problem.limits).all(), "the choices exceed a limit"
    return Solution(best, problem.cost_of(best), gap if gap > problem.tolerance else 0.0)


class _Problem:
    """An instance with its multipliers: detours against the best choices at those prices."""

    def __init__(self, costs: NDArray, uses: NDArray, limits: NDArray, deadline: float = np.inf) -> None:
        self.costs, self.uses, self.limits = costs, uses, limits
        left = max(0.1, deadline - time.process_time())
        self.prices = _price(costs, uses, limits) if len(limits) == 1 else _prices(costs, uses, limits, left)
        reduced = costs + uses @ self.prices
        # Of equally good choices the one that uses least, so that one limit is kept by all of them together.
        ties = np.where(reduced <= reduced.min(axis=1, keepdims=True), uses @ (self.prices + 1e-300), np.inf)
        for limit in range(len(limits)):
            ties = np.where(ties < np.inf, uses[:, :, limit], ties)
        self.base = ties.argmin(axis=1)
        rows = np.arange(len(costs))
        self._fill(reduced - reduced[rows, self.base][:, None], _PRECISION * float(np.ptp(costs, axis=1).max()))
        self.detours = reduced - reduced[rows, self.base][:, None]
        self.changes = uses - uses[rows, self.base][:, None]
        self.room = limits - self.use_of(self.base)
        self.bound = self.cost_of(self.base) - float(self.prices @ self.room)
        """No answer costs less."""
        unlimited = float(costs.min(axis=1).sum())
        self.tolerance = TOLERANCE * (self.bound - unlimited) + _PRECISION * float(np.ptp(costs, axis=1).sum())

    def _fill(self, detours: NDArray, nothing: float) -> None:
        """Where many choices are equally good at these prices, take those that use more while there is room."""
        room = self.limits - self.use_of(self.base)
        more = self.uses - self.uses[np.arange(len(self.base)), self.base][:, None]
        free = (detours <= nothing) & (more > 0).any(axis=2)
        for unit in np.flatnonzero(free.any(axis=1)):
            for choice in np.flatnonzero(free[unit])[np.argsort(-more[unit, free[unit]].sum(axis=1), kind="stable")]:
                if (more[unit, choice] <= room).all():
                    self.base[unit] = choice
                    room = room - more[unit, choice]
                    break

    def use_of(self, choices: NDArray) -> NDArray:
        return self.uses[np.arange(len(choices)), choices].sum(axis=0)

    def cost_of(self, choices: NDArray) -> float:
        return float(self.costs[np.arange(len(choices)), choices].sum())

    def search(
        self, most: int, work: int, known: NDArray | None, deadline: float = np.inf
    ) -> tuple[NDArray | None, bool]:
        """The best answer, and whether no better one can have been dropped.

        Args:
            most: states to keep at a time.
            work: states to look at in all.
            known: an answer to start from.
            deadline: of the processor's time.
        """
        best, worth = known, np.inf if known is None else self.cost_of(known) - self.bound
        detours, changes, room, prices = self.detours, self.changes, self.room, self.prices
        weighed = np.abs(changes) @ prices
        moves = (changes != 0).any(axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = np.where(moves, detours / np.maximum(weighed, 1e-300), np.inf).min(axis=1)
        order = np.argsort(rates, kind="stable")
        order = order[np.where(moves, detours, np.inf).min(axis=1)[order] < worth]
        up, down = _best_rates(detours[order], changes[order])
        use, spent = np.zeros((1, len(room)), np.int64), np.zeros(1)
        steps: list[tuple[int, NDArray, NDArray]] = []
        complete = True
        for place in range(-1, len(order)):
            if place >= 0:
                unit = order[place]
                open_ = [j for j in np.flatnonzero(moves[unit]) if detours[unit, j] < worth]
                if not open_:
                    continue
                count = len(use)
                kept_use = np.concatenate([use, *(use + changes[unit, j] for j in open_)])
                kept_spent = np.concatenate([spent, *(spent + detours[unit, j] for j in open_)])
                parent = np.tile(np.arange(count), len(open_) + 1)
                choice = np.repeat([self.base[unit], *open_], count)
            else:
                unit, kept_use, kept_spent = -1, use, spent
                parent, choice = np.zeros(1, np.int64), np.zeros(1, np.int64)
            left = room - kept_use
            whole = kept_spent + np.where((left >= 0).all(axis=1), left @ prices, np.inf)
            found = int(whole.argmin())
            steps.append((unit, parent, choice))
            if whole[found] < worth - self.tolerance / 2:
                best, worth = self._choices(steps, found), float(whole[found])
            if worth <= self.tolerance:
                return best, True
            work -= len(kept_use)
            if work < 0 or time.process_time() > deadline:
                return best, False
            # What is left to do costs at least its rate; room that stays empty costs its price.
            rate = np.where(left < 0, down[place + 1], np.minimum(up[place + 1], prices))
            with np.errstate(invalid="ignore"):
                lower = kept_spent + np.nan_to_num(np.abs(left) * rate, nan=0.0, posinf=np.inf).max(axis=1)
            alive = np.flatnonzero(lower < worth - self.tolerance / 2)
            alive = alive[_undominated(kept_use[alive], kept_spent[alive], prices)]
            if len(alive) > most:
                complete = False
                alive = alive[np.lexsort((np.abs(left[alive]).max(axis=1), lower[alive]))[:most]]
            steps[-1] = (unit, parent[alive].astype(np.int32), choice[alive].astype(np.int8))
            use, spent = kept_use[alive], kept_spent[alive]
            if not len(use):
                break
        return best, complete

    def _choices(self, steps: list[tuple[int, NDArray, NDArray]], state: int) -> NDArray:
        choices = self.base.copy()
        for unit, parent, choice in reversed(steps):
            if unit >= 0:
                choices[unit] = choice[state]
            state = int(parent[state])
        return choices


def _best_rates(detours: NDArray, changes: NDArray) -> tuple[NDArray, NDArray]:
    """[units + 1, limits] each: the least detour per use added, and per use saved, of this unit and all behind it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = detours[:, :, None] / np.abs(changes)
    result = []
    for wanted in (changes > 0, changes < 0):
        each = np.where(wanted, rates, np.inf).min(axis=1)
        each = np.concatenate([each, np.full((1, changes.shape[2]), np.inf)])
        result.append(np.minimum.accumulate(each[::-1])[::-1])
    return result[0], result[1]


def _undominated(use: NDArray, spent: NDArray, prices: NDArray) -> NDArray:
    """Indices of states without another that uses no more and costs no more (for several limits: uses the same)."""
    if not len(use):
        return np.zeros(0, np.int64)
    if use.shape[1] == 1:
        cost = spent - use[:, 0] * prices[0]
        order = np.lexsort((cost, use[:, 0]))
        least = np.minimum.accumulate(cost[order])
        return order[np.concatenate([[True], cost[order][1:] < least[:-1]])]
    order = np.lexsort((spent, *use.T))
    sorted_use = use[order]
    return order[np.concatenate([[True], (sorted_use[1:] != sorted_use[:-1]).any(axis=1)])]


def _price(costs: NDArray, uses: NDArray, limits: NDArray) -> NDArray:
    """[1] the least price at which the best choices keep within one limit, by bisection."""
    use, rows = uses[:, :, 0], np.arange(len(costs))

    def fits(price: float) -> bool:
        reduced = costs + price * use
        best = np.where(reduced <= reduced.min(axis=1, keepdims=True), use, np.iinfo(np.int64).max).argmin(axis=1)
        return use[rows, best].sum() <= limits[0]

    if fits(0.0):
        return np.zeros(1)
    low, high = 0.0, max(float(np.ptp(costs)), 1e-300)
    while not fits(high):
        high *= 2
    for _ in range(_ROUNDS):
        middle = (low + high) / 2 if low else high / 64
        low, high = (low, middle) if fits(middle) else (middle, high)
    return np.array([high])


def _prices(costs: NDArray, uses: NDArray, limits: NDArray, seconds: float) -> NDArray:
    """[limits] dual values of the linear program, whose choices may be fractions."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    units, choices = costs.shape
    one_each = csr_array(
        (np.ones(costs.size), (np.repeat(np.arange(units), choices), np.arange(costs.size))), shape=(units, costs.size)
    )
    scale = np.abs(uses).sum(axis=1).max(axis=0).astype(float) + 1
    worth = max(float(np.ptp(costs, axis=1).max()), 1e-300)
    solved = linprog(
        (costs - costs.min(axis=1, keepdims=True)).ravel() / worth,
        A_ub=csr_array(uses.reshape(-1, len(limits)).T / scale[:, None]),
        b_ub=limits / scale,
        A_eq=one_each,
        b_eq=np.ones(units),
        bounds=(0, 1),
        method="highs",
        options={} if np.isinf(seconds) else {"time_limit": seconds},
    )
    if solved.ineqlin is None or solved.ineqlin.marginals is None:
        return np.zeros(len(limits))  # without an answer; any price gives a bound
    return np.maximum(-np.nan_to_num(solved.ineqlin.marginals), 0.0) * worth / scale


def _integer_program(
    problem: _Problem, known: NDArray | None, deadline: float = np.inf
) -> tuple[NDArray | None, float, bool]:
    """What the search could not finish, by HiGHS: the best choices, and a bound that no answer is below.

    The last value tells that there is no other answer, if there are no choices: what ran out of time says nothing.

    Its tolerances let an answer exceed a limit by a little. Such an answer is cut off by itself, which loses no other.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    worth = np.inf if known is None else problem.cost_of(known) - problem.bound
    open_ = problem.detours < worth + problem.tolerance
    units, choices = np.nonzero(open_)
    count = len(units)
    if count > len(problem.costs) + _HIGHS_CHOICES and known is not None:
        return known, problem.bound, False
    ones = csr_array((np.ones(count), (units, np.arange(count))), shape=(len(problem.costs), count))
    divisors = np.maximum(np.gcd.reduce(problem.uses[open_], axis=0), 1)
    uses = csr_array((problem.uses[open_] // divisors).T.astype(float))
    costs = problem.costs[open_]
    scale = 1e6 / (float(np.ptp(costs)) or 1.0)  # HiGHS takes differences of 1e-6 for none
    limits = [LinearConstraint(ones, 1, 1), LinearConstraint(uses, -np.inf, problem.limits // divisors)]
    cuts: list[csr_array] = []
    for _ in range(_ROUNDS):
        left = deadline - time.process_time()
        if left <= 0:
            break
        rows = [*limits, *([LinearConstraint(vstack(cuts), -np.inf, len(problem.costs) - 1)] if cuts else [])]
        with _quiet_stdout():
            solved = milp(
                costs * scale,
                constraints=rows,
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0, **({} if np.isinf(left) else {"time_limit": left})},
            )
        bound = problem.bound if solved.mip_dual_bound is None else max(problem.bound, solved.mip_dual_bound / scale)
        if solved.x is None:
            excluded = solved.status == _HIGHS_INFEASIBLE
            return known, problem.cost_of(known) if known is not None and excluded else bound, excluded
        chosen = np.zeros_like(problem.base)
        taken = np.flatnonzero(solved.x > 0.5)
        chosen[units[taken]] = choices[taken]
        if (problem.use_of(chosen) <= problem.limits).all():
            if known is not None and problem.cost_of(known) < problem.cost_of(chosen):
                chosen = known
            if solved.status == 0:
                bound = max(bound, problem.cost_of(chosen) - 2e-6 / scale)
            return chosen, bound, False
        cuts.append(csr_array((np.ones(len(taken)), (np.zeros(len(taken), int), taken)), shape=(1, count)))
    return known, problem.bound, False


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS prints to the process's own stdout now and then, whatever it is told; `--json` must stay JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def curve(costs: NDArray[np.float64], uses: NDArray[np.int64]) -> list[Point]:
    """The corners of the convex trade-off between use and cost, from the least use to the least cost.

    Every unit climbs its own convex hull; the steps of all units are taken by the cost they save per use, most first.
    That is what the linear program does, and where it stops at whole choices they are the best for their use.

    Args:
        costs: [units, choices].
        uses: [units, choices] whole numbers.
    """
    start_use, start_cost = 0, 0.0
    steps: list[tuple[float, int, int, int, float]] = []
    for unit, (unit_costs, unit_uses) in enumerate(zip(costs.tolist(), uses.tolist(), strict=True)):
        hull = _hull(unit_costs, unit_uses)
        start_use += unit_uses[hull[0]]
        start_cost += unit_costs[hull[0]]
        for low, high in itertools.pairwise(hull):
            used, saved = unit_uses[high] - unit_uses[low], unit_costs[low] - unit_costs[high]
            steps.append((-saved / used, unit, high, used, saved))
    points = [Point(start_use, start_cost, None, None)]
    for _, unit, choice, used, saved in sorted(steps):  # a unit's own steps are sorted as its hull is convex
        points.append(Point(points[-1].use + used, points[-1].cost - saved, unit, choice))
    return points


def _hull(costs: list[float], uses: list[int]) -> list[int]:
    """Choices on the lower convex hull, from the least use to the least cost."""
    hull: list[int] = []
    for choice in sorted(range(len(costs)), key=lambda j: (uses[j], costs[j])):
        if hull and costs[choice] >= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (costs[a] - costs[b]) * (uses[choice] - uses[b]) > (costs[b] - costs[choice]) * (uses[b] - uses[a]):
                break
            hull.pop()
        hull.append(choice)
    return hull
