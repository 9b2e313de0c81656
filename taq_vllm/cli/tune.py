"""`taq tune`: the fastest kernel launches on this device, and how long each matrix takes."""

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
        print_json({"output": str(outcome.path), "device": outcome.table.device, **counts})
        return
    _print_latencies(outcome.table)
    out.print(
        f"{outcome.path}: {len(outcome.table.configs)} configurations and {len(outcome.table.latencies)} latencies; "
        f"{outcome.measured} measured now, {outcome.kept} were there"
    )
    if outcome.left:
        out.print(f"{outcome.left} are left: run it again to continue")


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
