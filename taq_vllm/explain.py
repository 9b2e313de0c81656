"""Why a plan is as it is: what two plans differ in, and what moves one unit up or down.

`explain` asks the allocation itself: it is run again at the plan's own size, at one byte less, and at the sizes between
it and the largest until the smallest is found at which the unit has more bits. What it says of other budgets is in
bytes, so there is nothing to say where a plan was made for a latency, or was edited: then the allocation would not make
the same plan of its size, and the explanation says so. The search halves the sizes: if a unit should lose bits again as
the budget grows, the size that is named is one at which it gains them, and not the first.

What all budgets buy is `curve.py`.
"""

from dataclasses import dataclass

import numpy as np

from taq_vllm.allocate import Problem, Request
from taq_vllm.budget import Shapes
from taq_vllm.plan import Plan
from taq_vllm.scores import Scores, UnitScore
from taq_vllm.units import Granularity, units_of


@dataclass(frozen=True)
class Difference:
    """A matrix that two plans treat differently.

    Attributes:
        name: of the matrix.
        bits: in the first and in the second plan; None where a plan leaves the head as it is.
        symmetric: in the first and in the second; at the same bits it alone makes other bytes.
        disk_bytes: in the first and in the second.
    """

    name: str
    bits: tuple[int | None, int | None]
    symmetric: tuple[bool | None, bool | None]
    disk_bytes: tuple[int | None, int | None]


@dataclass(frozen=True)
class Move:
    """One unit at other bits.

    Attributes:
        bits: that it would have.
        disk_bytes: that it would take more, or less where negative.
        cost: that the plan would have more, or less where negative; in the scorer's unit, or by rank.
    """

    bits: int
    disk_bytes: int
    cost: float

    @property
    def per_byte(self) -> float:
        """Cost saved per byte."""
        return -self.cost / self.disk_bytes if self.disk_bytes else 0.0


@dataclass(frozen=True)
class Cost:
    """What a unit costs at a bitwidth.

    Attributes:
        bits: of the unit.
        used: by the allocation: never negative, and never rising with the bits.
        measured: by the scorer; None where it did not measure this bitwidth, or other parts of the model.
        stderr: of that.
    """

    bits: int
    used: float
    measured: float | None
    stderr: float | None


@dataclass(frozen=True)
class Explanation:
    """What a plan does with a unit, and why.

    Attributes:
        unit: its name.
        matrices: bits of each.
        why: of its matrices, without repetition.
        score: of the unit; None where the plan was made without scores.
        stderr: of the score, from the scores file.
        rank: 0 is the unit that needs precision most.
        units: that are ranked.
        disk_bytes: of its matrices.
        up: the next more bits of the menu; None at the top, and where bits are not decided by scores.
        down: the next fewer bits.
        cost_unit: of the moves' costs.
        costs: what the allocation took each bitwidth of the menu for, with what was measured of it; empty where the
            plan was not made from the scorer's costs, or they are not given.
        more_bits_at: the smallest size on disk, in bytes, at which it gets more bits; None where there is none.
        more_bits: that it gets then.
        one_byte_less: (unit, bits now, bits then) of all that changes if the plan had a byte less than it takes.
        note: why the last three are not known, or nothing.
    """

    unit: str
    matrices: dict[str, int]
    why: tuple[str, ...]
    score: float | None
    stderr: float | None
    rank: int | None
    units: int
    disk_bytes: int
    up: Move | None
    down: Move | None
    cost_unit: str
    costs: tuple[Cost, ...]
    more_bits_at: int | None
    more_bits: int | None
    one_byte_less: tuple[tuple[str, int, int], ...]
    note: str


def diff(first: Plan, second: Plan) -> list[Difference]:
    """The matrices whose bits or symmetry differ, in the first plan's order; at 16 bits there is no symmetry.

    Raises:
        ValueError: plans of two models.
    """
    if first.base_model.fingerprint != second.base_model.fingerprint:
        raise ValueError(
            f"the plans are for two models: {first.base_model.id} ({first.base_model.fingerprint[:12]}) and "
            f"{second.base_model.id} ({second.base_model.fingerprint[:12]}); compare plans of one"
        )
    differences = []
    for name in {**first.matrices, **second.matrices}:
        entries = first.matrices.get(name), second.matrices.get(name)
        one, other = (16 if entry is None else entry.bits for entry in entries)
        quantized_alike = one == other and (one == 16 or entries[0].symmetric == entries[1].symmetric)
        if not quantized_alike:
            columns = [
                tuple(entry and getattr(entry, field) for entry in entries)
                for field in ("bits", "symmetric", "disk_bytes")
            ]
            differences.append(Difference(name, *columns))
    return differences


def explain(plan: Plan, target: str, scores: Scores | None = None) -> list[Explanation]:
    """Explain what a plan does with a unit, or with all units of a layer.

    Args:
        plan: made by `allocate`.
        target: `3` or `layers.3`, a unit's name or the end of it, a matrix, or `lm_head`.
        scores: that it was made from: for standard errors, and for costs where the allocation used the scorer's.

    Raises:
        ValueError: nothing of that name, or scores that the plan was not made from.
    """
    if scores is not None:
        _check_same(plan, scores)
    problem = _problem(plan, scores)
    wanted = f"model.layers.{target}" if target.isdecimal() else target
    found = [
        unit
        for unit, names in problem.units.items()
        if f".{wanted}." in f".{unit}." or any(f".{wanted}." in f".{name}." for name in names)
    ]
    if not found:
        example = next(iter(problem.units))
        raise ValueError(
            f"the plan has no {target!r}; its units are named like {example}, its matrices like "
            f"{problem.units[example][0]}"
        )
    without_costs = plan.allocation.settings.get("cost_unit") is not None and scores is None
    note = "the plan was made from the scorer's costs: give --scores FILE to see them" if without_costs else ""
    now = {unit: _bits_of(plan, problem, unit) for unit in problem.free}
    if not note and plan.scorer is None:
        note = "the plan was made without scores"
    if not note and _solved(problem, plan.budget.disk_bytes) != now:
        note = "the allocation makes another plan of this size: it was made for another kind of budget, or edited"
    fewer = None if note else _solved(problem, plan.budget.disk_bytes - 1)
    changes = tuple((u, now[u], fewer[u]) for u in problem.free if fewer[u] != now[u]) if fewer else ()
    return [_explanation(plan, problem, unit, scores, now, changes, note, without_costs) for unit in found]


def _explanation(
    plan: Plan,
    problem: Problem,
    unit: str,
    scores: Scores | None,
    now: dict[str, int],
    changes: tuple[tuple[str, int, int], ...],
    note: str,
    without_costs: bool,
) -> Explanation:
    entries = {name: plan.matrices[name] for name in problem.units[unit]}
    first = next(iter(entries.values()))
    more_at, more_bits = (None, None) if note or unit not in now else _smallest_with_more(plan, problem, unit, now)
    up, down = (None, None) if without_costs or unit not in now else _moves(problem, unit, now[unit])
    return Explanation(
        unit=unit,
        matrices={name: entry.bits for name, entry in entries.items()},
        why=tuple(dict.fromkeys(entry.why for entry in entries.values())),
        score=first.score,
        stderr=problem.scored[unit].stderr if scores and unit in problem.scored else None,
        rank=first.rank,
        units=len({entry.rank for entry in plan.matrices.values()} - {None}),
        disk_bytes=sum(entry.disk_bytes for entry in entries.values()),
        up=up,
        down=down,
        cost_unit=plan.allocation.settings.get("cost_unit") or "rank loss",
        costs=_costs(problem, unit, scores) if unit in now else (),
        more_bits_at=more_at,
        more_bits=more_bits,
        one_byte_less=changes,
        note=note,
    )


def _costs(problem: Problem, unit: str, scores: Scores | None) -> tuple[Cost, ...]:
    """Used and measured, where the plan was made from the scorer's costs."""
    if scores is None or scores.cost_unit is None or problem.request.allocation != "knapsack":
        return ()
    entry = next((entry for entry in scores.units if entry.unit == unit), None)
    measured = entry.costs if entry else {}
    stderrs = entry.cost_stderrs if entry else {}
    row = problem.costs[problem.free.index(unit)]
    return tuple(
        Cost(bits, float(used), measured.get(bits), stderrs.get(bits))
        for bits, used in zip(problem.request.menu, row, strict=True)
    )


def _moves(problem: Problem, unit: str, bits: int) -> tuple[Move | None, Move | None]:
    """To the next more and the next fewer bits of the menu."""
    menu, costs = problem.request.menu, problem.costs[problem.free.index(unit)]
    place = menu.index(bits)
    moves = []
    for other in (place + 1, place - 1):
        if not 0 <= other < len(menu):
            moves.append(None)
            continue
        size = problem.unit_bytes(unit, menu[other]) - problem.unit_bytes(unit, bits)
        moves.append(Move(menu[other], size, float(costs[other] - costs[place])))
    return moves[0], moves[1]


def _smallest_with_more(plan: Plan, problem: Problem, unit: str, now: dict[str, int]) -> tuple[int | None, int | None]:
    """The smallest size at which the allocation gives a unit more bits, and those."""
    shapes = problem.shapes
    low, high = (
        plan.budget.disk_bytes,
        shapes.other_bytes + sum(problem.meter.disk_bytes(n, 16) for n in shapes.matrices),
    )
    top = _solved(problem, high)
    if top is None or top[unit] <= now[unit]:
        return None, None
    bits = top[unit]
    while high - low > 1:
        middle = (low + high) // 2
        solved = _solved(problem, middle)
        if solved is not None and solved[unit] > now[unit]:
            high, bits = middle, solved[unit]
        else:
            low = middle
    return high, bits


def _solved(problem: Problem, disk_bytes: int) -> dict[str, int] | None:
    """Bits of the free units at a size on disk; None where it cannot be met."""
    available = disk_bytes - problem.shapes.other_bytes
    available -= sum(problem.meter.disk_bytes(name, bits) for name, (bits, _) in problem.fixed.items())
    choices = problem.choices_within(np.array([available], dtype=np.int64))
    if choices is None:
        return None
    return {unit: problem.request.menu[choice] for unit, choice in zip(problem.free, choices, strict=True)}


def _bits_of(plan: Plan, problem: Problem, unit: str) -> int:
    free = [plan.matrices[name].bits for name in problem.units[unit] if name not in problem.fixed]
    return free[0]


def _problem(plan: Plan, scores: Scores | None) -> Problem:
    """The request that a plan answers, with a budget in bytes. Without scores their order is the plan's own."""
    settings = plan.allocation.settings
    granularity: Granularity = plan.allocation.granularity
    request = Request(
        budget=f"{plan.budget.disk_bytes}B",
        allocation=plan.allocation.name,
        edges=settings.get("edges", 0),
        edge_bits=settings.get("edge_bits", 16),
        pins=tuple(settings.get("pins", ())),
        symmetric={int(bits): value for bits, value in settings.get("symmetric", {}).items()},
        granularity=granularity,
        menu=tuple(settings.get("menu", plan.menu)),
        head=settings.get("head", False),
        uniform_fused=settings.get("uniform_fused", False),
    )
    if scores is None and plan.scorer is not None and plan.allocation.name != "uniform":
        fused = request.uniform_fused and granularity == "module"
        ranked = {
            unit: rank
            for unit, names in units_of(plan.matrices, "fused" if fused else granularity).items()
            if (rank := plan.matrices[names[0]].rank) is not None
        }
        scores = Scores(
            model=plan.base_model,
            task=plan.task,
            scorer=plan.scorer,
            granularity="fused" if fused else granularity,
            units=tuple(UnitScore(unit=unit, score=-rank) for unit, rank in ranked.items()),
            seconds=0,
            peak_memory_bytes=0,
        )
    return Problem(Shapes.of_plan(plan), scores, request)


def _check_same(plan: Plan, scores: Scores) -> None:
    if plan.scorer is None:
        raise ValueError("the plan was made without scores; leave out --scores")
    if scores.model.fingerprint != plan.base_model.fingerprint:
        raise ValueError(f"the scores are of {scores.model.id}, the plan is for {plan.base_model.id}: give its own")
    scored_by = plan.allocation.settings.get("scored_by", scores.granularity)
    if scored_by != scores.granularity:
        raise ValueError(
            f"the scores are by {scores.granularity}, the plan was made from some by {scored_by}: give the file it was "
            "made from"
        )
    if (scores.scorer, scores.task) != (plan.scorer, plan.task):
        names = [f"{each.scorer.name} on {each.task.name if each.task else 'no task'}" for each in (scores, plan)]
        raise ValueError(
            f"the scores are {names[0]}, the plan was made from {names[1]}: give the file it was made from"
        )
