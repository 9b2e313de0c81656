"""Scores and a budget become a plan. Sizes are arithmetic on shapes, nothing is loaded (arXiv 2511.06516, eq. 2).

A *unit* (`units.py`: a transformer block, a fused layer or a matrix) gets bits from the menu. Allocations:
- `monotone`: precision never rises as the score falls. With three bitwidths that is two cut points in the ranking; all
  are tried. A unit of rank r among n weighs n - r, and of that b bits lose 4^(lowest - b), since the error of rounding
  falls by 4 with every bit. So 8 bits are worth almost what 16 are, and 16 remain only where bytes are left.
- `knapsack`: the least sum of the scorer's costs per bitwidth (`knapsack.py`: exact, or the gap is told); where the
  scorer has none, the losses of `monotone` without its order.
- `paper`: the paper's shares: of the units that are free, the first 15% by rank at 16 bits, the next 45% at 8.
- `uniform`: the same bits everywhere, the least loss that the budget allows.
In every one, pins win over edges and edges over scores. A budget is never exceeded.

Scores may be of another granularity than the plan. Of finer ones costs are added, and scores too where the scorer has
costs (they are additive), else averaged by weights; of coarser ones costs are shared out by weights, scores copied.
Costs enter as measured, also where they cannot be told from zero: they are expectations. A negative cost is 0, fewer
bits never cost less than more, 16 cost nothing, and a bitwidth that was not measured follows from the nearest that was
by the factor of 4 per bit.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taq_vllm import knapsack
from taq_vllm.budget import Latencies, Limit, Meter, Shapes, parse_budget
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import (
    BITS_MENU,
    GROUP_SIZE,
    STUDY_BITS,
    SYMMETRIC,
    Allocation,
    Budget,
    MatrixPlan,
    ModelRef,
    Plan,
)
from taq_vllm.scores import Scores, UnitScore, defaults_for, ranking
from taq_vllm.units import GRANULARITIES, HEAD, Granularity, experts_of, layer_of, unit_of, units_of

ALLOCATIONS = ("monotone", "knapsack", "paper", "uniform")

PAPER_MENU = (4, 8, 16)
PAPER_SHARE_16, PAPER_SHARE_8 = 0.15, 0.45
MOST_LEVELS = 4
"""Bitwidths that `monotone` tries all cut points of."""


@dataclass(frozen=True)
class Request:
    """What the user asks of a plan."""

    budget: str
    """`5.0bits`, `4.2GiB`, `9ms@batch=16`, or several with commas (`budget.py`)."""
    allocation: str | None = None
    """None: the exact knapsack where the scorer measures costs, `monotone` where it only ranks."""
    edges: int = 0
    """Layers protected at each end of the model."""
    edge_bits: int = 16
    pins: tuple[str, ...] = ()
    """`layers.0=16`, `layers.3.self_attn.q_proj=8`, `re:.*down_proj=8`; the last that matches wins. One that matches
    the head plans it."""
    symmetric: Mapping[int, bool] = field(default_factory=lambda: dict(SYMMETRIC))
    granularity: Granularity | None = None
    """What gets bits of its own; None: what was scored."""
    menu: tuple[int, ...] = BITS_MENU
    """Bitwidths to choose from."""
    head: bool = False
    """Plan `lm_head` as well."""
    uniform_fused: bool = False
    """Layers that are served as one matrix get one bitwidth, so that stock servers load the result."""
    latencies: Latencies | None = None
    """For budgets in ms."""


def allocate(files: ModelFiles, scores: Scores | None, request: Request) -> Plan:
    """Make a plan within the budget.

    Args:
        files: the model's shapes.
        scores: who needs precision; None for `uniform`.
        request: budget, allocation, menu, granularity, edges and pins.

    Raises:
        ValueError: scores of another model or that lack a unit, an unknown allocation or pin, or a budget that cannot
            be met; the message names the smallest that can.
    """
    files.check_plannable()
    request = completed(request, scores)
    if scores is None and request.allocation != "uniform":
        raise ValueError(f"allocation {request.allocation!r} needs scores: give --scores FILE or --baseline NAME")
    if scores is not None and scores.model.fingerprint != files.ref.fingerprint:
        raise ValueError(
            f"the scores were made for {scores.model.id}, not for {files.id}: run `taq score` on {files.id}"
        )
    return Problem(Shapes.of_files(files, plans_head(files, request)), scores, request).plan(files.ref)


def check_budget(files: ModelFiles, request: Request) -> None:
    """Refuse a budget that cannot be met, before scores are made: what is smallest does not depend on them.

    Raises:
        ValueError: as `allocate`.
    """
    files.check_plannable()
    request = completed(request, None)
    Problem(Shapes.of_files(files, plans_head(files, request)), None, request).choose()


def completed(request: Request, scores: Scores | None) -> Request:
    """A request with the allocation and granularity that follow from the scores, where none are asked for.

    Raises:
        ValueError: a request that no model can answer.
    """
    request = replace(
        request,
        allocation=request.allocation or (defaults_for(scores.cost_unit)[0] if scores else "knapsack"),
        granularity=request.granularity or (scores.granularity if scores else "layer"),
    )
    if request.allocation not in ALLOCATIONS:
        raise ValueError(f"got allocation {request.allocation!r}; there are {', '.join(ALLOCATIONS)}")
    if request.granularity not in GRANULARITIES:
        raise ValueError(f"got granularity {request.granularity!r}; there are {', '.join(GRANULARITIES)}")
    menu = request.menu
    if not menu or list(menu) != sorted(set(menu) & set(STUDY_BITS)):
        raise ValueError(f"got menu {_list(menu)}; allowed are ascending bitwidths among {_list(STUDY_BITS)}")
    if request.allocation == "paper" and not set(PAPER_MENU) <= set(menu):
        raise ValueError(f"allocation 'paper' gives {_list(PAPER_MENU)} bits, got menu {_list(menu)}")
    if request.allocation == "monotone" and len(menu) > MOST_LEVELS:
        raise ValueError(
            f"allocation 'monotone' tries all cut points of at most {MOST_LEVELS} bitwidths, got menu {_list(menu)}; "
            "take fewer, or --allocation knapsack"
        )
    if request.edge_bits not in _pinnable(request):
        raise ValueError(f"got edge bits {request.edge_bits}, allowed are {_list(_pinnable(request))}")
    return request


def plans_head(files: ModelFiles, request: Request) -> bool:
    """Whether the head is planned: asked for, or pinned by name."""
    return request.head or any(_matching(pin, files.head, STUDY_BITS)[0] for pin in request.pins)


def decided_head(files: ModelFiles, request: Request) -> bool:
    """Whether the head has its bits without scores: pinned, or of a shape that stays at 16."""
    return HEAD in _fixed(Shapes.of_files(files, plans_head(files, request)), request)


class Problem:
    """A request for a model of certain shapes: what is decided already, what is free, and what every choice uses.

    Attributes:
        shapes: of the model.
        request: what is asked, completed.
        symmetric: by bitwidth.
        meter: of the budget.
        units: the matrices of every unit that is planned, by the unit's name.
        fixed: (bits, why) of every matrix that is decided without scores.
        scored: what the scores say of each unit; empty without scores.
        ranking: the units that have scores, the one that needs precision most first; all units without scores.
        free: units that are decided by scores, in rank order.
        costs: [free, menu] what each choice costs.
        uses: [free, menu, limits] what each choice uses of each limit.
        available: [limits] what all free units may use together.
    """

    def __init__(self, shapes: Shapes, scores: Scores | None, request: Request) -> None:
        """Raises ValueError for pins, edges or scores that do not fit the model."""
        assert None not in (request.allocation, request.granularity), "a request that is completed"
        self.shapes, self.request, self._scores = shapes, request, scores
        self.symmetric = SYMMETRIC | dict(request.symmetric)
        self.meter = Meter(shapes, parse_budget(request.budget), self.symmetric, request.latencies)
        fused = request.uniform_fused and request.granularity == "module"
        self.units = units_of(shapes.matrices, "fused" if fused else request.granularity)
        self.fixed = _fixed(shapes, request)
        self._undecided = {
            unit: parts
            for unit, names in self.units.items()
            if (parts := tuple(name for name in names if name not in self.fixed))
        }
        self.scored = _scored(self, scores) if scores else {}
        self.ranking = ranking(self.scored.values()) if scores else list(self.units)
        self.free = [unit for unit in self.ranking if unit in self._undecided]
        self.costs = self._costs()
        self.uses = self._uses(self.meter)
        decided = [
            sum(self.meter.use(name, bits, limit) for name, (bits, _) in self.fixed.items())
            for limit in self.meter.limits
        ]
        self.available = np.array([a - d for a, d in zip(self.meter.available, decided, strict=True)], dtype=np.int64)

    def choose(self) -> tuple[NDArray[np.int64], float]:
        """The place in the menu of each free unit's bits, and how much less another answer could cost at most.

        Raises:
            ValueError: the budget cannot be met, or is above the full-precision model.
        """
        for place, limit in enumerate(self.meter.limits):
            self._check_met(place, limit)
        self._check_not_all_slack()
        choices, gap = self._best(self.uses, self.available)
        if choices is None:
            raise ValueError(
                f"budget {self.request.budget}: each of its limits can be met, but not all of them by one plan; ask "
                "for more of one of them"
            )
        return choices, gap

    def choices_within(self, available: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """As `choose`, for a size instead of the budget: [1] bytes on disk of what is free; None if it is too small."""
        size = np.array([[self.unit_bytes(unit, bits) for bits in self.request.menu] for unit in self.free])
        return self._best(size.reshape(len(self.free), len(self.request.menu), 1), available)[0]

    def _best(self, uses: NDArray[np.int64], available: NDArray[np.int64]) -> tuple[NDArray[np.int64] | None, float]:
        if self.request.allocation != "knapsack":
            return self._in_rank_order(self.costs, uses, available), 0.0
        solution = knapsack.solve(self.costs, uses, available)
        return (None, 0.0) if solution is None else (solution.choices, solution.gap)

    def plan(self, model: ModelRef) -> Plan:
        """The plan within the budget.

        Raises:
            ValueError: as `choose`.
        """
        choices, gap = self.choose()
        request, scores = self.request, self._scores
        matrices = self.matrices(choices)
        settings: dict[str, Any] = {
            "edges": request.edges,
            "edge_bits": request.edge_bits,
            "pins": list(request.pins),
            "menu": list(request.menu),
            "head": HEAD in self.shapes.matrices,
            "uniform_fused": request.uniform_fused,
            "symmetric": {str(bits): self.symmetric[bits] for bits in request.menu if bits < 16},
        }
        if request.latencies and any(limit.unit == "ms" for limit in self.meter.limits):
            measured = request.latencies
            settings |= {"device": measured.device, "threads": measured.threads, "fixed_ms": measured.fixed_ms}
        if scores:
            settings["scored_by"] = scores.granularity
        if request.allocation == "knapsack":
            settings["cost_unit"] = scores.cost_unit if scores else None
        if gap:
            settings["optimality_gap"] = gap
        return Plan(
            base_model=model,
            task=scores.task if scores else None,
            scorer=scores.scorer if scores else None,
            allocation=Allocation(name=request.allocation, granularity=request.granularity, settings=settings),
            budget=Budget.of(
                ",".join(limit.text for limit in self.meter.limits),
                matrices,
                self.shapes.other_bytes,
                self.meter.latency_us(matrices),
            ),
            menu=tuple(sorted({*request.menu, *(matrix.bits for matrix in matrices.values())})),
            matrices=matrices,
        )

    def matrices(self, choices: NDArray[np.int64]) -> dict[str, MatrixPlan]:
        """What every matrix gets if each free unit gets this place in the menu."""
        bits = {unit: self.request.menu[choice] for unit, choice in zip(self.free, choices, strict=True)}
        uniform = self.request.allocation == "uniform"
        ranks = {unit: rank for rank, unit in enumerate(self.ranking)} if self.scored and not uniform else {}
        by_scores = "uniform" if uniform else "score" if self._scores and self._scores.task else "baseline"
        matrices = {}
        for unit, names in self.units.items():
            for name in names:
                chosen, why = self.fixed.get(name) or (bits[unit], by_scores)
                matrices[name] = MatrixPlan(
                    bits=chosen,
                    symmetric=self.symmetric[chosen],
                    shape=self.shapes.matrices[name],
                    why=why,
                    tied=self.shapes.is_tied_head(name),
                    score=self.scored[unit].score if unit in self.scored else None,
                    rank=ranks.get(unit),
                )
        return {name: matrices[name] for name in self.shapes.matrices}

    def unit_bytes(self, unit: str, bits: int) -> int:
        """Bytes on disk of the matrices of a unit that are free."""
        return sum(self.meter.disk_bytes(name, bits) for name in self._undecided.get(unit, ()))

    def _uses(self, meter: Meter) -> NDArray[np.int64]:
        menu = self.request.menu
        uses = [
            [[sum(meter.use(n, bits, limit) for n in self._undecided[unit]) for limit in meter.limits] for bits in menu]
            for unit in self.free
        ]
        return np.array(uses, dtype=np.int64).reshape(len(self.free), len(menu), len(meter.limits))

    def _costs(self) -> NDArray[np.float64]:
        """[free, menu] from the scorer's own costs where they are wanted and there are any, else by rank."""
        menu = self.request.menu
        if self.request.allocation == "knapsack" and self._scores and self._scores.cost_unit:
            return np.array([[self.scored[unit].costs[bits] for bits in menu] for unit in self.free]).reshape(
                -1, len(menu)
            )
        weights = np.arange(len(self.free), 0, -1.0)
        return weights[:, None] * np.array([4.0 ** (menu[0] - bits) for bits in menu])

    def _check_met(self, place: int, limit: Limit) -> None:
        uses = self.uses[:, :, place].astype(float)
        least = self._extreme(uses)
        if self.uses[np.arange(len(least)), least, place].sum() > self.available[place]:
            if limit.unit == "bits":
                least = self._least_average(least)
            raise ValueError(
                f"budget {limit.text} is below the smallest that {self.request.allocation!r} can meet here: "
                f"{self._describe(limit, least)}. Ask for more, pin or protect less, or allow fewer bits with --menu."
            )

    def _check_not_all_slack(self) -> None:
        """Where every limit is above the full-precision model, there is nothing to decide."""
        limits = self.meter.limits
        slack = [
            limit.unit != "ms" and available > sum(self.meter.use(name, 16, limit) for name in self.shapes.matrices)
            for limit, available in zip(limits, self.meter.available, strict=True)
        ]
        if all(slack):
            largest = self._extreme(-self.uses[:, :, 0].astype(float))
            raise ValueError(
                f"budget {self.request.budget} is above the full-precision model: the largest plan is "
                f"{self._describe(limits[0], largest)}. Ask for less, or serve the model as it is."
            )

    def _least_average(self, choices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The least bits per weight; whether a tied head counts depends on its own bits, hence the repetition."""
        average = self._average(choices)
        while True:
            limit = Limit("", average, "bits")
            uses = self._uses(Meter(self.shapes, (limit,), self.symmetric, None))
            better = self._extreme(uses[:, :, 0].astype(float))
            if self._average(better) >= average:
                return choices
            choices, average = better, self._average(better)

    def _average(self, choices: NDArray[np.int64]) -> Fraction:
        planned, weights = _sizes(self.matrices(choices))
        return Fraction(8 * planned, max(1, weights))

    def _describe(self, limit: Limit, choices: NDArray[np.int64]) -> str:
        matrices = self.matrices(choices)
        used = sum(self.meter.use(name, matrix.bits, limit) for name, matrix in matrices.items())
        return self.meter.describe(limit, used, *_sizes(matrices))

    def _extreme(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """The choices with the least sum of values that the allocation can make, whatever the limits."""
        if self.request.allocation == "knapsack":
            return values.argmin(axis=1)
        choices = self._in_rank_order(values, self.uses[:, :, :0], self.available[:0])
        assert choices is not None, "without limits there is a choice"
        return choices

    def _in_rank_order(
        self, costs: NDArray[np.float64], uses: NDArray[np.int64], available: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """The cheapest choices of those that the allocation can make; None if all exceed a limit."""
        count, levels = costs.shape
        if self.request.allocation == "monotone":
            return _monotone(costs, uses, available)
        if self.request.allocation == "paper":
            at_16, at_8 = round(PAPER_SHARE_16 * count), round(PAPER_SHARE_8 * count)
            bits = [16] * at_16 + [8] * at_8 + [4] * (count - at_16 - at_8)
            candidates = [np.array([self.request.menu.index(each) for each in bits], dtype=np.int64)]
        else:
            candidates = [np.full(count, level, dtype=np.int64) for level in range(levels)]
        rows = np.arange(count)
        fitting = [each for each in candidates if (uses[rows, each].sum(axis=0) <= available).all()]
        return min(fitting, key=lambda each: costs[rows, each].sum(), default=None)


def _monotone(
    costs: NDArray[np.float64], uses: NDArray[np.int64], available: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """All cut points of a ranking, the best within the limits; None if there is none.

    Units before the first cut get the last choice, those between first and second the one before it, and so on. With
    prefix sums a total is a constant plus one term for each cut, so two cuts at a time are a sum of two vectors.
    """
    count, levels = costs.shape
    columns = list(range(levels - 1, -1, -1)) + [0] * max(0, 3 - levels)

    def terms(values: NDArray) -> tuple[list[NDArray], NDArray]:
        sums = np.concatenate([np.zeros((1, *values.shape[1:]), values.dtype), values.cumsum(axis=0)])
        above = [sums[:, column] for column in columns]
        return [high - low for high, low in itertools.pairwise(above)], above[-1][-1]

    cost_terms, cost_constant = terms(costs)
    use_terms, use_constant = terms(uses)
    best, least = None, np.inf
    firsts = [()] if len(columns) == 3 else [(cut,) for cut in range(count + 1)]
    for first in firsts:
        start = first[0] if first else 0
        cost = cost_constant + sum(term[cut] for term, cut in zip(cost_terms, first, strict=False))
        total = cost + cost_terms[-2][start:, None] + cost_terms[-1][None, start:]
        fits = np.triu(np.ones(total.shape, bool))
        for limit in range(len(available)):
            used = use_constant[limit] + sum(term[cut, limit] for term, cut in zip(use_terms, first, strict=False))
            fits &= used + use_terms[-2][start:, None, limit] + use_terms[-1][None, start:, limit] <= available[limit]
        total = np.where(fits, total, np.inf)
        place = np.unravel_index(total.argmin(), total.shape)
        if total[place] < least:
            best, least = (*first, *(start + int(each) for each in place)), total[place]
    if best is None:
        return None
    choices = np.full(count, columns[-1], dtype=np.int64)
    for cut, column in reversed(list(zip(best, columns, strict=False))):
        choices[:cut] = column
    return choices


def _sizes(matrices: Mapping[str, MatrixPlan]) -> tuple[int, int]:
    """Bytes on disk and weights, without a tied head that is the embedding."""
    planned = sum(matrix.disk_bytes for matrix in matrices.values())
    return planned, sum(m.shape[0] * m.shape[1] for m in matrices.values() if not m.is_embedding)


def _fixed(shapes: Shapes, request: Request) -> dict[str, tuple[int, str]]:
    """(bits, why) of the matrices that pins, edges and their shape decide."""
    layers = 1 + max(layer_of(name) for name in shapes.matrices if name != HEAD)
    if not 0 <= 2 * request.edges <= layers:
        raise ValueError(f"got {request.edges} edge layers at each end of a model of {layers} layers")
    pinned = _pinned(shapes, request)
    # The experts of a block have one bitwidth: where one of them stays at 16 bits, all do.
    odd_experts = {experts_of(name) for name, (_, columns) in shapes.matrices.items() if columns % GROUP_SIZE}
    fixed: dict[str, tuple[int, str]] = {}
    for name, (_, columns) in shapes.matrices.items():
        if name in pinned:
            fixed[name] = pinned[name], "pinned"
        elif columns % GROUP_SIZE or (experts_of(name) and experts_of(name) in odd_experts):
            fixed[name] = 16, "shape"
        elif name != HEAD and min(layer_of(name), layers - 1 - layer_of(name)) < request.edges:
            fixed[name] = request.edge_bits, "edge"
    return fixed


def _pinnable(request: Request) -> tuple[int, ...]:
    """Plans that can be served stay so: bitwidths of studies are for menus that have some."""
    return BITS_MENU if set(request.menu) <= set(BITS_MENU) else STUDY_BITS


def _pinned(shapes: Shapes, request: Request) -> dict[str, int]:
    """Bits of every matrix that a pin matches."""
    pinned: dict[str, int] = {}
    for pin in request.pins:
        names, bits = _matching(pin, shapes.matrices, _pinnable(request))
        if not names:
            example = next(iter(shapes.matrices))
            raise ValueError(f"pin {pin!r} matches no weight matrix of {shapes.model}; they are named like {example}")
        odd = [name for name in names if shapes.matrices[name][1] % GROUP_SIZE]
        if bits < 16 and odd:
            raise ValueError(
                f"pin {pin!r} asks for {bits} bits for {odd[0]} with {shapes.matrices[odd[0]][1]} in-features, "
                f"which {GROUP_SIZE} does not divide; leave it at 16"
            )
        pinned.update(dict.fromkeys(names, bits))
    for names in units_of(shapes.matrices, "fused").values():
        if not (request.uniform_fused or experts_of(names[0])):
            continue
        asked = {name: pinned[name] for name in names if name in pinned}
        if len(set(asked.values())) > 1:
            some = {bits: (name, bits) for name, bits in asked.items()}.values()
            way_out = "" if experts_of(names[0]) else ", or leave out --uniform-fused"
            raise ValueError(
                f"pins give {', '.join(f'{name} {bits} bits' for name, bits in some)}, which are one layer to a "
                f"server: pin them alike{way_out}"
            )
        if asked:
            pinned.update(dict.fromkeys(names, next(iter(asked.values()))))
    return pinned


def _matching(pin: str, matrices: Mapping[str, Any], allowed: Sequence[int]) -> tuple[list[str], int]:
    """The matrices that a pin names, and its bits."""
    target, separator, value = pin.rpartition("=")
    if not separator or not target or not value.isdecimal() or int(value) not in allowed:
        raise ValueError(
            f"got pin {pin!r}; write NAME=BITS with bits in {_list(allowed)}, "
            "as layers.0=16, layers.3.self_attn.q_proj=8, lm_head=8 or re:.*down_proj=8"
        )
    if not target.startswith("re:"):
        return [name for name in matrices if f".{target}." in f".{name}."], int(value)
    try:
        pattern = re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"got pin {pin!r}, whose pattern is not a regular expression: {error}") from error
    return [name for name in matrices if pattern.fullmatch(name)], int(value)


def _scored(problem: Problem, scores: Scores) -> dict[str, UnitScore]:
    """What the scores say of each unit of the plan, whatever granularity they are of."""
    entries = {entry.unit: entry for entry in scores.units}
    shapes = problem.shapes.matrices
    part_of = {name: unit_of(name, scores.granularity) for name in shapes}
    sizes: dict[str, int] = {}
    for name, part in part_of.items():
        sizes[part] = sizes.get(part, 0) + shapes[name][0] * shapes[name][1]
    scored = {}
    for unit, names in problem.units.items():
        undecided = [name for name in names if name not in problem.fixed]
        missing = sorted({part_of[name] for name in names} - set(entries))
        if missing and undecided:
            if missing == [HEAD]:
                scored = (
                    "taq cannot score it: choose another scorer and score with --head"
                    if scores.scorer.name == "taq"
                    else "run `taq score --head`"
                )
                raise ValueError(
                    f"the head is to be planned, and the scores say nothing of it: {scored}, or pin it with "
                    f"--pin {HEAD}=8"
                )
            raise ValueError(f"the scores do not name {missing[0]}: run `taq score` again")
        if missing:
            continue
        free: dict[str, float] = {}
        weights: dict[str, int] = {}
        for name in names:
            part, size = part_of[name], shapes[name][0] * shapes[name][1]
            weights[part] = weights.get(part, 0) + size
            if name in undecided:
                free[part] = free.get(part, 0.0) + size / sizes[part]
        scored[unit] = _merged(unit, [(entries[part], count) for part, count in weights.items()], scores)
        if scores.cost_unit is not None:
            parts = {part: _costs_of(entries[part], problem.request.menu) for part in free}
            costs = {bits: sum(free[part] * parts[part][bits] for part in free) for bits in problem.request.menu}
            scored[unit] = scored[unit].model_copy(update={"costs": costs})
    return scored


def _merged(unit: str, parts: Sequence[tuple[UnitScore, int]], scores: Scores) -> UnitScore:
    """One score from those of parts and their numbers of weights: the sum where scores add up, else the mean."""
    if len(parts) == 1:
        return parts[0][0].model_copy(update={"unit": unit})
    total = sum(count for _, count in parts)
    shares = [1.0 if scores.cost_unit else count / total for _, count in parts]
    known = all(entry.stderr is not None for entry, _ in parts)
    return UnitScore(
        unit=unit,
        score=sum(w * e.ranked[0] for w, (e, _) in zip(shares, parts, strict=True)),
        stderr=math.hypot(*(w * e.stderr for w, (e, _) in zip(shares, parts, strict=True))) if known else None,
        from_zero=any(entry.from_zero for entry, _ in parts),
        tiebreak=sum(w * entry.tiebreak for w, (entry, _) in zip(shares, parts, strict=True)),
    )


def _costs_of(entry: UnitScore, menu: Sequence[int]) -> dict[int, float]:
    """Costs at every bitwidth of the menu, never negative and never rising with the bits."""
    measured = {bits: cost for bits, cost in entry.costs.items() if bits < 16}
    if not measured:
        raise ValueError(f"the scores give {entry.unit} no costs, which knapsack needs: run `taq score` again")
    costs: dict[int, float] = {}
    least = 0.0
    for bits in sorted({*menu, *measured}, reverse=True):
        if bits < 16:
            nearest = min(measured, key=lambda other: (abs(other - bits), other))
            least = max(least, measured[nearest] * 4.0 ** (nearest - bits))
        costs[bits] = least
    return costs


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
