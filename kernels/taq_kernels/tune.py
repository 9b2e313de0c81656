"""Finds the fastest launches for a model's layers on this device, and how long each matrix takes.

Two results, in one table (`tuned`). *Configurations*, on a GPU: for every layer and bucket of M each candidate of
`gemm.candidates` is launched inside a CUDA graph over copies of random weights that exceed the caches (`timing`). One
whose result is wrong, or that does not launch, is dropped; the fastest of the others is kept. Unpacking the weights for
the vendor's GEMM is a candidate too, so the crossover to it is found like everything else. *Latencies*, on any device:
microseconds of each layer as one matrix of 4, 8 and 16 bits by number of tokens, with the configurations found so far.

A CPU has nothing to choose: its table holds latencies, for the number of threads they were measured with. The table is
written after every result, and what it holds is not measured again: a run that was cut short continues.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taq_kernels import ops, reference, timing, tuned
from taq_kernels.tuned import ConfigEntry, LatencyEntry, Table, rows_by_bits

GROUP_SIZE = 128
SMALLEST_GROUP = 32
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""M that latencies are measured at unless others are asked for."""
LARGEST_ERROR = 1e-2
"""Relative RMS of what is timed, here and in benchmarks. Rounding y to bf16 is 1.7e-3, rounding the weights to bf16
before as much again, partial sums that are added up in bf16 (others' split K by atomics, up to 16) up to 4 times as
much; swapped codes or scales are an error near 1."""

# As in taq_vllm.units, which this package must not import: it is served without it.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_CUT_BY_COLUMNS = ("o_proj", "down_proj")
_VOCABULARY_STEP = 64  # vLLM pads a head that it cuts to a multiple of this
_HEAT_RUNS = 5
_FINALISTS = 4
_SECONDS = 1.0  # for one latency; on a CPU, a call at large M takes longer than it varies

Track = Callable[[Iterable["Task"], str, int], Iterable["Task"]]
"""(items, description, how many) to the same items, with a progress bar."""


@dataclass(frozen=True)
class Layer:
    """A fused linear as one rank holds it.

    Attributes:
        shapes: (bits, rows) of its matrices.
        columns: K.
        group_size: columns that share a scale.
    """

    shapes: tuple[tuple[int, int], ...]
    columns: int
    group_size: int

    @property
    def rows(self) -> int:
        """N."""
        return sum(rows for _, rows in self.shapes)


@dataclass(frozen=True)
class Task:
    """One entry of the table to come.

    Attributes:
        layer: whose time is measured; of one matrix for a latency.
        tokens: M; for a configuration its bucket.
        chooses: it is a configuration that is looked for.
    """

    layer: Layer
    tokens: int
    chooses: bool


@dataclass(frozen=True)
class Outcome:
    """What a run of `tune` did.

    Attributes:
        path: of the table.
        table: all that is known now.
        measured: entries that are new.
        kept: entries that were there.
        left: entries that there was no time for.
    """

    path: Path
    table: Table
    measured: int
    kept: int
    left: int


def layers_of(
    matrices: Mapping[str, tuple[int, int]],
    bits: Mapping[str, int],
    heads: tuple[int, int],
    tensor_parallel_size: int = 1,
) -> list[Layer]:
    """The different fused linears of a model, its head among them: in 4 and in 8 bits, and as a plan has them.

    Args:
        matrices: (N, K) of every planned matrix by its Hugging Face name.
        bits: what a plan gives each; a matrix that it does not name has 16.
        heads: numbers of attention heads and of key/value heads.
        tensor_parallel_size: ranks.

    Raises:
        ValueError: the ranks do not divide a matrix, or cut its groups into less than `SMALLEST_GROUP` columns.
    """
    fused: dict[str, list[str]] = {}
    for name in matrices:
        parent, _, last = name.rpartition(".")
        fused.setdefault(f"{parent}.{_FUSED.get(last, last)}", []).append(name)
    found: dict[Layer, None] = {}
    for names in fused.values():
        local = [_local_shape(name, matrices[name], heads, tensor_parallel_size) for name in names]
        columns = local[0][1]
        if matrices[names[0]][1] % GROUP_SIZE:
            # It stays at 16 bits in every plan: there is nothing to tune, but a time to know.
            found[Layer(((16, sum(rows for rows, _ in local)),), columns, GROUP_SIZE)] = None
            continue
        group_size = math.gcd(GROUP_SIZE, columns)
        if group_size < SMALLEST_GROUP:
            raise ValueError(
                f"{names[0]}: {tensor_parallel_size} ranks get {columns} columns each, which cuts groups of "
                f"{GROUP_SIZE} into pieces of {group_size}; choose another --tensor-parallel-size"
            )
        plans = [[4] * len(names), [8] * len(names)]
        if any(bits.get(name, 16) < 16 for name in names):
            plans.append([bits[name] for name in names])
        for plan in plans:
            shapes = tuple((width, rows) for width, (rows, _) in zip(plan, local, strict=True))
            found[Layer(rows_by_bits(shapes), columns, group_size)] = None
    return list(found)


def _local_shape(name: str, shape: tuple[int, int], heads: tuple[int, int], ranks: int) -> tuple[int, int]:
    """(N, K) of a rank's part, as vLLM cuts it: key/value heads are copied where there are more ranks than heads."""
    rows, columns = shape
    last = name.rpartition(".")[2]
    if last == "lm_head" and ranks > 1:
        rows = -(-rows // _VOCABULARY_STEP) * _VOCABULARY_STEP
    if last in _CUT_BY_COLUMNS:
        whole, parts = columns, [(columns, ranks)]
    elif last in ("k_proj", "v_proj"):
        whole, parts = rows, [(rows, min(ranks, heads[1]))]
    elif last == "qkv_proj":
        head = rows // (heads[0] + 2 * heads[1])
        whole, parts = rows, [(heads[0] * head, ranks), (2 * heads[1] * head, min(ranks, heads[1]))]
    else:
        whole, parts = rows, [(rows, ranks)]
    if any(length % count for length, count in parts):
        raise ValueError(f"{name}: {ranks} ranks do not divide {whole}; choose another --tensor-parallel-size")
    local = sum(length // count for length, count in parts)
    return (rows, local) if last in _CUT_BY_COLUMNS else (local, columns)


def tune(
    layers: Sequence[Layer],
    device: torch.device,
    tokens: Sequence[int],
    path: Path | None = None,
    *,
    force: bool = False,
    max_seconds: float = math.inf,
    track: Track = lambda items, description, total: items,
) -> Outcome:
    """Measure what the table does not hold yet, and write it.

    Args:
        layers: of a model.
        device: a GPU or the CPU.
        tokens: M of the latencies.
        path: of the table; by default where this machine's tables are looked up.
        force: measure everything again.
        max_seconds: begin nothing after so many.
        track: shows progress.

    Raises:
        ValueError: no such device, a table that is damaged or another device's, or one that cannot be written.
    """
    check_device(device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # graphs, streams and events are the current device's
    path = path or tuned.user_file(device_name(device))
    table = _table_at(path, device)
    todo = _tasks(layers, device, tokens)
    known = {entry.key for entry in (*table.configs, *table.latencies)}
    missing = [task for task in todo if force or _key(task, device) not in known]
    deadline = time.monotonic() + max_seconds
    weights = _Weights(device)
    ops.register()
    measured = 0
    for task in track(missing, "tune", len(missing)):
        if time.monotonic() > deadline:
            break
        entry = _choose(task, weights) if task.chooses else _time_latency(task, weights, table)
        table = table.with_entries(**{"configs" if task.chooses else "latencies": [entry]})
        table.save(path)
        measured += 1
    return Outcome(path, table, measured, len(todo) - len(missing), len(missing) - measured)


def check_device(device: torch.device) -> None:
    """Raises ValueError where there is no such device."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"got device {device}; there are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("got device cuda, but torch finds no GPU here; measure this machine with --device cpu")


def device_name(device: torch.device) -> str:
    """The name of the device's table."""
    return tuned.CPU if device.type == "cpu" else torch.cuda.get_device_name(device)


def _table_at(path: Path, device: torch.device) -> Table:
    """The table that a run continues; an empty one where there is none, or only one of another version."""
    if path.is_dir() or not _writable(path.parent):
        raise ValueError(f"cannot write a table to {path}; choose another output")
    empty = Table(device_name(device), tuned.kernel_version(device.type), _measured_with(device))
    if not path.exists():
        return empty
    table = Table.load(path)
    if table.device != empty.device:
        raise ValueError(f"{path} holds {table.device!r}, this is {empty.device!r}; choose another output")
    return replace(table, measured_with=empty.measured_with) if table.kernel == empty.kernel else empty


def _writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, which may have to be made first."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def _measured_with(device: torch.device) -> dict[str, str]:
    found = {"torch": torch.__version__, "machine": platform.machine()}
    if device.type == "cpu":
        return found | {"instructions": torch.backends.cpu.get_cpu_capability()}
    import triton

    return found | {"triton": triton.__version__, "cuda": str(torch.version.cuda)}


def _tasks(layers: Sequence[Layer], device: torch.device, tokens: Sequence[int]) -> list[Task]:
    """All entries, layer by layer: configurations before the latencies that use them."""
    tasks = []
    if device.type == "cuda":
        from taq_kernels import gemm

        tasks += [Task(layer, bucket, True) for layer in layers if _quantized(layer) for bucket in gemm.BUCKETS]
    singles = dict.fromkeys(
        Layer(((bits, layer.rows),), layer.columns, layer.group_size)
        for layer in layers
        for bits in ((4, 8, 16) if _quantized(layer) else (16,))
    )
    return tasks + [Task(layer, m, False) for layer in singles for m in tokens]


def _quantized(layer: Layer) -> bool:
    return any(bits < 16 for bits, _ in layer.shapes)


def _key(task: Task, device: torch.device) -> tuple:
    layer = task.layer
    if task.chooses:
        return layer.shapes, layer.columns, layer.group_size, task.tokens
    return layer.rows, layer.columns, layer.shapes[0][0], layer.group_size, task.tokens, _threads(device)


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 0


class _Weights:
    """Random weights of the layer at hand: the exact matrix, and copies of its operands that exceed the caches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layer: Layer | None = None
        self._dense: Tensor | None = None
        self._copies: list[ops.Operands] | list[Tensor] = []

    def of(self, layer: Layer) -> "_Weights":
        """Make them, unless they are this layer's already."""
        if layer != self._layer:
            self._dense, self._copies = None, []  # freed before the next are made
            self._layer = layer
            self._make(layer)
        return self

    def _make(self, layer: Layer) -> None:
        torch.manual_seed(0)
        dense, shards = [], []
        for bits, rows in layer.shapes:
            if bits == 16:
                weight = (torch.randn(rows, layer.columns, device=self.device) * layer.columns**-0.5).bfloat16()
                dense.append(weight.float())
                if len(layer.shapes) > 1:
                    shards.append(ops.pack_dense(weight, layer.group_size))
                continue
            codes, scale = timing.random_codes(bits, rows, layer.columns, layer.group_size, self.device)
            dense.append(reference.dequantize(codes, scale, None, bits, layer.group_size))
            shards.append(ops.pack(codes, scale, None, bits, layer.group_size))
        self._dense = torch.cat(dense)
        if shards:
            first = ops.join(shards)
            count = timing.copies_needed(first.weights.nbytes + first.scales.nbytes, self.device)
            self._copies = [deepcopy(first) for _ in range(count)]
        else:
            weight = self._dense.bfloat16()
            count = timing.copies_needed(weight.nbytes, self.device)
            self._copies = [self._vendor_weight(weight) for _ in range(count)]

    def _vendor_weight(self, weight: Tensor) -> Tensor:
        """A copy as the vendor's library wants it: on CPUs with oneDNN, in its own order, as vLLM keeps weights."""
        if self.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return weight.clone()

    def inputs(self, tokens: int) -> Tensor:
        """[tokens, K] bf16."""
        torch.manual_seed(tokens)
        return torch.randn(tokens, self._dense.shape[1], device=self.device).bfloat16()

    def products(self, x: Tensor, configs: Mapping[int, Any] | None = None) -> list[timing.Call]:
        """A call per copy; on a GPU with these configurations by bucket, if given."""
        launch = {}
        if configs:
            from taq_kernels import gemm

            layer, sms = self._layer, torch.cuda.get_device_properties(self.device).multi_processor_count
            built = gemm.build_tables(layer.shapes, layer.columns, layer.group_size, configs, sms)
            launch = {"tables": [table.to(self.device) for table in built.tables], "launches": built.launches}
        # Tables are copied too: a layer's are not in the caches either when its turn comes.
        return [self._product(x, copy, deepcopy(launch)) for copy in self._copies]

    def _product(self, x: Tensor, copy: ops.Operands | Tensor, launch: Mapping[str, Any]) -> timing.Call:
        if isinstance(copy, Tensor):
            if copy.is_mkldnn:
                return lambda: torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "")
            return lambda: torch.nn.functional.linear(x, copy)
        copy = replace(copy, **launch)
        arguments = [getattr(copy, field.name) for field in fields(copy)]
        return lambda: torch.ops.taq.linear(x, *arguments)

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raises ArithmeticError where y is not x times the weights."""
        expected = x.float() @ self._dense.t()
        error = ((y.float() - expected).norm() / expected.norm()).item()
        if not error <= LARGEST_ERROR:  # NaN too
            raise ArithmeticError(f"relative error {error:.3g}")


def _choose(task: Task, weights: _Weights) -> ConfigEntry:
    """The fastest candidate for a layer and bucket: a heat of all, then a final of the best."""
    from taq_kernels import gemm

    layer, bucket = task.layer, task.tokens
    x = weights.of(layer).inputs(bucket)
    properties = torch.cuda.get_device_properties(weights.device)
    asked = layer.shapes, layer.columns, 10 * properties.major + properties.minor, properties.multi_processor_count
    candidates = gemm.candidates(*asked, bucket)
    runners: dict[int, timing.Runner] = {}
    refused: list[str] = []
    for place, config in enumerate(candidates):
        try:
            runner = timing.make_runner(weights.products(x, {bucket: config}), weights.device)
            weights.check(x, runner.run())
            runners[place] = runner
        except Exception as error:  # too little shared memory, a compiler's failure, a wrong result: not a candidate
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises if the device is lost to this process: nothing after would be true
            refused.append(f"{config}: {error}")
    if not runners:
        raise ValueError(f"no configuration works for {layer} at M = {bucket}; the first: {refused[0]}")
    heat = timing.time_in_turns(runners, weights.device, runs=_HEAT_RUNS)
    finalists = sorted(heat, key=lambda place: heat[place].median)[:_FINALISTS]
    final = timing.time_in_turns({place: runners[place] for place in finalists}, weights.device)
    best = min(final, key=lambda place: final[place].median)
    us = round(final[best].median, 3)
    return ConfigEntry(layer.shapes, layer.columns, layer.group_size, bucket, asdict(candidates[best]), us)


def _time_latency(task: Task, weights: _Weights, table: Table) -> LatencyEntry:
    """Microseconds of one matrix at one M, with the configurations that the table has."""
    layer = task.layer
    [(bits, rows)] = layer.shapes
    x = weights.of(layer).inputs(task.tokens)
    configs = None
    if weights.device.type == "cuda" and bits < 16:
        from taq_kernels import gemm

        key = layer.shapes, layer.columns, layer.group_size
        configs = {e.bucket: gemm.Config(**e.config) for e in table.configs if e.key[:3] == key}
    runner = timing.make_runner(weights.products(x, configs), weights.device)
    weights.check(x, runner.run())
    times = timing.time_in_turns({"": runner}, weights.device, seconds=_SECONDS)[""]
    us = times.minimum if weights.device.type == "cpu" else times.median  # on a CPU, other work only ever adds
    threads = _threads(weights.device)
    return LatencyEntry(rows, layer.columns, bits, layer.group_size, task.tokens, threads, round(us, 3))
