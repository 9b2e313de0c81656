"""`taq plan`: spend a budget."""

from pathlib import Path
from typing import Annotated

import typer

from taq_vllm.allocate import Request, allocate
from taq_vllm.cli.options import (
    AllocationOption,
    BudgetOption,
    EdgeBits,
    Edges,
    Force,
    Json,
    Model,
    Pin,
    out,
    print_json,
    print_plan,
    sizes,
)
from taq_vllm.model_files import ModelFiles
from taq_vllm.scores import Scores


def plan(
    model: Model,
    budget: BudgetOption,
    scores: Annotated[Path | None, typer.Option(help="Scores file made by `taq score`.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plan file.")] = Path("plan.json"),
    allocation: AllocationOption = "monotone",
    edges: Edges = 0,
    edge_bits: EdgeBits = 16,
    pin: Pin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes and average bits; write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Spend a budget: bits for every weight matrix."""
    files = ModelFiles(model)
    made = Scores.load(scores) if scores else None
    result = allocate(files, made, Request(budget, allocation, edges, edge_bits, tuple(pin or ())))
    fresh = not (output.is_file() and output.read_text(encoding="utf-8") == result.to_json())
    if not dry_run and fresh:
        if output.exists() and not force:
            raise ValueError(f"{output} is another plan: choose another output, or replace it with --force")
        result.save(output)
    if as_json:
        print_json({"plan_sha256": result.sha256(), "done_before": not fresh, **sizes(result)})
        return
    print_plan(result, files)
    if not dry_run:
        out.print(f"{output} {'written' if fresh else 'was this plan already'}")
