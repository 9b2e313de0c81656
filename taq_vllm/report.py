"""Pictures and tables of what was found: layer relevance per task with the plans below, and results with intervals.

The figure is the counterpart of Figure 1 of arXiv 2511.06516 for the model at hand, with the oracle's measurements and
standard errors added. The table marks a winner only where the paired interval against every other contender of the
same size excludes zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from scipy.stats import kendalltau

from taq_vllm.evaluate import Result, compare
from taq_vllm.plan import Plan
from taq_vllm.scores import Scores
from taq_vllm.units import layer_of

_BIT_COLOURS = {4: "#d9e6f2", 8: "#7aa6c9", 16: "#1f4e79"}


@dataclass(frozen=True)
class TaskPanel:
    """What the figure shows of one task."""

    task: str
    taq: Scores
    taqo: Scores
    kl: Scores
    """Of single matrices."""
    plans: Mapping[str, Plan]
    """By label, shown as strips of bits per layer."""


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau between two scorers' layer scores."""

    tau: float
    p_value: float


def agreement(one: Scores, other: Scores) -> Agreement:
    """How alike two scorers order the layers.

    Args:
        one: scores of any scorer.
        other: scores of the same model by another; its drops' ties are broken by its tiebreak.
    """
    places = [{unit: place for place, unit in enumerate(s.ranking)} for s in (one, other)]
    result = kendalltau([places[0][unit] for unit in places[0]], [places[1][unit] for unit in places[0]])
    return Agreement(float(result.statistic), float(result.pvalue))


def relevance_figure(panels: Sequence[TaskPanel], title: str, path: Path) -> None:
    """Draw layer relevance per task: information, stability, combined, the oracle, KL by matrix, the plans as strips.

    Args:
        panels: one column each.
        title: names the model, its variant included.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    strips = list(panels[0].plans)
    heights = [1, 1, 1, 1, 1, 1, 0.22 * len(strips)]
    figure, grid = pyplot.subplots(
        len(heights),
        len(panels),
        figsize=(4.2 * len(panels), 12.5),
        sharex="col",
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    kinds = list(dict.fromkeys(s.unit.rpartition(".")[2] for s in panels[0].kl.units))
    colours = pyplot.colormaps["viridis"]([place / len(kinds) for place in range(len(kinds))])
    for column, panel in enumerate(panels):
        layers = [layer_of(s.unit) for s in panel.taq.units]
        information, stability, combined, drop, nll, divergence, strip = grid[:, column]
        information.set_title(panel.task)
        for axes, name, colour in ((information, "information", "#2a7f62"), (stability, "stability", "#b5651d")):
            values = [s.details[name] for s in panel.taq.units]
            errors = [s.details[f"{name}_stderr"] for s in panel.taq.units]
            axes.errorbar(layers, values, errors, fmt="o-", ms=3, lw=1, capsize=2, color=colour)
        combined.errorbar(
            layers,
            [s.score for s in panel.taq.units],
            [s.stderr for s in panel.taq.units],
            fmt="o-",
            ms=3,
            lw=1,
            capsize=2,
            color="#1f4e79",
        )
        combined.axhline(0, color="0.7", lw=0.6)
        drop.bar(
            layers,
            [100 * s.score for s in panel.taqo.units],
            yerr=[100 * s.stderr for s in panel.taqo.units],
            color="#8c2d04",
            capsize=2,
            error_kw={"lw": 0.8},
        )
        drop.axhline(0, color="0.7", lw=0.6)
        nll.bar(
            layers,
            [s.details["nll_increase"] for s in panel.taqo.units],
            yerr=[s.details["nll_increase_stderr"] for s in panel.taqo.units],
            color="#d98c5f",
            capsize=2,
            error_kw={"lw": 0.8},
        )
        nll.axhline(0, color="0.7", lw=0.6)
        below = dict.fromkeys(layers, 0.0)
        for name, colour in zip(kinds, colours, strict=True):
            costs = [(layer_of(s.unit), s.score) for s in panel.kl.units if s.unit.rpartition(".")[2] == name]
            divergence.bar(
                [layer for layer, _ in costs],
                [cost for _, cost in costs],
                bottom=[below[layer] for layer, _ in costs],
                color=colour,
                label=name.removesuffix("_proj"),
            )
            below |= {layer: below[layer] + cost for layer, cost in costs}
        for row, label in enumerate(strips):
            for name, entry in panel.plans[label].matrices.items():
                # Matrices of one layer lie side by side in its cell, so that mixed layers show.
                names = [n for n in panel.plans[label].matrices if layer_of(n) == layer_of(name)]
                width = 1 / len(names)
                left = layer_of(name) - 0.5 + names.index(name) * width
                strip.barh(row, width, 0.8, left, color=_BIT_COLOURS[entry.bits], align="center")
        strip.set_yticks(range(len(strips)), strips)
        strip.set_ylim(len(strips) - 0.5, -0.5)
        strip.set_xticks(layers)
        strip.set_xlabel("layer")
    for axes, label in zip(
        grid[:, 0],
        (
            "information H\n(entropy, nats)",
            "stability S\n(signed variance)",
            "TAQ relevance R",
            "oracle: exact match\nlost (points)",
            "oracle: answer NLL\nadded (nats/token)",
            "KL of its matrices\n(nats/token, summed)",
            "bits",
        ),
        strict=True,
    ):
        axes.set_ylabel(label)
    grid[-2, -1].legend(ncols=2, fontsize="x-small", frameon=False)
    figure.legend(
        handles=[Patch(color=colour, label=f"{bits} bits") for bits, colour in _BIT_COLOURS.items()],
        loc="outside lower right",
        ncols=len(_BIT_COLOURS),
        frameon=False,
    )
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Row:
    """One line of the results table."""

    label: str
    result: Result
    contender: bool = False
    """Competes with the other contenders of its task, all of the same size."""


def winner(rows: Sequence[Row]) -> str | None:
    """The contender that beats every other with a paired interval that excludes zero, if there is one."""
    contenders = [row for row in rows if row.contender]
    for row in contenders:
        others = [other for other in contenders if other is not row]
        differences = [compare(row.result, other.result) for other in others]
        if differences and all(d.significant and d.mean > 0 for d in differences):
            return row.label
    return None


def results_table(title: str, rows: Sequence[Row], reference: Result) -> Table:
    """Results of one task, every line compared with full precision on the same items.

    Args:
        title: the task, and what model it is.
        rows: in the order to show.
        reference: full precision.
    """
    table = Table(title=title)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "plan" else "right")
    best = winner(rows)
    for cells, row in zip(_cells(rows, reference), rows, strict=True):
        table.add_row(*cells, style="bold green" if row.label == best else None)
    return table


def results_markdown(rows: Sequence[Row], reference: Result) -> str:
    """The same table as Markdown; the winner, if any, in bold."""
    best = winner(rows)
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    for cells, row in zip(_cells(rows, reference), rows, strict=True):
        shown = [f"**{cells[0]}**", *cells[1:]] if row.label == best else cells
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


_COLUMNS = ("plan", "metric [95%]", "difference to full [95%]", "answer NLL", "bits", "MB", "tokens/s")


def _cells(rows: Sequence[Row], reference: Result) -> list[list[str]]:
    cells = []
    for row in rows:
        result = row.result
        if result is reference:
            difference = "-"
        else:
            paired = compare(result, reference)
            difference = f"{100 * paired.mean:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
        cells.append(
            [
                row.label,
                f"{100 * result.mean:.1f} [{100 * result.low:.1f}, {100 * result.high:.1f}]",
                difference,
                f"{result.answer_nll:.4f}",
                "16" if result.average_bits is None else f"{result.average_bits:.2f}",
                f"{result.weight_bytes / 1e6:.2f}",
                f"{result.output_tokens_per_s:.0f}",
            ]
        )
    return cells
