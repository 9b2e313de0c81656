"""Options that several commands share, how their values are checked, and how plans and scores are printed."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from taq_vllm.allocate import ALLOCATIONS
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan
from taq_vllm.scores import Scores
from taq_vllm.units import layer_of

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its hub id.")]
TaskOption = Annotated[Path, typer.Option("--task", help="Task header (task.yaml), its folder, or a bare .jsonl.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another result that is at the output.")]
Device = Annotated[str, typer.Option(help="Where blocks run: cpu, cuda, cuda:1 ...")]
Setting = Annotated[list[str] | None, typer.Option("--set", help="A scorer's setting, as alpha=0.7. Repeatable.")]
BudgetOption = Annotated[str, typer.Option(help="5.0bits (average, scales counted) or bytes of all weights: 4.2GiB.")]
AllocationOption = Annotated[str, typer.Option(help=f"How scores become bits: {', '.join(ALLOCATIONS)}.")]
Edges = Annotated[int, typer.Option(help="Layers protected at each end of the model.")]
EdgeBits = Annotated[int, typer.Option(help="Bits of the protected layers.")]
Pin = Annotated[list[str] | None, typer.Option(help="layers.0=16, layers.3.self_attn.q_proj=8, re:.*down_proj=8.")]
ScorerOption = Annotated[str, typer.Option(help="taq, taqo, kl, loss, weight-error, uniform, random or edges.")]
MethodOption = Annotated[str, typer.Option(help="rtn (no data) or clip (ranges fitted on the task's inputs).")]
Examples = Annotated[int, typer.Option(help="Calibration examples that clip reads.")]
Inputs = Annotated[str, typer.Option(help="Inputs that clip fits: of the quantized or of the full blocks before.")]


def calibration_of(method: str, examples: int, inputs: str) -> Any:
    """How to calibrate, from the command line's words."""
    from taq_vllm.checkpoint import Calibration

    if method not in ("rtn", "clip"):
        raise typer.BadParameter(f"got method {method!r}; there are rtn and clip")
    if inputs not in ("quantized", "full"):
        raise typer.BadParameter(f"got inputs {inputs!r}; there are quantized and full")
    if examples < 1:
        raise typer.BadParameter(f"got {examples} examples; clip needs at least 1")
    return Calibration(method=method, examples=examples, inputs=inputs)


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` pairs as a dictionary; values are JSON where they can be."""
    settings = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"got --set {pair!r}; write NAME=VALUE, as alpha=0.7")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def sizes(plan: Plan) -> dict[str, Any]:
    """A plan's sizes for `--json`."""
    counts = {str(bits): count for bits, count in plan.counts().items()}
    return plan.budget.model_dump() | {"matrices": counts}


def summary(plan: Plan) -> str:
    """A plan in a sentence."""
    counts = ", ".join(f"{count} at {bits} bits" for bits, count in plan.counts().items() if count)
    budget = plan.budget
    return (
        f"{len(plan.matrices)} matrices ({counts}), {budget.average_bits:.3f} bits per planned weight, "
        f"{budget.disk_bytes / 1e6:.2f} MB on disk, {budget.resident_bytes / 1e6:.2f} MB in memory"
    )


def print_scores(scores: Scores) -> None:
    """A table of scores."""
    details = [name for name in scores.units[0].details if not name.endswith("_stderr")]
    table = Table(title=f"{scores.scorer.name} on {scores.task.name if scores.task else 'no task'}")
    tested = any(not entry.from_zero for entry in scores.units)
    for column in ("unit", "rank", "score", "stderr", *(["from zero"] if tested else []), *details):
        table.add_column(column, justify="right")
    ranks = {unit: rank for rank, unit in enumerate(scores.ranking)}
    for entry in scores.units:
        values = [str(v) if isinstance(v, bool) else f"{v:.4f}" for v in (entry.details[name] for name in details)]
        stderr = "" if entry.stderr is None else f"{entry.stderr:.4f}"
        marks = [str(entry.from_zero)] if tested else []
        table.add_row(entry.unit, str(ranks[entry.unit]), f"{entry.score:+.4f}", stderr, *marks, *values)
    out.print(table)
    out.print(f"{scores.seconds:.1f} s, peak memory {scores.peak_memory_bytes / 1e6:.0f} MB")


def print_plan(plan: Plan, files: ModelFiles) -> None:
    """A table of a plan by layer."""
    table = Table(title=f"plan for {plan.base_model.id}")
    for column in ("layer", "bits", "why", "score"):
        table.add_column(column, justify="right")
    for layer in range(files.layers):
        entries = [entry for name, entry in plan.matrices.items() if layer_of(name) == layer]
        bits = sorted({entry.bits for entry in entries}, reverse=True)
        reasons = sorted({entry.why for entry in entries})
        score = "" if entries[0].score is None else f"{entries[0].score:+.4f}"
        table.add_row(str(layer), "/".join(map(str, bits)), "/".join(reasons), score)
    out.print(table)
    full = sum(2 * rows * columns for rows, columns in files.matrices.values()) + files.bytes_beside(files.matrices)
    out.print(f"{summary(plan)}; full precision is {full / 1e6:.2f} MB. Budget asked: {plan.budget.asked}")


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on a line."""
    typer.echo(json.dumps(record))
