"""Options that several commands share, how their values are checked, and how plans and scores are printed."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from taq_vllm.allocate import ALLOCATIONS, Request
from taq_vllm.budget import BYTE_UNITS, Latencies, load_latencies, parse_budget, this_device
from taq_vllm.methods import METHODS
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import BITS_MENU, STUDY_BITS, SYMMETRIC, MatrixPlan, Plan
from taq_vllm.scorers import SCORERS
from taq_vllm.scores import Scores
from taq_vllm.units import GRANULARITIES, HEAD, Granularity, experts_of, layer_of

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)

Model = Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its hub id.")]
TaskOption = Annotated[Path, typer.Option("--task", help="Task header (task.yaml), its folder, or a bare .jsonl.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another result that is at the output.")]
Device = Annotated[str, typer.Option(help="Where blocks run: auto (a GPU if there is one), cpu, cuda, cuda:1 ...")]
HiddenMemory = Annotated[
    str,
    typer.Option(
        help="Memory for hidden states, as 2GiB: the GPU's where blocks run on one. What exceeds it lies in files "
        "without names."
    ),
]
DEFAULT_HIDDEN_MEMORY = "2GiB"
SpillFolder = Annotated[
    Path | None, typer.Option(help="On whose disk these files are; the output's folder if not given.")
]
Setting = Annotated[list[str] | None, typer.Option("--set", help="A scorer's setting, as max_examples=64. Repeatable.")]
BUDGET_HELP = "5.0bits (average, scales counted), 4.2GiB (all weights), 9ms@batch=16, or several: 5bits,9ms@batch=16."
BudgetOption = Annotated[str, typer.Option(help=BUDGET_HELP)]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        help=f"How scores become bits: {', '.join(ALLOCATIONS)}. If not given, knapsack where the scorer measures "
        "costs, monotone where it only ranks."
    ),
]
Edges = Annotated[int, typer.Option(help="Layers protected at each end of the model.")]
EdgeBits = Annotated[int, typer.Option(help="Bits of the protected layers.")]
Pin = Annotated[
    list[str] | None,
    typer.Option(help="layers.0=16, layers.3.self_attn.q_proj=8, lm_head=8, re:.*down_proj=8. Repeatable."),
]
PlanGranularity = Annotated[
    str | None,
    typer.Option("--granularity", help=f"What gets bits of its own: {', '.join(GRANULARITIES)}; else what was scored."),
]
Menu = Annotated[str, typer.Option(help="Bitwidths to choose from; 2,3,5,6,7 are for studies and cannot be served.")]
PlanHead = Annotated[bool, typer.Option("--head", help="Plan lm_head as well.")]
UniformFused = Annotated[
    bool, typer.Option("--uniform-fused", help="Equal bits for q, k, v and for gate, up: stock servers load it.")
]
Symmetric = Annotated[list[int] | None, typer.Option(help="Bitwidth without zero points, as 4. Repeatable.")]
Asymmetric = Annotated[list[int] | None, typer.Option(help="Bitwidth with zero points, as 8. Repeatable.")]
DeviceTable = Annotated[
    Path | None, typer.Option(help="Latencies that `taq tune` wrote, for budgets in ms; else this machine's own.")
]
ForDevice = Annotated[
    str | None, typer.Option(help="The GPU's name, or cpu, if the plan is for another device than this machine's.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of a CPU, if its table has several.")]
FixedMs = Annotated[
    float | None, typer.Option(min=0, help="Milliseconds of a step beside its matrices, if `tune --step` was not run.")
]
DEFAULT_MENU = ",".join(map(str, BITS_MENU))
ScorerOption = Annotated[str, typer.Option(help=f"What measures need of precision: {', '.join(SCORERS)}.")]
MethodOption = Annotated[str, typer.Option(help=f"How codes are fitted: {', '.join(METHODS)}; rtn reads no data.")]
MethodSetting = Annotated[
    list[str] | None, typer.Option("--method-set", help="A method's setting, as steps=400. Repeatable.")
]
Examples = Annotated[int, typer.Option(help="Calibration examples that the method reads.")]
Inputs = Annotated[str, typer.Option(help="Inputs that are fitted: of the quantized or of the full blocks before.")]
MixGeneral = Annotated[float, typer.Option(help="Share of the calibration examples that is general text, 0 to 1.")]
GeneralData = Annotated[
    Path | None, typer.Option(help="That text: a .txt, a .jsonl with text or prompt, or a task's header.")
]


def calibration_of(
    method: str,
    examples: int,
    inputs: str,
    method_setting: list[str] | None = None,
    mix_general: float = 0.0,
    general_data: Path | None = None,
) -> Any:
    """How to calibrate, from the command line's words."""
    from taq_vllm.checkpoint import Calibration
    from taq_vllm.general_text import GeneralText

    if inputs not in ("quantized", "full"):
        raise typer.BadParameter(f"got inputs {inputs!r}; there are quantized and full")
    calibration = Calibration(
        method=method,
        settings=settings_of(method_setting, "--method-set"),
        examples=examples,
        inputs=inputs,
        mix_general=mix_general,
        general=GeneralText(general_data) if general_data else None,
    )
    try:
        calibration.check()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return calibration


def memory_of(text: str) -> int:
    """Bytes, from `2GiB`."""
    try:
        limits = parse_budget(text)
    except ValueError:
        limits = ()
    if len(limits) != 1 or limits[0].unit not in BYTE_UNITS:
        raise typer.BadParameter(f"got memory {text!r}; write it as 2GiB (units: {', '.join(BYTE_UNITS)})")
    return int(limits[0].amount * BYTE_UNITS[limits[0].unit])


def request_of(
    *,
    budget: str,
    allocation: str | None,
    edges: int,
    edge_bits: int,
    pin: list[str] | None,
    granularity: str | None = None,
    menu: str = DEFAULT_MENU,
    head: bool = False,
    uniform_fused: bool = False,
    symmetric: list[int] | None = None,
    asymmetric: list[int] | None = None,
    latencies: Latencies | None = None,
) -> Request:
    """What is asked of a plan, from the command line's words."""
    widths = menu.split(",")
    if not all(width.strip().isdecimal() for width in widths):
        raise typer.BadParameter(f"got --menu {menu!r}; write bitwidths among {_numbers(STUDY_BITS)}, as 4,8,16")
    both = set(symmetric or ()) & set(asymmetric or ())
    unknown = (set(symmetric or ()) | set(asymmetric or ())) - set(STUDY_BITS[:-1])
    if both:
        raise typer.BadParameter(f"got {_numbers(both)} bits as --symmetric and --asymmetric; choose one")
    if unknown:
        raise typer.BadParameter(
            f"got {_numbers(unknown)} bits as --symmetric or --asymmetric; allowed are {_numbers(STUDY_BITS[:-1])}"
        )
    chosen = dict.fromkeys(symmetric or (), True) | dict.fromkeys(asymmetric or (), False)
    return Request(
        budget=budget,
        allocation=allocation,
        edges=edges,
        edge_bits=edge_bits,
        pins=tuple(pin or ()),
        symmetric=SYMMETRIC | chosen,
        granularity=cast(Granularity | None, granularity),
        menu=tuple(sorted({int(width) for width in widths})),
        head=head,
        uniform_fused=uniform_fused,
        latencies=latencies,
    )


def latencies_of(
    budgets: list[str], file: Path | None, for_device: str | None, threads: int | None, fixed_ms: float | None
) -> Latencies | None:
    """The measurements that budgets in ms need; None where there is no such budget."""
    if any(limit.unit == "ms" for budget in budgets for limit in parse_budget(budget)):
        return load_latencies(file, for_device or this_device(), threads, fixed_ms)
    given = {"--device-table": file, "--for-device": for_device, "--threads": threads, "--fixed-ms": fixed_ms}
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise typer.BadParameter(f"{unused[0]} is for budgets in ms, as --budget 9ms@batch=16; there is none")
    return None


def settings_of(pairs: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """`NAME=VALUE` pairs as a dictionary; values are JSON where they can be."""
    settings = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"got {option} {pair!r}; write NAME=VALUE, as batch_size=4")
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
    latency = "".join(
        f", {us / 1000:.3f} ms per decode step of batch {batch} (predicted)"
        for batch, us in (budget.latency_us or {}).items()
    )
    return (
        f"{len(plan.matrices)} matrices ({counts}), {budget.average_bits:.3f} bits per planned weight, "
        f"{budget.disk_bytes / 1e6:.2f} MB on disk, {budget.resident_bytes / 1e6:.2f} MB in memory{latency}"
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
        values = [str(v) if isinstance(v, bool) else f"{v:.3g}" for v in (entry.details[name] for name in details)]
        stderr = "" if entry.stderr is None else f"{entry.stderr:.2g}"
        marks = [str(entry.from_zero)] if tested else []
        table.add_row(entry.unit, str(ranks[entry.unit]), f"{entry.score:+.3g}", stderr, *marks, *values)
    out.print(table)
    out.print(f"{scores.seconds:.1f} s, peak memory {scores.peak_memory_bytes / 1e6:.0f} MB")


def print_plan(plan: Plan, files: ModelFiles) -> None:
    """A table of a plan by layer; where bits differ inside a layer, by matrix."""
    table = Table(title=f"plan for {plan.base_model.id}")
    for column in ("layer", "bits", "matrices", "why", "score"):
        table.add_column(column, justify="left" if column == "matrices" else "right")
    groups: dict[str, dict[str, MatrixPlan]] = {}
    for name, entry in plan.matrices.items():
        groups.setdefault(name if name == HEAD else str(layer_of(name)), {})[name] = entry
    for group, entries in groups.items():
        widths = sorted({entry.bits for entry in entries.values()}, reverse=True)
        by_bits = {
            bits: " ".join(dict.fromkeys(_short(name) for name, entry in entries.items() if entry.bits == bits))
            for bits in widths
        }
        matrices = "all" if len(widths) == 1 else ", ".join(f"{names} {bits}" for bits, names in by_bits.items())
        reasons = "/".join(sorted({entry.why for entry in entries.values()}))
        scores = sorted({entry.score for entry in entries.values() if entry.score is not None})
        score = "" if not scores else f"{scores[0]:+.3g}" + (f" to {scores[-1]:+.3g}" if len(scores) > 1 else "")
        table.add_row(group, "/".join(map(str, widths)), "" if group == HEAD else matrices, reasons, score)
    out.print(table)
    full = sum(2 * rows * columns for rows, columns in files.matrices.values()) + files.bytes_beside(files.matrices)
    out.print(f"{summary(plan)}; full precision is {full / 1e6:.2f} MB. Budget asked: {plan.budget.asked}")
    gap = plan.allocation.settings.get("optimality_gap")
    if gap:
        out.print(f"not proven best: another plan could cost up to {gap:.3g} less")


def _short(matrix: str) -> str:
    """q_proj is q, down_proj is down, all experts are experts: the names are long, and their ends are all alike."""
    return (experts_of(matrix) or matrix).rpartition(".")[2].removesuffix("_proj")


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on a line."""
    typer.echo(json.dumps(record))
