"""`taq plan`: spend a budget. Beside it `taq plan curve`, `taq plan diff` and `taq plan explain`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from taq_vllm.allocate import allocate
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
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan
from taq_vllm.scores import Scores

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
    allocation: AllocationOption = "monotone",
    granularity: PlanGranularity = "layer",
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
        budget[0],
        allocation,
        edges,
        edge_bits,
        pin,
        granularity,
        menu,
        head,
        uniform_fused,
        symmetric,
        asymmetric,
        latencies,
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
    files: ModelFiles, scores: Path | None, baseline: str | None, seed: int | None, granularity: str, head: bool
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
