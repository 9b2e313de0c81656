"""The command `taq`: one function per step that reads arguments, calls one function and prints.

Exit codes: 0 done, 1 failed (the message says what to do), 2 bad usage. Progress goes to stderr; `--json` prints one
JSON object to stdout.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from taq_vllm import __version__
from taq_vllm.allocate import ALLOCATIONS, BASELINES, Request, allocate, baseline_scores
from taq_vllm.model_files import ModelFiles, layer_of
from taq_vllm.plan import Plan
from taq_vllm.scores import Scores

if TYPE_CHECKING:
    import torch
    from taq_kernels.tuned import Table as TunedTable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
_out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)

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
MethodOption = Annotated[str, typer.Option(help="rtn (no data) or clip (ranges fitted on the task's inputs).")]
Examples = Annotated[int, typer.Option(help="Calibration examples that clip reads.")]
Inputs = Annotated[str, typer.Option(help="Inputs that clip fits: of the quantized or of the full blocks before.")]


@app.command()
def score(
    model: Model,
    task: TaskOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The scores file.")] = Path("scores.json"),
    scorer: Annotated[str, typer.Option(help="taq (hidden states) or taqo (the oracle).")] = "taq",
    setting: Setting = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score every layer of a model for a task."""
    from taq_vllm.scorers import score as run
    from taq_vllm.tasks import load_task

    scores, fresh = run(ModelFiles(model), load_task(task), scorer, output, _settings(setting), device, force)
    if as_json:
        _print_json(scores.model_dump(mode="json") | {"done_before": not fresh})
        return
    _print_scores(scores)
    _out.print(f"{output} {'written' if fresh else 'was finished already; nothing was run'}")


@app.command()
def plan(
    model: Model,
    budget: BudgetOption,
    scores: Annotated[Path | None, typer.Option(help="Scores file made by `taq score`.")] = None,
    baseline: Annotated[str | None, typer.Option(help=f"Instead of scores: {', '.join(BASELINES)}.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random baseline.")] = 0,
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
    if scores and baseline:
        raise typer.BadParameter("give --scores or --baseline, not both")
    files = ModelFiles(model)
    made = baseline_scores(files, baseline, seed) if baseline else Scores.load(scores) if scores else None
    result = allocate(files, made, Request(budget, allocation, edges, edge_bits, tuple(pin or ())))
    fresh = not (output.is_file() and output.read_text(encoding="utf-8") == result.to_json())
    if not dry_run and fresh:
        if output.exists() and not force:
            raise ValueError(f"{output} is another plan: choose another output, or replace it with --force")
        result.save(output)
    if as_json:
        _print_json({"plan_sha256": result.sha256(), "done_before": not fresh, **_sizes(result)})
        return
    _print_plan(result, files)
    if not dry_run:
        _out.print(f"{output} {'written' if fresh else 'was this plan already'}")


@app.command()
def quantize(
    model: Model,
    plan_file: Annotated[Path, typer.Option("--plan", help="Plan file made by `taq plan`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint's folder.")],
    task: Annotated[Path | None, typer.Option(help="Task whose inputs clip fits.")] = None,
    method: MethodOption = "clip",
    examples: Examples = 128,
    inputs: Inputs = "quantized",
    device: Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes and average bits; touch no weights.")] = False,
    as_json: Json = False,
) -> None:
    """Write the specialised checkpoint."""
    files = ModelFiles(model)
    loaded = Plan.load(plan_file)
    if dry_run:
        files.check_plannable()
        loaded.check_fits(files.ref, files.matrices, where=str(plan_file))
        _print_json(_sizes(loaded)) if as_json else _print_plan(loaded, files)
        return
    from taq_vllm.checkpoint import quantize_model
    from taq_vllm.tasks import load_task

    calibration = _calibration(method, examples, inputs)
    fresh = quantize_model(files, loaded, output, calibration, load_task(task) if task else None, device)
    if as_json:
        _print_json({"output": str(output), "done_before": not fresh, **_sizes(loaded)})
        return
    _out.print(f"{output} {'written' if fresh else 'was finished already; nothing was run'}: {_summary(loaded)}")
    _out.print(f"serve it: vllm serve {output} --quantization taq")


@app.command()
def verify(checkpoint: Annotated[Path, typer.Argument(help="A folder written by taq.")], as_json: Json = False) -> None:
    """Check a checkpoint: every file's sha256, and plan, config and tensors against each other."""
    from taq_vllm.checkpoint import verify as run

    result = run(checkpoint)
    if as_json:
        _print_json({"files": result.files, "bytes": result.bytes, **_sizes(result.plan)})
        return
    _out.print(f"{checkpoint} is whole: {result.files} files, {result.bytes / 1e6:.2f} MB; {_summary(result.plan)}")


@app.command(name="eval")
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
        _print_json(result.model_dump(mode="json") | {"done_before": not fresh})
        return
    _out.print(
        f"{result.label} on {result.task}: {result.metric} {100 * result.mean:.1f} "
        f"[{100 * result.low:.1f}, {100 * result.high:.1f}], n {result.n}; answer NLL {result.answer_nll:.4f} "
        f"[{result.answer_nll_low:.4f}, {result.answer_nll_high:.4f}] nats/token; "
        f"{result.output_tokens_per_s:.0f} output tokens/s; {result.weight_bytes / 1e6:.2f} MB",
        markup=False,
    )
    _out.print(f"{results} {'has a new line' if fresh else 'held this result already; nothing was run'}")


@app.command()
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
    _out.print(table)


@app.command()
def specialize(
    model: Model,
    task: TaskOption,
    budget: BudgetOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint's folder.")],
    scorer: Annotated[str, typer.Option(help="taq (hidden states) or taqo (the oracle).")] = "taq",
    setting: Setting = None,
    allocation: AllocationOption = "monotone",
    edges: Edges = 0,
    edge_bits: EdgeBits = 16,
    pin: Pin = None,
    method: MethodOption = "clip",
    examples: Examples = 128,
    inputs: Inputs = "quantized",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score, plan, quantize and verify in one go; scores and plan are kept in OUTPUT.work."""
    from taq_vllm.specialize import specialize as run
    from taq_vllm.tasks import load_task

    files = ModelFiles(model)
    request = Request(budget, allocation, edges, edge_bits, tuple(pin or ()))
    calibration = _calibration(method, examples, inputs)
    done = run(files, load_task(task), output, request, calibration, scorer, _settings(setting), device)
    if as_json:
        sizes = _sizes(done.plan)
        _print_json({"output": str(output), "scored": done.scored_now, "quantized": done.quantized_now, **sizes})
        return
    _print_scores(done.scores)
    _print_plan(done.plan, files)
    _out.print(f"{output} {'written and verified' if done.quantized_now else 'was finished already; verified again'}")
    _out.print(f"serve it: vllm serve {output} --quantization taq")


@app.command()
def tune(
    model: Model,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan whose fused layers are tuned as well.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one.")] = None,
    tokens: Annotated[str | None, typer.Option("--m", help="Numbers of tokens for latencies, as 1,16,64.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The table, if not this machine's own.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that the layers are cut for.")] = 1,
    max_seconds: Annotated[float | None, typer.Option(help="Begin nothing after so many; run again for more.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what the table holds.")] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest kernel launches for a model's layers on this device, and measure how long each matrix takes."""
    import torch
    from taq_kernels import tune as tuning

    from taq_vllm.progress import track

    files = ModelFiles(model)
    files.check_plannable()
    bits = {}
    if plan_file:
        loaded = Plan.load(plan_file)
        loaded.check_fits(files.ref, files.matrices, where=str(plan_file))
        bits = {name: entry.bits for name, entry in loaded.matrices.items()}
    heads = files.config["num_attention_heads"]
    kv_heads = files.config.get("num_key_value_heads") or heads
    outcome = tuning.tune(
        tuning.layers_of(files.matrices, bits, (heads, kv_heads), tensor_parallel_size),
        _device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        _token_counts(tokens) if tokens else tuning.TOKENS,
        output,
        force=force,
        max_seconds=float("inf") if max_seconds is None else max_seconds,
        track=track,
    )
    counts = {"measured": outcome.measured, "kept": outcome.kept, "left": outcome.left}
    if as_json:
        _print_json({"output": str(outcome.path), "device": outcome.table.device, **counts})
        return
    _print_latencies(outcome.table)
    _out.print(
        f"{outcome.path}: {len(outcome.table.configs)} configurations and {len(outcome.table.latencies)} latencies; "
        f"{outcome.measured} measured now, {outcome.kept} were there"
    )
    if outcome.left:
        _out.print(f"{outcome.left} are left: run it again to continue")


def _device(name: str) -> "torch.device":
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(f"got device {name!r}; there are cpu, cuda and cuda:N") from error


def _token_counts(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise typer.BadParameter(f"got --m {text!r}; write whole numbers from 1 on, as 1,16,64")
    return tuple(map(int, counts))


def _calibration(method: str, examples: int, inputs: str) -> Any:
    from taq_vllm.checkpoint import Calibration

    if method not in ("rtn", "clip"):
        raise typer.BadParameter(f"got method {method!r}; there are rtn and clip")
    if inputs not in ("quantized", "full"):
        raise typer.BadParameter(f"got inputs {inputs!r}; there are quantized and full")
    if examples < 1:
        raise typer.BadParameter(f"got {examples} examples; clip needs at least 1")
    return Calibration(method=method, examples=examples, inputs=inputs)


def _settings(pairs: list[str] | None) -> dict[str, Any]:
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


def _sizes(plan: Plan) -> dict[str, Any]:
    counts = {str(bits): count for bits, count in plan.counts().items()}
    return plan.budget.model_dump() | {"matrices": counts}


def _summary(plan: Plan) -> str:
    counts = ", ".join(f"{count} at {bits} bits" for bits, count in plan.counts().items() if count)
    budget = plan.budget
    return (
        f"{len(plan.matrices)} matrices ({counts}), {budget.average_bits:.3f} bits per planned weight, "
        f"{budget.disk_bytes / 1e6:.2f} MB on disk, {budget.resident_bytes / 1e6:.2f} MB in memory"
    )


def _print_scores(scores: Scores) -> None:
    details = [name for name in scores.layers[0].details if not name.endswith("_stderr")]
    table = Table(title=f"{scores.scorer.name} on {scores.task.name if scores.task else 'no task'}")
    tested = any(not entry.from_zero for entry in scores.layers)
    for column in ("layer", "rank", "score", "stderr", *(["from zero"] if tested else []), *details):
        table.add_column(column, justify="right")
    ranks = {layer: rank for rank, layer in enumerate(scores.ranking)}
    for entry in scores.layers:
        values = [str(v) if isinstance(v, bool) else f"{v:.4f}" for v in (entry.details[name] for name in details)]
        stderr = "" if entry.stderr is None else f"{entry.stderr:.4f}"
        marks = [str(entry.from_zero)] if tested else []
        table.add_row(str(entry.layer), str(ranks[entry.layer]), f"{entry.score:+.4f}", stderr, *marks, *values)
    _out.print(table)
    _out.print(f"{scores.seconds:.1f} s, peak memory {scores.peak_memory_bytes / 1e6:.0f} MB")


def _print_plan(plan: Plan, files: ModelFiles) -> None:
    table = Table(title=f"plan for {plan.base_model.id}")
    for column in ("layer", "bits", "why", "score"):
        table.add_column(column, justify="right")
    for layer in range(files.layers):
        entries = [entry for name, entry in plan.matrices.items() if layer_of(name) == layer]
        bits = sorted({entry.bits for entry in entries}, reverse=True)
        reasons = sorted({entry.why for entry in entries})
        score = "" if entries[0].score is None else f"{entries[0].score:+.4f}"
        table.add_row(str(layer), "/".join(map(str, bits)), "/".join(reasons), score)
    _out.print(table)
    full = sum(2 * rows * columns for rows, columns in files.matrices.values()) + files.other_bytes
    _out.print(f"{_summary(plan)}; full precision is {full / 1e6:.2f} MB. Budget asked: {plan.budget.asked}")


def _print_latencies(tuned: "TunedTable") -> None:
    """Microseconds by matrix and bits (rows) and M (columns)."""
    counts = sorted({entry.tokens for entry in tuned.latencies})
    grid = Table(title=f"microseconds on {tuned.device}, by M")
    for column in ("N", "K", "bits", "threads", *map(str, counts)):
        grid.add_column(column, justify="right")
    by_matrix: dict[tuple[int, ...], dict[int, float]] = {}
    for entry in tuned.latencies:
        by_matrix.setdefault((entry.rows, entry.columns, entry.bits, entry.threads), {})[entry.tokens] = entry.us
    for matrix, us in sorted(by_matrix.items()):
        grid.add_row(*map(str, matrix), *(f"{us[count]:.1f}" if count in us else "" for count in counts))
    _out.print(grid)


def _print_json(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"taq-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Task-specialised mixed-precision deployments of a large language model, served by vLLM."""


def main() -> None:
    """Entry point: errors at the doors become one message on stderr and exit code 1."""
    # Before torch is imported. With other work on the machine, threads that spin while they wait cost a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", highlight=False, markup=False, style="red")
        sys.exit(1)
