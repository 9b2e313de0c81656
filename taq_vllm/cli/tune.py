"""`taq tune`: the fastest kernel launches on this device, and how long each matrix and the rest of a step take."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from taq_vllm.cli.options import Json, Model, out, print_json
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan

if TYPE_CHECKING:
    import torch
    from taq_kernels.tuned import Table as TunedTable


def tune(
    model: Model,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan whose fused layers are tuned as well.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one.")] = None,
    tokens: Annotated[str | None, typer.Option("--m", help="Numbers of tokens for latencies, as 1,16,64.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The table, if not this machine's own.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks that the layers are cut for.")] = 1,
    step: Annotated[
        bool,
        typer.Option("--step", help="Also measure a decode step of the 16-bit model with vLLM, for budgets in ms."),
    ] = False,
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
        loaded.check_fits(files.ref, files.matrices, files.head, where=str(plan_file))
        bits = {name: entry.bits for name, entry in loaded.matrices.items()}
    if step and tensor_parallel_size > 1:
        raise typer.BadParameter("--step is measured on one device; leave out --tensor-parallel-size")
    started = time.monotonic()
    heads = files.config["num_attention_heads"]
    kv_heads = files.config.get("num_key_value_heads") or heads
    chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    counted = _token_counts(tokens) if tokens else tuning.TOKENS
    outcome = tuning.tune(
        tuning.layers_of({**files.matrices, **files.head}, bits, (heads, kv_heads), tensor_parallel_size),
        chosen,
        counted,
        output,
        force=force,
        max_seconds=float("inf") if max_seconds is None else max_seconds,
        track=track,
    )
    counts = {"measured": outcome.measured, "kept": outcome.kept, "left": outcome.left}
    table = outcome.table
    if step and not outcome.left:
        seconds = float("inf") if max_seconds is None else started + max_seconds - time.monotonic()
        table, counts["left"] = _with_steps(table, outcome.path, files, counted, chosen, force, seconds)
    if as_json:
        print_json({"output": str(outcome.path), "device": table.device, **counts, "steps": len(table.steps)})
        return
    _print_latencies(table)
    if table.steps:
        _print_steps(table)
    out.print(
        f"{outcome.path}: {len(outcome.table.configs)} configurations and {len(outcome.table.latencies)} latencies; "
        f"{outcome.measured} measured now, {outcome.kept} were there"
    )
    if counts["left"]:
        after = "; a step is measured when all are there" if step and outcome.left else ""
        out.print(f"{counts['left']} are left: run it again to continue{after}")


def _with_steps(
    table: "TunedTable",
    path: Path,
    files: ModelFiles,
    tokens: tuple[int, ...],
    device: "torch.device",
    force: bool,
    seconds: float,
) -> tuple["TunedTable", int]:
    """The table with what a decode step takes beside its matrices, for each M that it lacks; how many it still lacks.

    It is saved after every M.
    """
    import torch
    from taq_kernels.tuned import StepEntry

    from taq_vllm.budget import Latencies, model_shape
    from taq_vllm.step_latency import measure_steps, rest_of

    threads = torch.get_num_threads() if device.type == "cpu" else 0
    shape = model_shape(files.matrices, files.head)
    known = set() if force else {entry.key for entry in table.steps}
    batches = [count for count in tokens if (shape, count, threads) not in known]
    if not batches or seconds <= 0:
        return table, len(batches)
    latencies = Latencies.of_table(table, "the table", threads)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what this process keeps is not there for the engine
    measured = 0
    for step in measure_steps(files, batches, device, seconds):
        rest = rest_of(step, latencies, files)
        if rest < 0:
            typer.echo(
                f"batch {step.batch}: a step takes {step.us:.1f} us, {-rest:.1f} less than its matrices one by one: "
                "the engine overlaps them. The rest counts as 0, and predictions are that much too long",
                err=True,
            )
        table = table.with_entries(steps=[StepEntry(shape, step.batch, threads, max(0.0, rest), step.us)])
        table.save(path)
        measured += 1
    return table, len(batches) - measured


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


def _print_steps(tuned: "TunedTable") -> None:
    """Microseconds of decode steps by model, threads and M."""
    from taq_vllm.step_latency import CONTEXT

    context = f"sequences of {CONTEXT[0]} to {CONTEXT[1]} tokens"
    grid = Table(title=f"decode steps of 16-bit models on {tuned.device}, {context}, in microseconds")
    for column in ("model's shapes", "threads", "batch", "whole step", "beside matrices and head"):
        grid.add_column(column, justify="right")
    for entry in sorted(tuned.steps, key=lambda entry: entry.key):
        grid.add_row(entry.model, str(entry.threads), str(entry.tokens), f"{entry.step_us:.1f}", f"{entry.us:.1f}")
    out.print(grid)


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
    out.print(grid)
