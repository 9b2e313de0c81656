"""`taq plan`: spend a budget. Beside it `taq plan curve`, `taq plan diff` and `taq plan explain`."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from typer.core import TyperGroup

from taq_vllm.allocate import allocate, completed
from taq_vllm.cli.options import (
    BUDGET_HELP,
    DEFAULT_MENU,
    AllocationOption,
    Asymmetric,
    DeviceTable,
    EdgeBits,
    Edges,
    FixedMs,
    Force,
    ForDevice,
    Json,
    Menu,
    Model,
    Pin,
    PlanGranularity,
    PlanHead,
    Symmetric,
    Threads,
    UniformFused,
    latencies_of,
    out,
    print_json,
    print_plan,
    request_of,
    sizes,
)
from taq_vllm.curve import POINTS
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan
from taq_vllm.scores import Scores

if TYPE_CHECKING:
    from taq_vllm.explain import Explanation

_MAKE = "make"


class _MakesByDefault(TyperGroup):
    """`taq plan MODEL ...` is `taq plan make MODEL ...`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Put the default command in front, unless one is named or help is wanted."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_MAKE, *args]
        return super().parse_args(ctx, args)


plan_app = typer.Typer(
    cls=_MakesByDefault,
    no_args_is_help=True,
    help="Spend a budget: bits for every weight matrix. `taq plan MODEL ...` is short for `taq plan make MODEL ...`.",
)

ScoresFile = Annotated[Path | None, typer.Option("--scores", help="Scores file made by `taq score`.")]
Baseline = Annotated[
    str | None, typer.Option(help="Instead of scores, a scorer that reads no examples: weight-error, random, edges ...")
]
Seed = Annotated[int | None, typer.Option(help="Of the random baseline.")]


@plan_app.command(name=_MAKE)
def plan(
    model: Model,
    budget: Annotated[list[str], typer.Option(help=f"{BUDGET_HELP} Repeat it for several plans.")],
    scores: ScoresFile = None,
    baseline: Baseline = None,
    seed: Seed = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The plan file; of several, plan-5.0bits.json and so on.")
    ] = Path("plan.json"),
    allocation: AllocationOption = None,
    granularity: PlanGranularity = None,
    menu: Menu = DEFAULT_MENU,
    head: PlanHead = False,
    uniform_fused: UniformFused = False,
    edges: Edges = 0,
    edge_bits: EdgeBits = 16,
    pin: Pin = None,
    symmetric: Symmetric = None,
    asymmetric: Asymmetric = None,
    device_table: DeviceTable = None,
    for_device: ForDevice = None,
    threads: Threads = None,
    fixed_ms: FixedMs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes and average bits; write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Spend a budget: bits for every weight matrix."""
    files = ModelFiles(model)
    latencies = latencies_of(budget, device_table, for_device, threads, fixed_ms)
    request = request_of(
        budget=budget[0],
        allocation=allocation,
        edges=edges,
        edge_bits=edge_bits,
        pin=pin,
        granularity=granularity,
        menu=menu,
        head=head,
        uniform_fused=uniform_fused,
        symmetric=symmetric,
        asymmetric=asymmetric,
        latencies=latencies,
    )
    made = _scores(files, scores, baseline, seed, granularity, head)
    plans = {
        _output(output, each, len(budget)): allocate(files, made, replace(request, budget=each)) for each in budget
    }
    if len(plans) < len(budget):
        raise typer.BadParameter(f"got a budget twice in {', '.join(budget)}")
    fresh = {path: not _holds(path, result) for path, result in plans.items()}
    blocked = [path for path in plans if fresh[path] and path.exists() and not force and not dry_run]
    if blocked:
        raise ValueError(f"{blocked[0]} is another plan: choose another output, or replace it with --force")
    records = []
    for path, result in plans.items():
        if not dry_run and fresh[path]:
            result.save(path)
        records.append({"plan_sha256": result.sha256(), "done_before": not fresh[path], **sizes(result)})
        if not as_json:
            print_plan(result, files)
            if not dry_run:
                out.print(f"{path} {'written' if fresh[path] else 'was this plan already'}")
    if as_json:
        outputs = [{"output": str(path), **record} for path, record in zip(plans, records, strict=True)]
        print_json(records[0] if len(records) == 1 else {"plans": outputs})


def _scores(
    files: ModelFiles, scores: Path | None, baseline: str | None, seed: int | None, granularity: str | None, head: bool
) -> Scores | None:
    """Of a file, or of a scorer that reads no examples."""
    if scores and baseline:
        raise typer.BadParameter("give --scores or --baseline, not both")
    if seed is not None and not baseline:
        raise typer.BadParameter("--seed is for --baseline random")
    if not baseline:
        return Scores.load(scores) if scores else None
    from taq_vllm.scoring import baseline as run

    return run(files, baseline, {} if seed is None else {"seed": seed}, granularity, head)


def _output(output: Path, budget: str, count: int) -> Path:
    """The plan's file; of several plans each has its budget in the name."""
    if count == 1:
        return output
    words = re.sub(r"[^A-Za-z0-9.]+", "-", budget.strip())
    return output.with_name(f"{output.stem}-{words}{output.suffix}")


def _holds(path: Path, plan: Plan) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == plan.to_json()


@plan_app.command()
def curve(
    model: Model,
    scores: ScoresFile = None,
    baseline: Baseline = None,
    seed: Seed = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="A CSV file, a line per plan.")] = Path("curve.csv"),
    picture: Annotated[Path | None, typer.Option("--plot", help="A picture of it: .png, .svg or .pdf.")] = None,
    between: Annotated[
        int, typer.Option("--points", min=0, help="Evenly spaced sizes to solve for beside the corners; 0 for none.")
    ] = POINTS,
    granularity: PlanGranularity = None,
    menu: Menu = DEFAULT_MENU,
    head: PlanHead = False,
    uniform_fused: UniformFused = False,
    edges: Edges = 0,
    edge_bits: EdgeBits = 16,
    pin: Pin = None,
    symmetric: Symmetric = None,
    asymmetric: Asymmetric = None,
    as_json: Json = False,
) -> None:
    """All budgets at once: size against cost of the best plans (`--allocation knapsack`), as CSV and as a picture.

    Its points are all corners of the convex trade-off, and the best plans of sizes between them; column `corner` tells.
    """
    from taq_vllm.curve import plot, trade_off, write_csv

    if picture and picture.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"got --plot {str(picture)!r}; its name must end in .png, .svg or .pdf")
    files = ModelFiles(model)
    made = _scores(files, scores, baseline, seed, granularity, head)
    if made is None:
        raise ValueError("a curve needs scores: give --scores FILE or --baseline NAME")
    request = request_of(
        budget="16bits",
        allocation="knapsack",
        edges=edges,
        edge_bits=edge_bits,
        pin=pin,
        granularity=granularity,
        menu=menu,
        head=head,
        uniform_fused=uniform_fused,
        symmetric=symmetric,
        asymmetric=asymmetric,
    )
    points = trade_off(files, made, request, between)
    write_csv(points, output)
    if picture:
        task = f" on {made.task.name}" if made.task else ""
        title = f"{files.id}: {made.scorer.name}{task}, by {completed(request, made).granularity}"
        plot(points, made.cost_unit or "by rank", title, picture)
    if as_json:
        corners = sum(point.corner for point in points)
        print_json({"output": str(output), "plot": picture and str(picture), "points": len(points), "corners": corners})
        return
    first, last = points[0], points[-1]
    out.print(
        f"{output}: {len(points)} plans ({sum(point.corner for point in points)} corners) from "
        f"{first.average_bits:.3f} bits ({first.disk_bytes / 1e6:.2f} MB, cost "
        f"{first.cost:.4g}) to {last.average_bits:.3f} bits ({last.disk_bytes / 1e6:.2f} MB, cost {last.cost:.4g}); "
        f"costs are {made.cost_unit or 'losses by rank'}"
    )
    if picture:
        out.print(f"{picture} shows it")


@plan_app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A plan.")],
    second: Annotated[Path, typer.Argument(help="Another plan of the same model.")],
    as_json: Json = False,
) -> None:
    """What two plans differ in: matrices, bits, symmetry, bytes."""
    from taq_vllm.explain import diff as differences_of

    plans = Plan.load(first), Plan.load(second)
    differences = differences_of(*plans)
    if as_json:
        records = [
            {"matrix": d.name, "bits": d.bits, "symmetric": d.symmetric, "disk_bytes": d.disk_bytes}
            for d in differences
        ]
        print_json({"first": sizes(plans[0]), "second": sizes(plans[1]), "matrices": records})
        return
    if differences:
        table = Table(title=f"{first} and {second}")
        for column in ("matrix", "bits", "", "bytes", "", "difference"):
            table.add_column(column, justify="left" if column == "matrix" else "right")
        for entry in differences:
            bits = [_kind(*each) for each in zip(entry.bits, entry.symmetric, strict=True)]
            counts = ["" if size is None else f"{size:,}" for size in entry.disk_bytes]
            known = None not in entry.disk_bytes
            change = f"{entry.disk_bytes[1] - entry.disk_bytes[0]:+,}" if known else ""
            table.add_row(entry.name, *bits, *counts, change)
        out.print(table)
    grid = Table(title=f"{len(differences)} of {len(plans[0].matrices)} matrices differ")
    for column in ("", str(first), str(second)):
        grid.add_column(column, justify="left" if not column else "right")
    for label, values in _facts(plans):
        grid.add_row(label, *values)
    out.print(grid)


def _kind(bits: int | None, symmetric: bool | None) -> str:
    if bits is None:
        return "16 (not planned)"
    return str(bits) if bits == 16 else f"{bits} {'symmetric' if symmetric else 'asymmetric'}"


def _facts(plans: tuple[Plan, Plan]) -> list[tuple[str, tuple[str, ...]]]:
    """What to set side by side of two plans."""

    def of(plan: Plan) -> dict[str, str]:
        budget, scorer = plan.budget, plan.scorer
        task = f" on {plan.task.name}" if plan.task else ""
        facts = {
            "budget asked": budget.asked,
            "bits per planned weight": f"{budget.average_bits:.3f}",
            "bytes on disk": f"{budget.disk_bytes:,}",
            "bytes in memory": f"{budget.resident_bytes:,}",
            "scorer": f"{scorer.name}{task}" if scorer else "none",
            "scorer's settings": json.dumps(scorer.settings) if scorer else "",
            "allocation": f"{plan.allocation.name} by {plan.allocation.granularity}",
            "menu": ", ".join(map(str, plan.menu)),
        }
        return facts | {f"matrices at {bits} bits": str(count) for bits, count in plan.counts().items()}

    first, second = map(of, plans)
    return [(label, (first.get(label, "0"), second.get(label, "0"))) for label in {**first, **second}]


@plan_app.command()
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.")],
    target: Annotated[str, typer.Argument(metavar="LAYER", help="3, layers.3, lm_head, or a matrix's name.")],
    scores: ScoresFile = None,
    as_json: Json = False,
) -> None:
    """Why a layer or matrix has its bits, and what a larger or smaller budget would change."""
    from taq_vllm.explain import explain as explained

    loaded = Plan.load(plan_file)
    explanations = explained(loaded, target, Scores.load(scores) if scores else None)
    if as_json:
        print_json({"units": [asdict(each) for each in explanations]})
        return
    for each in explanations:
        _print_explanation(loaded, each)
    _print_one_byte_less(loaded, explanations[0])


def _print_explanation(loaded: Plan, each: "Explanation") -> None:
    widths = ", ".join(dict.fromkeys(str(bits) for bits in each.matrices.values()))
    out.print(f"{each.unit}: {widths} bits ({'/'.join(each.why)}), {each.disk_bytes:,} bytes on disk")
    if len(set(each.matrices.values())) > 1:
        for name, bits in each.matrices.items():
            out.print(f"  {name}: {bits} bits ({loaded.matrices[name].why})")
    if each.score is not None:
        error = "" if each.stderr is None else f" +- {each.stderr:.2g}"
        rank = "" if each.rank is None else f", rank {each.rank + 1} of {each.units} (1 needs precision most)"
        out.print(f"  score {each.score:+.4g}{error}{rank}")
    for cost in each.costs:
        error = "" if cost.stderr is None else f" +- {cost.stderr:.2g}"
        measured = "not measured" if cost.measured is None else f"measured {cost.measured:+.3g}{error}"
        out.print(f"  at {cost.bits} bits: cost {cost.used:.3g} ({measured})")
    for label, move in (("up", each.up), ("down", each.down)):
        if move is not None:
            out.print(
                f"  {label} to {move.bits} bits: {move.disk_bytes:+,} bytes, cost {move.cost:+.4g}, "
                f"{move.per_byte:.3g} per byte ({each.cost_unit})"
            )
    if each.more_bits_at is not None:
        out.print(
            f"  gets {each.more_bits} bits with a budget of {each.more_bits_at}B, "
            f"{each.more_bits_at - loaded.budget.disk_bytes:,} bytes more than the plan takes"
        )
    elif not each.note and each.up is not None:
        out.print("  gets more bits with no budget that this allocation can use")


def _print_one_byte_less(loaded: Plan, each: "Explanation") -> None:
    if each.note:
        out.print(f"What other budgets would change is not known: {each.note}.")
    elif each.one_byte_less:
        changes = ", ".join(f"{unit} {now} to {then}" for unit, now, then in each.one_byte_less)
        out.print(f"With a byte less than the plan's {loaded.budget.disk_bytes:,}: {changes} bits.")
    else:
        out.print(f"There is no smaller plan than this one of {loaded.budget.disk_bytes:,} bytes.")
