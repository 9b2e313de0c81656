"""`taq eval` and `taq compare`: a served model on a task, and two of them item by item."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from taq_vllm.cli.options import Json, Model, TaskOption, out, print_json


def evaluate(
    model: Model,
    task: TaskOption,
    results: Annotated[Path, typer.Option(help="JSON lines; one line per model and task.")] = Path("results.jsonl"),
    quantization: Annotated[str | None, typer.Option(help="taq, or nothing for vLLM's own choice.")] = None,
    label: Annotated[str | None, typer.Option(help="Name in tables; the folder's name if not given.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many test items.")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Do not compile: starts faster.")] = False,
    max_model_len: Annotated[int | None, typer.Option(help="vLLM's own; longest context that is served.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the code that the model writes, in a sandbox (pass@1).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on a task's test set with the real vLLM engine."""
    from taq_vllm.evaluate import evaluate as run
    from taq_vllm.tasks import load_task

    engine_args: dict[str, Any] = {"enforce_eager": True} if enforce_eager else {}
    if max_model_len is not None:
        engine_args["max_model_len"] = max_model_len
    result, fresh = run(
        model,
        load_task(task),
        quantization=quantization,
        limit=limit,
        allow_code_execution=allow_code_execution,
        engine_args=engine_args,
        label=label,
        results=results,
    )
    if as_json:
        print_json(result.model_dump(mode="json") | {"done_before": not fresh})
        return
    out.print(
        f"{result.label} on {result.task}: {result.metric} {100 * result.mean:.1f} "
        f"[{100 * result.low:.1f}, {100 * result.high:.1f}], n {result.n}; answer NLL {result.answer_nll:.4f} "
        f"[{result.answer_nll_low:.4f}, {result.answer_nll_high:.4f}] nats/token; "
        f"{result.output_tokens_per_s:.0f} output tokens/s; {result.weight_bytes / 1e6:.2f} MB",
        markup=False,
    )
    out.print(f"{results} {'has a new line' if fresh else 'held this result already; nothing was run'}")


def compare(
    results: Annotated[Path, typer.Argument(help="Results file written by `taq eval`.")],
    first: Annotated[str, typer.Argument(help="Label of one model.")],
    second: Annotated[str, typer.Argument(help="Label of the other.")],
    as_json: Json = False,
) -> None:
    """Compare two models item by item on every task that both answered; first minus second."""
    from taq_vllm.evaluate import compare_labels

    compared = compare_labels(results, first, second)
    if as_json:
        typer.echo(json.dumps(compared))
        return
    table = Table(title=f"{first} minus {second}, paired")
    for column in ("task", "quantity", "difference", "95% interval", "p", "n", "better", "worse", "method"):
        table.add_column(column, justify="right")
    for line in compared:
        scale, digits = (100, 1) if line["quantity"] == "metric" else (1, 4)
        difference, low, high = (f"{scale * line[name]:+.{digits}f}" for name in ("mean", "low", "high"))
        counts = [str(line[name]) for name in ("n", "better", "worse", "method")]
        table.add_row(line["task"], line["quantity"], difference, f"{low}, {high}", f"{line['p_value']:.3g}", *counts)
    out.print(table)
