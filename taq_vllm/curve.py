"""What every budget buys: the trade-off between a model's size and the cost of the best plans of each size.

Two kinds of points, each of them the plan that `--allocation knapsack` makes of its size:
- *corners* of the convex trade-off (`knapsack.curve`), where one unit after the other gets more bits. All of them come
  from one sort of the units' steps, however many there are, and each is exactly optimal;
- plans between them (`knapsack.solve` at evenly spaced sizes), which lie on or above the line through the corners. They
  are exactly optimal too, unless the search ran out of time; then their gap is told.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from taq_vllm import knapsack
from taq_vllm.allocate import Problem, Request, completed, plans_head
from taq_vllm.budget import Shapes
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import write_atomically
from taq_vllm.scores import Scores
from taq_vllm.units import HEAD

POINTS = 20
"""Sizes that are solved for beside the corners, unless others are asked for."""


@dataclass(frozen=True)
class TradeOffPoint:
    """The best plan of one size.

    Attributes:
        disk_bytes: of all tensors.
        average_bits: over planned weights, scales counted.
        cost: the sum of costs.
        corner: of the convex trade-off; otherwise a plan between two of them.
        unit: of a corner, the one that got other bits than at the corner before; None at the first.
        bits: that it got.
        gap: how much less another plan of this size could cost at most; 0 where it is proven best.
    """

    disk_bytes: int
    average_bits: float
    cost: float
    corner: bool
    unit: str | None
    bits: int | None
    gap: float


def trade_off(files: ModelFiles, scores: Scores, request: Request, points: int = POINTS) -> list[TradeOffPoint]:
    """All budgets at once, from the smallest plan to the largest that still costs less.

    Args:
        files: the model's shapes.
        scores: costs per bitwidth, or a ranking.
        request: menu, granularity, edges and pins; its budget and allocation do not matter.
        points: evenly spaced sizes to solve for between the first corner and the last; 0 leaves the corners.

    Raises:
        ValueError: as `allocate`.
    """
    files.check_plannable()
    request = completed(replace(request, budget="16bits", allocation="knapsack"), scores)
    if scores.model.fingerprint != files.ref.fingerprint:
        raise ValueError(
            f"the scores were made for {scores.model.id}, not for {files.id}: run `taq score` on {files.id}"
        )
    shapes = Shapes.of_files(files, plans_head(files, request))
    problem = Problem(shapes, scores, request)
    menu = request.menu
    uses = np.array([[problem.unit_bytes(unit, bits) for bits in menu] for unit in problem.free], dtype=np.int64)
    uses = uses.reshape(len(problem.free), len(menu))
    decided = sum(problem.meter.disk_bytes(name, bits) for name, (bits, _) in problem.fixed.items())
    # A tied head at 16 bits is the embedding and does not count. By size it never leaves them, unless it is pinned.
    tied = shapes.tied and HEAD in shapes.matrices and problem.fixed.get(HEAD, (16, ""))[0] == 16
    weights = problem.meter.weights - (shapes.head[HEAD][0] * shapes.head[HEAD][1] if tied else 0)

    def point(use: int, cost: float, corner: bool, unit: int | None, choice: int | None, gap: float) -> TradeOffPoint:
        return TradeOffPoint(
            disk_bytes=decided + use + shapes.other_bytes,
            average_bits=8 * (decided + use) / max(1, weights),
            cost=cost,
            corner=corner,
            unit=None if unit is None else problem.free[unit],
            bits=None if choice is None else menu[choice],
            gap=gap,
        )

    corners = knapsack.curve(problem.costs, uses)
    found = {c.use: point(c.use, c.cost, True, c.unit, c.choice, 0.0) for c in corners}
    for limit in np.linspace(corners[0].use, corners[-1].use, points + 2)[1:-1].astype(np.int64) if points else ():
        solution = knapsack.solve(problem.costs, uses[:, :, None], np.array([limit]))
        assert solution is not None, "the first corner is smaller"
        use = int(uses[np.arange(len(uses)), solution.choices].sum())
        # A corner may be the best plan of a larger size too; it is what it was.
        found.setdefault(use, point(use, solution.cost, False, None, None, solution.gap))
    return [found[use] for use in sorted(found)]


def write_csv(points: Sequence[TradeOffPoint], path: Path) -> None:
    """A line per point: disk_bytes, average_bits, cost, corner (1 or 0), unit, bits, gap."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("disk_bytes", "average_bits", "cost", "corner", "unit", "bits", "gap"))
    for point in points:
        average, cost = f"{point.average_bits:.6f}", f"{point.cost:.10g}"
        changed = point.unit or "", point.bits or ""
        writer.writerow((point.disk_bytes, average, cost, int(point.corner), *changed, f"{point.gap:.3g}"))
    write_atomically(path, text.getvalue())


def plot(points: Sequence[TradeOffPoint], cost_unit: str, title: str, path: Path) -> None:
    """The curve as a picture: average bits against cost, in the format of the path's ending."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for corner, style, label in ((True, ".-", "corners"), (False, "x", "plans between them")):
        chosen = [point for point in points if point.corner is corner]
        bits, costs = [point.average_bits for point in chosen], [point.cost for point in chosen]
        axes.plot(bits, costs, style, markersize=4, linewidth=1, label=label)
    positive = [point.cost for point in points if point.cost > 1e-9 * points[0].cost]
    if positive and positive[-1] < positive[0] / 10:
        axes.set_yscale("log")
        axes.set_ylim(positive[-1] / 2, positive[0] * 2)
    axes.set_xlabel("average bits per planned weight, scales and zero points counted")
    axes.set_ylabel(f"sum of costs ({cost_unit})")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    finally:
        pyplot.close(figure)
