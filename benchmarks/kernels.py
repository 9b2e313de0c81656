"""How fast are the kernels, against bf16, other projects' kernels and the speed of memory?

The fused linears of five models, for M = 1 to 4096 tokens, with 4-bit, 8-bit, bf16 and mixed weights in groups of 128.
For each layer every contender gets the same weights; its result is compared with float32 arithmetic on the weights as
they are stored before anything is timed, and one that is wrong is recorded as failed. Then all run in turns, each over
copies of its weights that exceed the caches (`taq_kernels.timing`), beside the floor: reading as many bytes.

    python -m benchmarks.kernels --device cuda --out benchmarks/results/kernels-h200.jsonl --max-seconds 500
    python -m benchmarks.kernels --device cpu --threads 1 --out benchmarks/results/kernels-cpu.jsonl
    python -m benchmarks.kernels --report benchmarks/results/kernels-h200.jsonl
    python -m benchmarks.kernels --tune kernels/taq_kernels/tuned/nvidia-h200.json --max-seconds 500

One JSON line is appended per cell (contender, plan, layer, M) as soon as it is measured, the most telling cells first,
so that a run that is cut short is still of use. `--report` makes tables, a plot beside the first file, and what must
hold; `--tune` the table of tuned launches that comes with the package, for all these layers. Peers
(`benchmarks.peers.gemms`) take part where they are installed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from taq_kernels import tune
from taq_kernels.packing import TILE_ROWS
from taq_kernels.timing import Floor, Runner, Times, copies_needed, make_runner, time_in_turns
from taq_kernels.tune import LARGEST_ERROR
from taq_kernels.tuned import rows_by_bits
from torch import Tensor

from benchmarks.peers.gemms import CONTENDERS, GROUP_SIZE, Contender, Matrix, Product, random_matrix
from benchmarks.provenance import provenance

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TIERS = {
    "cuda": ((1, 16, 64), (8, 32, 128, 256), (1024, 4096), (2, 4, 512, 2048)),
    "cpu": ((1, 2, 4, 8, 16, 32, 64, 128, 256), (512, 1024, 2048, 4096)),
}
"""M in the order in which they are measured: time on a GPU is scarce, so the most telling come first; on a CPU making
the weights takes longer than measuring them at small M."""
DEFAULT_TOKENS = {"cuda": TOKENS, "cpu": (1, 4, 8, 16, 32, 64, 128, 256, 1024)}
MOST_WORK = {"cuda": math.inf, "cpu": 2e10}
"""Multiply-adds a call. Larger layers are left out where a call takes seconds; 4096 x 4096 is measured up to 1024."""
PLANS = ("16", "4", "8", "half", "4+8+16")
"""One bitwidth; half of the bytes at 4 and half at 8 bits; or q at 4, k at 8 and v at 16 bits, in fused QKV only."""
RUNS = {"cuda": 30, "cpu": 60}
CELL_SECONDS = {"cuda": 1.0, "cpu": 5.0}
"""After so many no further round of the contenders for one layer and M starts."""

Line = dict[str, Any]


# What is measured.


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model as its config.json has them.

    Attributes:
        hidden: hidden_size.
        heads: num_attention_heads.
        kv_heads: num_key_value_heads.
        head: head_dim.
        intermediate: intermediate_size.
    """

    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int

    def layers(self) -> dict[str, "Layer"]:
        """The linears of one block, fused as vLLM runs them."""
        attention, kv = self.heads * self.head, self.kv_heads * self.head
        return {
            "qkv_proj": Layer((attention, kv, kv), self.hidden),
            "o_proj": Layer((self.hidden,), attention),
            "gate_up_proj": Layer((self.intermediate, self.intermediate), self.hidden),
            "down_proj": Layer((self.hidden,), self.intermediate),
        }


@dataclass(frozen=True)
class Layer:
    """A fused linear: the rows of its matrices, and the columns that they share."""

    sizes: tuple[int, ...]
    columns: int

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.sizes)

    def matrices(self, plan: str) -> tuple[tuple[int, int], ...]:
        """(bits, rows) of each matrix under a plan; none where the plan does not fit the layer."""
        if plan == "half":
            # Rows at 4 bits take half the bytes of rows at 8 (scales aside), so two thirds of them are half the bytes.
            # Cut where the GPU kernel's tiles are.
            narrow = round(2 * self.rows / 3 / TILE_ROWS) * TILE_ROWS
            return ((4, narrow), (8, self.rows - narrow)) if 0 < narrow < self.rows else ()
        if plan == "4+8+16":
            return tuple(zip((4, 8, 16), self.sizes, strict=True)) if len(self.sizes) == 3 else ()
        return tuple((int(plan), rows) for rows in self.sizes)


SQUARE = "4096x4096"
MODELS: dict[str, dict[str, Layer]] = {
    "Llama-3.1-8B": ModelSizes(4096, 32, 8, 128, 14336).layers(),
    "Qwen2.5-7B": ModelSizes(3584, 28, 4, 128, 18944).layers(),
    "Qwen3-4B": ModelSizes(2560, 32, 8, 128, 9728).layers(),
    "Mistral-7B": ModelSizes(4096, 32, 8, 128, 14336).layers(),
    "Phi-4-mini": ModelSizes(3072, 24, 8, 128, 8192).layers(),
    SQUARE: {"linear": Layer((4096,), 4096)},
}


@dataclass(frozen=True)
class Group:
    """A layer and the numbers of tokens that are measured while its weights are there.

    Attributes:
        layer: its shape.
        places: (model, name) of every layer of this shape.
        tokens: M.
    """

    layer: Layer
    places: tuple[tuple[str, str], ...]
    tokens: tuple[int, ...]


def groups(models: Sequence[str], tokens: Sequence[int], device: str) -> list[Group]:
    """All groups: tier by tier, and in a tier model by model as given.

    A shape that several models share is measured once.
    """
    places: dict[Layer, list[tuple[str, str]]] = {}
    for model in models:
        for name, layer in MODELS[model].items():
            places.setdefault(layer, []).append((model, name))
    found = []
    for tier in TIERS[device]:
        for layer, where in places.items():
            most = MOST_WORK[device] / (layer.rows * layer.columns)
            if wanted := tuple(m for m in tier if m in tokens and m <= most):
                found.append(Group(layer, tuple(where), wanted))
    return found


# Measuring.


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        device: "cuda" or "cpu".
        plans: of `PLANS`.
        contenders: names; all that are installed if empty.
        cell_seconds: see `CELL_SECONDS`.
        deadline: `time.monotonic()` after which no further layer is begun.
    """

    device: str
    plans: tuple[str, ...] = PLANS
    contenders: tuple[str, ...] = ()
    cell_seconds: float = 1.0
    deadline: float = math.inf

    def wanted(self) -> list[Contender]:
        """Contenders for this device, installed or not."""
        return [c for c in CONTENDERS if self.device in c.devices and c.name in (self.contenders or (c.name,))]


def measure(todo: Iterable[Group], settings: Settings, source: Line, threads: int) -> Iterator[Line]:
    """Measure layer after layer.

    Args:
        todo: what is measured.
        settings: how.
        source: what every line says of where it comes from.
        threads: of a CPU; 0 on a GPU.

    Yields:
        A line per contender, plan and M.
    """
    device = torch.device(settings.device)
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is float32
    floor = Floor(device)
    for group in todo:
        if time.monotonic() > settings.deadline:
            print(f"out of time: {' '.join(group.places[0])}, M {group.tokens} is left out", file=sys.stderr)
            continue
        for line in _measure_group(group, settings, floor, device):
            yield line | {"threads": threads} | source
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next layer's copies have other sizes


class _Cell:
    """A contender with a layer's weights.

    Attributes:
        error: what it raised, from then on.
    """

    def __init__(self, contender: Contender, matrices: Sequence[Matrix], device: torch.device) -> None:
        self.version = contender.version()
        self.error: str | None = None
        self.weight_bytes = 0
        self.products: list[Product] = []
        try:
            packed = contender.pack(matrices)
            self.weight_bytes = packed.weight_bytes
            self.products = [packed.fresh() for _ in range(copies_needed(packed.weight_bytes, device))]
        except Exception as error:  # whatever a peer raises: it must not be missing silently
            self.error = _in_one_line(error)

    def runner(self, x: Tensor, expected: Tensor) -> tuple[Runner | None, float | None]:
        """What is timed, and the larger relative error of a plain call and of a run of it."""
        try:
            # Freed at once: an output that takes its place and is not written in full stays NaN.
            torch.full_like(expected, torch.nan, dtype=x.dtype)
            plain = relative_error(self.products[-1](x), expected)
            runner = make_runner([lambda product=product: product(x) for product in self.products], x.device)
            return runner, max(plain, relative_error(runner.run(), expected))
        except Exception as error:
            self.error = _in_one_line(error)
            return None, None


@torch.inference_mode()
def _measure_group(group: Group, settings: Settings, floor: Floor, device: torch.device) -> Iterator[Line]:
    """All cells of one layer; its weights are made once."""
    torch.manual_seed(0)
    x = torch.randn(max(group.tokens), group.layer.columns, device=device).to(torch.bfloat16)
    cells: dict[tuple[str, str], _Cell] = {}
    expected: dict[str, Tensor] = {}
    for plan in settings.plans:
        contenders = [c for c in settings.wanted() if plan in c.plans and c.installed()]
        shapes = group.layer.matrices(plan)
        if not shapes or not contenders:
            continue
        matrices = [random_matrix(bits, rows, group.layer.columns, device) for bits, rows in shapes]
        expected[plan] = torch.cat([x.float() @ matrix.dequantized().t() for matrix in matrices], dim=1)
        for contender in contenders:
            cells[plan, contender.name] = _Cell(contender, matrices, device)
        del matrices
    for tokens in group.tokens:
        yield from _measure_tokens(group, x[:tokens], cells, expected, settings, floor)


def _measure_tokens(
    group: Group,
    x: Tensor,
    cells: Mapping[tuple[str, str], _Cell],
    expected: Mapping[str, Tensor],
    settings: Settings,
    floor: Floor,
) -> Iterator[Line]:
    tokens = x.shape[0]
    runners: dict[Any, Runner] = {}
    errors: dict[tuple[str, str], float | None] = {}
    for (plan, name), cell in cells.items():
        if cell.error is None:
            runner, error = cell.runner(x, expected[plan][:tokens])
            errors[plan, name] = error
            if runner and error <= LARGEST_ERROR:
                runners[plan, name] = runner
    sizes = {cells[key].weight_bytes for key in runners}
    floors = {size: make_runner(floor.calls(size), x.device) for size in sizes}
    for runner in floors.values():
        runner.run()  # as the others were, when their results were compared
    times = time_in_turns(runners | floors, x.device, RUNS[settings.device], settings.cell_seconds)
    clocks = gpu_state() if settings.device == "cuda" else None
    for (plan, name), cell in cells.items():
        exact = expected[plan][:tokens]
        line = {
            "benchmark": "kernels",
            "device": settings.device,
            "model": group.places[0][0],
            "layer": group.places[0][1],
            "also": [list(place) for place in group.places[1:]],
            "rows": group.layer.rows,
            "columns": group.layer.columns,
            "tokens": tokens,
            "plan": plan,
            "matrices": [list(shape) for shape in group.layer.matrices(plan)],
            "contender": name,
            "contender_version": cell.version,
            "weight_bytes": cell.weight_bytes,
            "relative_error": errors.get((plan, name)),
            "rounding_error": relative_error(exact.to(x.dtype), exact),
            "clocks": clocks,
        }
        if (plan, name) in runners:
            line |= _timing(times[plan, name], times[cell.weight_bytes], runners[plan, name].calls)
        else:
            line["failed"] = cell.error or f"wrong result: relative error {errors[plan, name]:.3g}"
        yield line


def _timing(spent: Times, read: Times, calls_per_run: int) -> Line:
    def spread(times: Times) -> dict[str, float]:
        return {"median": times.median, "min": times.minimum, "p90": times.p90}

    return {
        "us": spread(spent),
        "floor_us": spread(read),
        "floor_fraction": read.median / spent.median,
        "runs": len(spent.us),
        "calls_per_run": calls_per_run,
    }


def relative_error(y: Tensor | tuple[Tensor, ...], expected: Tensor) -> float:
    """Relative RMS error; infinite where something is not a number.

    Args:
        y: [M, N], or its parts by columns.
        expected: [M, N] fp32.
    """
    y = torch.cat(y, dim=1) if isinstance(y, tuple) else y
    error = ((y.float() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def layers_to_tune(models: Sequence[str], plans: Sequence[str]) -> list[tune.Layer]:
    """The layers of models under plans, each once."""
    shapes = [
        tune.Layer(rows_by_bits(matrices), layer.columns, GROUP_SIZE)
        for model in models
        for layer in MODELS[model].values()
        for plan in plans
        if plan != "16" and (matrices := layer.matrices(plan))
    ]
    return list(dict.fromkeys(shapes))


def _narrated(tasks: Iterable[tune.Task], description: str, count: int) -> Iterator[tune.Task]:
    """The tasks, with what is being done and for how long on stderr."""
    started = time.monotonic()
    for place, task in enumerate(tasks, start=1):
        what = "configuration" if task.chooses else "latency"
        where = f"{task.layer.shapes} x {task.layer.columns}, M {task.tokens}"
        print(f"{time.monotonic() - started:6.0f} s  {description} {place}/{count}: {what} of {where}", file=sys.stderr)
        yield task


# Where lines come from.


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature and power of the GPU that is used, as they are now."""
    names = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    return dict(zip(names.split(","), answer, strict=True)) if (answer := _nvidia_smi(names)) else None


def _nvidia_smi(names: str) -> list[str] | None:
    # By UUID: nvidia-smi counts all GPUs of the machine, in another order than CUDA does.
    gpu = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [value.strip() for value in done.stdout.strip().split(",")]


def source_of(settings: Settings) -> Line:
    """What every line of a run says of where it comes from."""
    line = provenance()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        line["versions"]["triton"] = importlib.metadata.version("triton")
    on_gpu = settings.device == "cuda"
    return line | {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": (_nvidia_smi("driver_version") or [None])[0] if on_gpu else None,
        "cuda": torch.version.cuda,
        "instructions": None if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": None if on_gpu else os.environ.get("OMP_WAIT_POLICY", "default"),
        "not_installed": sorted({c.name for c in settings.wanted() if not c.installed()}),
    }


# Reading lines.


JUDGED = {"cuda": ("Llama-3.1-8B", "Qwen2.5-7B"), "cpu": (SQUARE, "Llama-3.1-8B")}
"""The models that must-hold figures speak of."""


class Results:
    """Lines of one device and number of threads; of a cell that was measured again the last line stands.

    Attributes:
        device: "cuda" or "cpu".
        threads: of a CPU; 0 on a GPU.
    """

    def __init__(self, lines: Iterable[Line], threads: int) -> None:
        self.threads = threads
        self._lines: dict[tuple[str, str, int, str, str], Line] = {}
        for line in lines:
            if line["threads"] == threads:
                for model, layer in ([line["model"], line["layer"]], *line["also"]):
                    self._lines[model, layer, line["tokens"], line["plan"], line["contender"]] = line
        self.device = "cpu" if threads else "cuda"

    def where(self) -> str:
        """The GPU, or the CPU and its threads."""
        line = next(iter(self._lines.values()))
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return line["gpu"] if self.device == "cuda" else f"{line['processor']}, {threads}"

    def models(self) -> list[str]:
        """That have lines, in the order of `MODELS`."""
        return [model for model in MODELS if any(key[0] == model for key in self._lines)]

    def tokens(self) -> list[int]:
        """Every M, ascending."""
        return sorted({key[2] for key in self._lines})

    def contenders(self) -> list[tuple[str, str]]:
        """(contender, plan) in the order of the lines."""
        return list(dict.fromkeys((key[4], key[3]) for key in self._lines))

    def cells(self, contender: str, plan: str) -> dict[tuple[str, str, int], Line]:
        """What was timed of the models that are judged, by (model, layer, M)."""
        return {
            (model, layer, tokens): line
            for (model, layer, tokens, *of), line in self._lines.items()
            if of == [plan, contender] and "us" in line and model in JUDGED[self.device]
        }

    def us(self, line: Line) -> float:
        """Microseconds of a cell: the median; on a CPU, whose machine may have other work, the minimum."""
        return line["us"]["min" if self.device == "cpu" else "median"]

    def block_us(self, model: str, tokens: int, contender: str, plan: str) -> float | None:
        """Microseconds of all layers of a block; None if one is missing."""
        lines = [self._lines.get((model, layer, tokens, plan, contender), {}) for layer in MODELS[model]]
        return sum(map(self.us, lines)) if all("us" in line for line in lines) else None

    def bf16_us(self, model: str, tokens: int) -> float | None:
        """Microseconds of a block in bf16, by whichever contender is faster."""
        found = [self.block_us(model, tokens, name, "16") for name in ("torch", "onednn")]
        return min((us for us in found if us is not None), default=None)

    def speedups(self, plan: str, against: str | None = None, other_plan: str = "16") -> dict[int, float]:
        """By M, how many times as fast as another this project's kernel is over a block, for the worst model.

        Args:
            plan: of this project's kernel.
            against: a contender; the best bf16 if None.
            other_plan: of the contender.
        """
        found: dict[int, float] = {}
        for model in JUDGED[self.device]:
            for tokens in self.tokens():
                own = self.block_us(model, tokens, "taq", plan)
                other = self.block_us(model, tokens, against, other_plan) if against else self.bf16_us(model, tokens)
                if own and other:
                    found[tokens] = min(found.get(tokens, math.inf), other / own)
        return found


@dataclass(frozen=True)
class Figure:
    """Something that must hold.

    Attributes:
        what: in words.
        must: the least value (the most, where `at_most`).
        value: what the lines say, for the worst layer, model and M it speaks of; None where they do not suffice.
        at_most: smaller is better.
    """

    what: str
    must: float
    value: float | None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """In one word or two."""
        if self.value is None:
            return "not measured"
        return "holds" if (self.value <= self.must if self.at_most else self.value >= self.must) else "MISSES"


def figures(results: Results) -> list[Figure]:
    """What must hold on the lines' device."""
    return _cpu_figures(results) if results.device == "cpu" else _gpu_figures(results)


_OVER_BF16 = {
    "4": {1: 2.8, 16: 2.8, 32: 2.4, 64: 1.6, 128: 1.05, 256: 0.75, 1024: 0.80, 4096: 0.93},
    "8": {1: 1.65, 16: 1.65, 64: 1.4, 128: 1.0, 256: 0.75, 1024: 0.80, 4096: 0.93},
    "half": {1024: 0.80, 4096: 0.93},
}
_OVER_PEERS = {
    "tinygemm": {1: 1.05, 8: 1.5, 16: 2.2, 64: 6.0},
    "gemlite": {1: 1.2, 2: 1.6, 4: 1.6, 8: 1.6, 16: 1.6, 32: 1.6, 64: 1.8, 256: 1.5},
    "humming": {1: 0.85, 16: 0.85, 32: 0.70, 64: 0.70, 128: 0.70, 256: 0.75, 1024: 0.75, 4096: 0.75},
    "fbgemm": {1: 1.1, 16: 1.1, 64: 0.8, 128: 0.7},
}
"""Both inferred, before the first run on a GPU, from bandwidth, instruction counts and published figures of an H200."""


def _gpu_figures(results: Results) -> list[Figure]:
    found = []
    for plan, least_mb, most_mb, must in (("4", 28, math.inf, 0.70), ("8", 28, math.inf, 0.75), ("4", 8, 28, 0.45),
                                          ("4", 0, 8, 0.30)):  # fmt: skip
        fractions = [
            line["floor_fraction"]
            for (_, _, tokens), line in results.cells("taq", plan).items()
            if tokens in (1, 16) and least_mb <= line["weight_bytes"] / 1e6 < most_mb
        ]
        size = f"{least_mb} MB and more" if most_mb == math.inf else f"{least_mb} to {most_mb} MB"
        what = f"{plan} bits, weights of {size}, M 1 and 16: share of the floor"
        found.append(Figure(what, must, min(fractions, default=None)))
    for plan, musts in _OVER_BF16.items():
        speedups = results.speedups(plan)
        found += [Figure(f"{plan} bits over bf16, M {m}", must, speedups.get(m)) for m, must in musts.items()]
    for peer, musts in _OVER_PEERS.items():
        speedups = results.speedups("4", peer, "4")
        found += [Figure(f"4 bits over {peer}, M {m}", must, speedups.get(m)) for m, must in musts.items()]
    found.append(Figure("half at 4, half at 8 bits over their mean", 1.05, _mixing_cost(results), at_most=True))
    fused = results.cells("taq", "4+8+16")
    gains = [
        results.us(line) / results.us(fused[place])
        for place, line in results.cells("taq-one-by-one", "4+8+16").items()
        if place in fused and place[2] <= 16
    ]
    found.append(Figure("QKV at 4, 8 and 16 bits: three launches over one, M <= 16", 1.3, min(gains, default=None)))
    return found


def _mixing_cost(results: Results) -> float | None:
    """Time of `half` over what its rows take of the time of matrices of one bitwidth, the worst layer and M."""
    pure = {bits: results.cells("taq", str(bits)) for bits in (4, 8)}
    costs = []
    for place, line in results.cells("taq", "half").items():
        if all(place in cells for cells in pure.values()):
            parts = [rows / line["rows"] * results.us(pure[bits][place]) for bits, rows in line["matrices"]]
            costs.append(results.us(line) / sum(parts))
    return max(costs, default=None)


def _cpu_figures(results: Results) -> list[Figure]:
    found = []
    for plan, must in (("4", 3.2), ("8", 1.9)):
        over_bf16 = results.speedups(plan, "onednn")
        over_int4 = results.speedups(plan, "wna16", "4")
        over_best = {m: min(over_bf16[m], over_int4[m]) for m in over_bf16.keys() & over_int4.keys()}
        cells = results.cells("taq", plan)
        # Medians: now and then part of the floor's buffer is still in a large cache, and the fastest read is of that.
        at_one = [x["floor_fraction"] for (_, _, tokens), x in cells.items() if tokens == 1]
        errors = [line["relative_error"] / line["rounding_error"] for line in cells.values()]
        best = "vLLM's best (oneDNN bf16, wna16)"
        found += [
            Figure(f"{plan} bits over oneDNN bf16, M 1", must, over_bf16.get(1)),
            Figure(f"{plan} bits: share of the floor, M 1", 0.80, min(at_one, default=None)),
            Figure(f"{plan} bits over {best}, M 8", 1.8, over_best.get(8)),
            *(
                Figure(f"{plan} bits over {best}, worst M <= {most}", least, _worst(over_best, most))
                for most, least in ((32, 1.0), (1024, 0.9))
            ),
            Figure(f"{plan} bits: error over that of rounding y", 1.02, max(errors, default=None), at_most=True),
        ]
    return found


def _worst(speedups: Mapping[int, float], most_tokens: int) -> float | None:
    return min((speedup for tokens, speedup in speedups.items() if tokens <= most_tokens), default=None)


def table(results: Results, model: str) -> str:
    """A model's block as Markdown: by M the time in bf16, the speedups over it, and the share of the floor."""
    columns = [
        (name, plan)
        for name, plan in results.contenders()
        if any(results.block_us(model, tokens, name, plan) for tokens in results.tokens())
    ]
    head = ["M", "bf16, µs", *(f"{name} {plan}" for name, plan in columns), "taq 4: floor", "taq 8: floor"]
    text = [f"| {' | '.join(head)} |", "|" + "---:|" * len(head)]
    for tokens in results.tokens():
        if not (bf16 := results.bf16_us(model, tokens)):
            continue
        own = [results.block_us(model, tokens, *column) for column in columns]
        speedups = [f"{bf16 / us:.2f}x" if us else "-" for us in own]
        shares = [_floor_share(results, model, tokens, plan) for plan in ("4", "8")]
        text.append(f"| {tokens} | {bf16:.0f} | {' | '.join([*speedups, *shares])} |")
    return "\n".join(text)


def _floor_share(results: Results, model: str, tokens: int, plan: str) -> str:
    """The floors of a block's layers over their times."""
    lines = [line for place, line in results.cells("taq", plan).items() if (place[0], place[2]) == (model, tokens)]
    floor, own = (sum(line[time]["median"] for line in lines) for time in ("floor_us", "us"))
    return f"{floor / own:.0%}" if lines else "-"


def readme_section(lines: Sequence[Line]) -> str:
    """The tables of the models that are judged, and what must hold, for README.md."""
    parts = []
    for results in _by_threads(lines):
        where = results.where()
        for model in JUDGED[results.device]:
            if any(results.bf16_us(model, tokens) for tokens in results.tokens()):
                parts.append(f"{model}, {where}; all linears of a block, speedup over bf16:\n\n{table(results, model)}")
        sentences = [
            f"- {figure.verdict} {figure.what}: {figure.value:.2f} ({'at most' if figure.at_most else 'at least'} "
            f"{figure.must:g})"
            for figure in figures(results)
            if figure.value is not None
        ]
        parts.append("\n".join(sentences))
    return "\n\n".join(parts)


def report(lines: Sequence[Line]) -> str:
    """Tables of every model, what must hold, and what failed, as Markdown."""
    text = []
    for results in _by_threads(lines):
        own = [line for line in lines if line["threads"] == results.threads]
        versions = {line["contender"]: line["contender_version"] for line in own}
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        text.append(f"## {results.where()}\n\nCommit {own[0]['commit']}; {named}.")
        text += [f"### {model}: speedup over bf16\n\n{table(results, model)}" for model in results.models()]
        rows = [
            f"| {figure.what} | {'at most' if figure.at_most else 'at least'} {figure.must:g} | "
            f"{'-' if figure.value is None else f'{figure.value:.2f}'} | {figure.verdict} |"
            for figure in figures(results)
        ]
        text.append("\n".join(["### What must hold\n", "| | must be | is | |", "|---|---|---:|---|", *rows]))
    failed = [
        f"- {line['contender']} {line['plan']}, {line['model']} {line['layer']}, M {line['tokens']}: {line['failed']}"
        for line in lines
        if "failed" in line
    ]
    if failed:
        text.append("\n".join(["### Failed\n", *failed]))
    if missing := sorted({name for line in lines for name in line["not_installed"]}):
        text.append(f"Not installed where this was measured: {', '.join(missing)}.")
    return "\n\n".join(text) + "\n"


def _by_threads(lines: Sequence[Line]) -> list[Results]:
    return [Results(lines, threads) for threads in sorted({line["threads"] for line in lines})]


def plot(lines: Sequence[Line], path: Path) -> None:
    """Speedup over bf16 against M, one curve per contender; a panel per model and number of threads."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import ScalarFormatter

    panels = [(results, model) for results in _by_threads(lines) for model in results.models()]
    canvas = Canvas(figsize=(6 * len(panels), 5), layout="constrained")
    for place, (results, model) in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), place)
        for name, plan in results.contenders():
            points = [
                (tokens, bf16 / us)
                for tokens in results.tokens()
                if (bf16 := results.bf16_us(model, tokens)) and (us := results.block_us(model, tokens, name, plan))
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "-" if name == "taq" else "--", marker=".", label=f"{name} {plan}"
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(results.tokens())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set_xlabel("M, tokens")
        axes.set_ylabel("speedup over bf16")
        axes.set_title(f"{model}, {results.where()}")
        axes.legend(fontsize="small")
    canvas.savefig(path, dpi=120)


def main() -> None:
    """Measure and append lines, or make the report of lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", type=several(str), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--m", type=several(int), help="numbers of tokens, as 1,16,64")
    parser.add_argument("--bits", type=several(str), default=PLANS, help=f"plans, of {', '.join(PLANS)}")
    parser.add_argument("--contenders", type=several(str), default=(), help="only these")
    # One number a process: oneDNN keeps a product as it was made for the threads of its first call.
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; another number is another run")
    parser.add_argument("--out", type=Path, help="lines are appended")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no layer after so many")
    parser.add_argument("--cell-seconds", type=float, help="timing of one layer and M; the least is three rounds")
    parser.add_argument(
        "--tune", type=Path, metavar="FILE", help="only make the table of tuned launches, or continue it"
    )
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="only make the report of these lines")
    arguments = parser.parse_args()
    if arguments.report:
        lines = [json.loads(line) for file in arguments.report for line in file.read_text().splitlines()]
        plot(lines, arguments.report[0].with_suffix(".png"))
        print(report(lines))
        return
    if arguments.out is None and arguments.tune is None:
        parser.error("give --out FILE")
    on_gpu = arguments.device == "cuda"
    models = arguments.models or (tuple(name for name in MODELS if name != SQUARE) if on_gpu else JUDGED["cpu"])
    tokens = arguments.m or DEFAULT_TOKENS[arguments.device]
    names = {contender.name for contender in CONTENDERS}
    for given, known in ((models, MODELS), (arguments.bits, PLANS), (tokens, TOKENS), (arguments.contenders, names)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"got {unknown[0]!r}; there are {', '.join(map(str, known))}")
    if arguments.tune:
        layers = layers_to_tune(models, arguments.bits)
        device = torch.device(arguments.device)
        tune.tune(layers, device, tokens, arguments.tune, max_seconds=arguments.max_seconds, track=_narrated)
        return
    settings = Settings(
        arguments.device,
        arguments.bits,
        arguments.contenders,
        arguments.cell_seconds or CELL_SECONDS[arguments.device],
        time.monotonic() + arguments.max_seconds,
    )
    source = source_of(settings)
    if source["not_installed"]:
        print(f"not installed, so left out: {', '.join(source['not_installed'])}", file=sys.stderr)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as out:
        threads = 0 if on_gpu else arguments.threads
        for line in measure(groups(models, tokens, arguments.device), settings, source, threads):
            print(json.dumps(line), file=out, flush=True)
            said = f"{line['us']['median']:9.1f} us" if "us" in line else f"failed ({line['failed']})"
            cell = f"{line['model']} {line['layer']} M={line['tokens']} {line['contender']} {line['plan']}"
            print(f"{said}  {cell}", file=sys.stderr)


if __name__ == "__main__":
    main()
