"""Budgets: what a plan may cost, in bits, bytes or milliseconds, as whole numbers that are added up and never exceeded.

- `5.0bits`: average over planned weights, scales and zero points counted. The head counts where it is planned; a tied
  head that stays at 16 bits is the embedding, and counts neither as bytes nor as weights.
- `4.2GiB` (B, kB, MB, GB, KiB, MiB, GiB): all tensors on disk, embeddings and norms included.
- `9ms@batch=16`: one decode step of so many sequences on one device, as `taq tune` measured it there. The sum over the
  planned matrices of the table's microseconds by (N, K, bits, M), plus what is not planned: the head in 16 bits, and
  the rest of a step (attention, norms, sampling, Python), which `taq tune --step` measures with vLLM itself, at
  contexts of 16 to 48 tokens: what attention over longer ones takes is not in it.

`5bits,9ms@batch=16` is both at once. Layers that are served as one matrix (q, k, v; gate, up) are in the table as one
matrix, for they are one launch: each part counts by its share of the rows, so that layers of one bitwidth cost what was
measured, and mixed ones a mean. One launch after the other: what a GPU overlaps is not credited. One rank only.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import BITS_MENU, GROUP_SIZE, MatrixPlan, Plan, Shape, weight_bytes
from taq_vllm.units import HEAD, experts_of, units_of

if TYPE_CHECKING:
    from taq_kernels.tuned import Table

BYTE_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

_LIMIT = re.compile(
    rf"^\s*([0-9]*\.?[0-9]+)\s*(?:(bits|{'|'.join(BYTE_UNITS)})|ms\s*@\s*batch\s*=\s*([1-9][0-9]*))\s*$"
)
_PS_PER_MS = 10**9
_PS_PER_US = 10**6


@dataclass(frozen=True)
class Limit:
    """One amount that a plan must not exceed.

    Attributes:
        text: as it was written, without spaces and trailing zeros: one text for one limit.
        amount: of `unit`.
        unit: `bits`, one of `BYTE_UNITS`, or `ms`.
        batch: sequences per decode step, M; of `ms` only.
    """

    text: str
    amount: Fraction
    unit: str
    batch: int | None = None


def parse_budget(budget: str) -> tuple[Limit, ...]:
    """The limits of a budget, all of which must hold.

    Raises:
        ValueError: not a number with a known unit.
    """
    limits = []
    for part in budget.split(","):
        match = _LIMIT.match(part)
        if not match:
            raise ValueError(
                f"got budget {budget!r}; write it as 5.0bits, in bytes as 4.2GiB (units: {', '.join(BYTE_UNITS)}), or "
                "as a decode step's time: 9ms@batch=16. Several that must all hold are separated by commas"
            )
        amount, unit, batch = match.groups()
        text = f"{Decimal(amount).normalize():f}{unit or f'ms@batch={batch}'}"
        limits.append(Limit(text, Fraction(amount), unit or "ms", int(batch) if batch else None))
    return tuple(limits)


@dataclass(frozen=True)
class Shapes:
    """What a budget is spent on.

    Attributes:
        model: its id.
        matrices: (N, K) of every planned matrix; the head is among them where it is planned.
        head: (V, d) of the model's head under its name, planned or not.
        tied: the embedding doubles as the head.
        other_bytes: of all tensors that are not planned.
    """

    model: str
    matrices: Mapping[str, Shape]
    head: Mapping[str, Shape]
    tied: bool
    other_bytes: int

    @classmethod
    def of_files(cls, files: ModelFiles, head: bool) -> "Shapes":
        """A model's, where the head is planned or not.

        Raises:
            ValueError: the head is to be planned and there is none.
        """
        if head and not files.head:
            raise ValueError(f"{files.id} has neither {HEAD} nor an embedding that could double as one")
        matrices = {**files.matrices, **(files.head if head else {})}
        return cls(files.id, matrices, files.head, files.tied, files.bytes_beside(matrices))

    @classmethod
    def of_plan(cls, plan: Plan) -> "Shapes":
        """A plan's; a head that it does not plan is not known."""
        matrices = {name: matrix.shape for name, matrix in plan.matrices.items()}
        head = {HEAD: matrices[HEAD]} if HEAD in matrices else {}
        tied = HEAD in matrices and plan.matrices[HEAD].tied
        return cls(plan.base_model.id, matrices, head, tied, plan.budget.disk_bytes - plan.budget.planned_bytes)

    def is_tied_head(self, name: str) -> bool:
        """Whether a matrix is the embedding too, as long as it stays at 16 bits."""
        return self.tied and name == HEAD


@dataclass(frozen=True)
class Latencies:
    """What was measured on one device.

    Attributes:
        source: where it was found, for messages.
        device: the GPU's name, or `cpu`.
        threads: on a CPU; 0 on a GPU.
        us: microseconds by (N, K, bits, M).
        steps: microseconds of the rest of a decode step by (`model_shape`, M).
        fixed_ms: given instead of `steps`.
    """

    source: str
    device: str
    threads: int
    us: Mapping[tuple[int, int, int, int], float]
    steps: Mapping[tuple[str, int], float]
    fixed_ms: float | None = None

    @classmethod
    def of_table(
        cls, table: "Table", source: str, threads: int | None = None, fixed_ms: float | None = None
    ) -> "Latencies":
        """A table's entries for one number of threads.

        Raises:
            ValueError: a CPU's table for several numbers of threads, none of which is chosen, or not for this one.
        """
        found = sorted({entry.threads for entry in table.latencies})
        if not found:
            raise ValueError(f"{source} holds no latencies: run `taq tune MODEL` on {table.device}")
        if threads is None and len(found) > 1:
            raise ValueError(f"{source} has latencies for {_list(found)} threads: choose with --threads")
        if threads is not None and threads not in found:
            raise ValueError(f"{source} has latencies for {_list(found)} threads, not for {threads}")
        chosen = found[0] if threads is None else threads
        return cls(
            source,
            table.device,
            chosen,
            {
                (e.rows, e.columns, e.bits, e.tokens): e.us
                for e in table.latencies
                if e.threads == chosen and e.group_size == GROUP_SIZE
            },
            {(e.model, e.tokens): e.us for e in table.steps if e.threads == chosen},
            fixed_ms,
        )

    def matrix_us(self, shape: Shape, bits: int, batch: int) -> float:
        """One launch.

        Raises:
            ValueError: it was not measured; the message says what was.
        """
        key = (*shape, bits, batch)
        if bits not in BITS_MENU:
            raise ValueError(
                f"a budget in ms needs measured latencies, and `taq tune` measures {_list(list(BITS_MENU))} bits, not "
                f"{bits}: choose --menu {','.join(map(str, BITS_MENU))}, or a budget in bits or bytes"
            )
        if key not in self.us:
            counts = sorted({m for rows, columns, width, m in self.us if (rows, columns, width) == key[:3]})
            known = f"for this matrix it has batch {_list(counts)}" if counts else "it has no such matrix"
            raise ValueError(
                f"{self.source} has no latency of a {shape[0]} x {shape[1]} matrix in {bits} bits at batch {batch} on "
                f"{self.device}; {known}. Run `taq tune MODEL --m {batch}` there"
            )
        return self.us[key]

    def rest_us(self, model: str, batch: int) -> float:
        """What a decode step takes beside its matrices and its head.

        Raises:
            ValueError: it was not measured and not given.
        """
        if self.fixed_ms is not None:
            return 1000 * self.fixed_ms
        if (model, batch) not in self.steps:
            raise ValueError(
                f"{self.source} does not say what a decode step of this model takes beside its matrices at batch "
                f"{batch} on {self.device}: run `taq tune MODEL --step --m {batch}` there, or give it with --fixed-ms"
            )
        return self.steps[model, batch]


def load_latencies(
    file: Path | None, device: str, threads: int | None = None, fixed_ms: float | None = None
) -> Latencies:
    """The measurements of the device that a plan is made for.

    Args:
        file: a table that `taq tune` wrote; None for this machine's own and the packaged ones.
        device: the GPU's name as torch says it, or `cpu`.
        threads: on a CPU, if the table has several.
        fixed_ms: milliseconds of the rest of a step, instead of a measured one.

    Raises:
        ValueError: no table, a damaged one, one of another device, or one of other kernels.
    """
    from taq_kernels import tuned

    kind = tuned.CPU if device == tuned.CPU else "cuda"
    if file is None:
        table = tuned.table_for(device)
        if not table.latencies:
            raise ValueError(
                f"a budget in ms needs latencies measured on {device}, and there is no table of them: run `taq tune "
                "MODEL --step` there, and give its file with --device-table if it was another machine"
            )
        return Latencies.of_table(table, f"the table of {device}", threads, fixed_ms)
    if not file.is_file():
        raise ValueError(f"no table at {file}: make one with `taq tune MODEL --step -o {file}`")
    table = tuned.Table.load(file)
    if table.device != device:
        raise ValueError(
            f"{file} was measured on {table.device!r}, and the plan is for {device!r}: measure that with `taq tune`, "
            f"or say with --for-device {table.device!r} that the plan is for the other"
        )
    if table.kernel != tuned.kernel_version(kind):
        raise ValueError(f"{file} was measured with another version of the kernels: run `taq tune` on {device} again")
    return Latencies.of_table(table, str(file), threads, fixed_ms)


def this_device() -> str:
    """The name under which this machine's tables are kept: its first GPU's, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def model_shape(matrices: Mapping[str, Shape], head: Mapping[str, Shape]) -> str:
    """16 hexadecimal digits that models have in common whose layers have the same shapes.

    Args:
        matrices: (N, K) of every matrix inside the blocks.
        head: (V, d) under its name.
    """
    canonical = json.dumps([sorted((name, *shape) for name, shape in {**matrices, **head}.items())])
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def step_rest_us(latencies: Latencies, shapes: Shapes, step_us: float, batch: int) -> float:
    """What is left of a measured decode step of the 16-bit model without its matrices and its head.

    It is below 0 where the engine overlaps them.

    Raises:
        ValueError: a matrix was not measured.
    """
    blocks = {name: shape for name, shape in shapes.matrices.items() if name != HEAD}
    fused = [
        (sum(blocks[name][0] for name in names), blocks[names[0]][1]) for names in units_of(blocks, "fused").values()
    ]
    return step_us - sum(latencies.matrix_us(s, 16, batch) for s in [*fused, *shapes.head.values()])


class Meter:
    """What each matrix uses of each limit at each bitwidth, in whole numbers, and how much there is.

    Attributes:
        limits: of the budget.
        available: what the planned matrices may use of each: bytes, or picoseconds.
        weights: planned weights, a tied head's included.
    """

    def __init__(
        self, shapes: Shapes, limits: tuple[Limit, ...], symmetric: Mapping[int, bool], latencies: Latencies | None
    ) -> None:
        """Raises ValueError for a limit in ms without measurements."""
        self._shapes, self._symmetric, self._latencies = shapes, symmetric, latencies
        self.limits = limits
        self.weights = sum(rows * columns for rows, columns in shapes.matrices.values())
        tied = [rows * columns for name, (rows, columns) in shapes.matrices.items() if shapes.is_tied_head(name)]
        self._embedding_weights = sum(tied)
        blocks = [name for name in shapes.matrices if name != HEAD]
        self._fused_rows = {
            name: sum(shapes.matrices[part][0] for part in parts)
            for parts in units_of(blocks, "fused").values()
            for name in parts
        }
        self.available = tuple(map(self._available, limits))

    def disk_bytes(self, name: str, bits: int) -> int:
        """Of a matrix; 0 for a tied head at 16 bits."""
        if bits == 16 and self._shapes.is_tied_head(name):
            return 0
        return weight_bytes(bits, self._shapes.matrices[name], self._symmetric[bits])

    def use(self, name: str, bits: int, limit: Limit) -> int:
        """What a matrix uses of a limit."""
        if limit.unit == "ms":
            return self._picoseconds(name, bits, limit.batch)
        if limit.unit == "bits" and bits == 16 and self._shapes.is_tied_head(name):
            # It leaves the average, and takes along the bytes that its weights would have brought.
            return self._bytes_allowed(limit, self.weights) - self._bytes_allowed(
                limit, self.weights - self._embedding_weights
            )
        return self.disk_bytes(name, bits)

    def fixed_picoseconds(self, batch: int) -> int:
        """Of a decode step: all that is not planned."""
        latencies, shapes = self._measured(), self._shapes
        blocks = {name: shape for name, shape in shapes.matrices.items() if name != HEAD}
        fixed = latencies.rest_us(model_shape(blocks, shapes.head), batch)
        if HEAD not in shapes.matrices:
            fixed += sum(latencies.matrix_us(shape, 16, batch) for shape in shapes.head.values())
        return math.ceil(fixed * _PS_PER_US)

    def latency_us(self, matrices: Mapping[str, MatrixPlan]) -> dict[int, float] | None:
        """Of a decode step, by the batch of every limit in ms; None without one."""
        latencies = {}
        for batch in (limit.batch for limit in self.limits if limit.unit == "ms"):
            planned = sum(self._picoseconds(name, matrix.bits, batch) for name, matrix in matrices.items())
            latencies[batch] = (planned + self.fixed_picoseconds(batch)) / _PS_PER_US
        return latencies or None

    def describe(self, limit: Limit, used: int, disk_bytes: int, weights: int) -> str:
        """A plan's size as budgets that it just meets, of the limit's kind; rounded up, so that they can be asked for.

        Args:
            limit: whose kind is wanted.
            used: of this limit by the planned matrices.
            disk_bytes: of the planned matrices.
            weights: planned weights that count.
        """
        if limit.unit == "ms":
            total = used + self.fixed_picoseconds(limit.batch)
            return f"{math.ceil(Fraction(1000 * total, _PS_PER_MS)) / 1000:.3f}ms@batch={limit.batch}"
        average = -(-8000 * disk_bytes // weights) / 1000 if weights else 0.0
        return f"{average:.3f}bits or {disk_bytes + self._shapes.other_bytes}B"

    def _available(self, limit: Limit) -> int:
        if limit.unit == "ms":
            return math.floor(limit.amount * _PS_PER_MS) - self.fixed_picoseconds(limit.batch)
        if limit.unit == "bits":
            return self._bytes_allowed(limit, self.weights)
        return math.floor(limit.amount * BYTE_UNITS[limit.unit]) - self._shapes.other_bytes

    def _bytes_allowed(self, limit: Limit, weights: int) -> int:
        return math.floor(limit.amount * weights / 8)

    def _measured(self) -> Latencies:
        if any(map(experts_of, self._shapes.matrices)):
            raise ValueError(
                "a budget in ms counts every matrix in every step, but a mixture's experts run only where tokens are "
                "sent to them: give a budget in bits or bytes"
            )
        if self._latencies is None:
            raise ValueError("a budget in ms needs measured latencies: run `taq tune MODEL --step` on the device")
        return self._latencies

    def _picoseconds(self, name: str, bits: int, batch: int) -> int:
        rows, columns = self._shapes.matrices[name]
        launched = self._fused_rows.get(name, rows)
        us = self._measured().matrix_us((launched, columns), bits, batch)
        return math.ceil(Fraction(us) * _PS_PER_US * rows / launched)


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
