"""Tables of measured launch configurations and latencies: one JSON file per device, read when a layer is loaded.

A table holds what `taq_kernels.tune` measured on one device with one version of the kernels: for each layer (rows per
bitwidth, K, group size) and bucket of M the launch configuration that was fastest, and the microseconds that a matrix
takes by (N, K, bits, M), which latency budgets are made of, beside what a decode step takes for all else. Tables can
come with the package (`tuned/`); what `taq tune` wrote on this machine ($XDG_CACHE_HOME or ~/.cache,
`taq_kernels/tuned/`) wins over them, entry by entry.

Entries are only as good as the code they were measured with: a table of another version of the kernels is ignored,
with one warning. A file that is not a table, or not this device's, is an error. Needs neither torch nor triton.
"""

import ast
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from taq_kernels.cpu_build import cache_folder

VERSION = 1
PACKAGED = Path(__file__).parent / "tuned"
CPU = "cpu"
"""The device name of tables that were measured on a processor; each machine has its own."""

_SOURCES = {"cuda": ("gemm.py", "packing.py"), CPU: ("cpu.py", "lowbit.cpp", "lowbit_isa.h")}
_logger = logging.getLogger(__name__)

Shapes = Sequence[tuple[int, int]]
"""(bits, rows) of the matrices of a layer."""


@dataclass(frozen=True)
class ConfigEntry:
    """The fastest launch of one layer for one range of M.

    Attributes:
        rows: (bits, rows) with every bitwidth once, ascending: where a bitwidth's rows lie does not change the time.
        columns: K.
        group_size: columns that share a scale.
        bucket: the largest M that it is for.
        config: the fields of the kernel's configuration.
        us: microseconds of one launch at M = bucket.
    """

    rows: tuple[tuple[int, int], ...]
    columns: int
    group_size: int
    bucket: int
    config: Mapping[str, int | bool]
    us: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two entries answers to one question."""
        return self.rows, self.columns, self.group_size, self.bucket


@dataclass(frozen=True)
class LatencyEntry:
    """What one matrix takes.

    Attributes:
        rows: N.
        columns: K.
        bits: 4, 8 or 16.
        group_size: columns that share a scale; of no meaning for 16 bits.
        tokens: M.
        threads: that computed it on a CPU; 0 on a GPU.
        us: microseconds of one call.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    tokens: int
    threads: int
    us: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two entries answers to one question."""
        return self.rows, self.columns, self.bits, self.group_size, self.tokens, self.threads


@dataclass(frozen=True)
class StepEntry:
    """What a decode step takes beside its matrices: attention, norms, sampling, the engine itself.

    Attributes:
        model: fingerprint of the shapes of a model's matrices, as its planner makes it.
        tokens: M, sequences in the batch.
        threads: that computed it on a CPU; 0 on a GPU.
        us: microseconds of a step of the 16-bit model without the 16-bit latencies of its matrices and head; 0 where
            the engine overlaps more than there is to add.
        step_us: microseconds of the whole step.
    """

    model: str
    tokens: int
    threads: int
    us: float
    step_us: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two entries answers to one question."""
        return self.model, self.tokens, self.threads


Entry = TypeVar("Entry", ConfigEntry, LatencyEntry, StepEntry)


@dataclass(frozen=True)
class Table:
    """What was measured on one device.

    Attributes:
        device: the GPU's name as torch says it, or `CPU`.
        kernel: `kernel_version` of the code that was measured.
        measured_with: versions and hardware, for people.
        configs: of launches; none on a CPU, whose kernel has nothing to choose.
        latencies: of single matrices.
        steps: of what a decode step has beside them; tables that were written before there were any lack the field.
    """

    device: str
    kernel: str
    measured_with: Mapping[str, str]
    configs: tuple[ConfigEntry, ...] = ()
    latencies: tuple[LatencyEntry, ...] = ()
    steps: tuple[StepEntry, ...] = ()

    def with_entries(
        self,
        configs: Iterable[ConfigEntry] = (),
        latencies: Iterable[LatencyEntry] = (),
        steps: Iterable[StepEntry] = (),
    ) -> "Table":
        """This table where entries of the same key are replaced and others added."""
        return replace(
            self,
            configs=_merge(self.configs, configs),
            latencies=_merge(self.latencies, latencies),
            steps=_merge(self.steps, steps),
        )

    def to_json(self) -> str:
        """JSON with an entry per line, so that tables diff line by line."""
        head = {"version": VERSION, "device": self.device, "kernel": self.kernel}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        lines.append(f'  "measured_with": {json.dumps(dict(self.measured_with))}')
        for name, entries in (("configs", self.configs), ("latencies", self.latencies), ("steps", self.steps)):
            rows = ",\n".join(f"    {json.dumps(asdict(entry))}" for entry in sorted(entries, key=lambda e: e.key))
            lines.append(f'  "{name}": [\n{rows}\n  ]' if rows else f'  "{name}": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: Path) -> None:
        """Write the table; the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(self.to_json(), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _tables.cache_clear()

    @classmethod
    def load(cls, path: Path) -> "Table":
        """Read a table, whatever version of the kernels it is of.

        Raises:
            ValueError: not JSON, another version of the format, or fields missing, unknown or of a wrong type.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error}). {_REMEDY}") from error
        if not isinstance(record, dict) or record.pop("version", None) != VERSION:
            raise ValueError(f"{path} is not a table of version {VERSION}. {_REMEDY}")
        record.setdefault("steps", [])
        _check_fields(cls, record, str(path))
        entries = {
            name: tuple(_entry(kind, item, f"{path}: {name}[{place}]") for place, item in enumerate(record.pop(name)))
            for name, kind in (("configs", ConfigEntry), ("latencies", LatencyEntry), ("steps", StepEntry))
        }
        return cls(**record, **entries)


_REMEDY = "Delete it, or make a new one with `taq tune`."
_TYPES: Mapping[str, tuple[type, ...]] = {
    "rows": (int, list),
    "config": (dict,),
    "us": (float, int),
    "step_us": (float, int),
    "model": (str,),
    "device": (str,),
    "kernel": (str,),
    "measured_with": (dict,),
    "configs": (list,),
    "latencies": (list,),
    "steps": (list,),
}
"""Of fields in JSON; all others are whole numbers."""


def _check_fields(kind: type, record: Any, where: str) -> None:
    names = [field.name for field in fields(kind)]
    if not isinstance(record, dict) or set(record) != set(names):
        got = sorted(record) if isinstance(record, dict) else repr(record)
        raise ValueError(f"{where} needs exactly the fields {sorted(names)}, got {got}. {_REMEDY}")
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, _TYPES.get(name, (int,))):
            raise ValueError(f"{where}: {name} is {value!r}. {_REMEDY}")


def _entry(kind: type[Entry], record: Any, where: str) -> Entry:
    """One line of a table."""
    _check_fields(kind, record, where)
    numbers = [value for name, value in record.items() if name not in ("rows", "config", "threads")]
    if kind is ConfigEntry:
        rows, config = record["rows"], record["config"]
        whole = isinstance(rows, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair) for pair in rows
        )
        if not whole or not rows or rows != sorted(rows) or len({bits for bits, _ in rows}) != len(rows):
            raise ValueError(f"{where}: rows is {rows!r}, needed are [bits, rows] with ascending bits. {_REMEDY}")
        if not all(isinstance(value, int) for value in config.values()):
            raise ValueError(f"{where}: config is {config!r}, needed are whole numbers. {_REMEDY}")
        numbers += [value for pair in rows for value in pair]
        record = record | {"rows": tuple(map(tuple, rows))}
    elif kind is StepEntry:
        numbers = [record["tokens"], record["step_us"]]
        if not 0 <= record["us"] <= record["step_us"]:
            raise ValueError(f"{where}: us is {record['us']!r}, needed is 0 to step_us. {_REMEDY}")
    elif isinstance(record["rows"], list):
        raise ValueError(f"{where}: rows is {record['rows']!r}, needed is one number. {_REMEDY}")
    if min(numbers) <= 0:
        raise ValueError(f"{where} has a number that is not positive: {record}. {_REMEDY}")
    return kind(**record)


def _merge(old: tuple[Entry, ...], new: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(({entry.key: entry for entry in old} | {entry.key: entry for entry in new}).values())


def rows_by_bits(shapes: Shapes) -> tuple[tuple[int, int], ...]:
    """(bits, rows) of a layer with every bitwidth once, ascending."""
    return tuple((bits, sum(rows for b, rows in shapes if b == bits)) for bits in sorted({bits for bits, _ in shapes}))


@cache
def kernel_version(kind: str) -> str:
    """Fingerprint of the code that measurements are of; comments, docstrings and empty lines of Python do not count.

    Args:
        kind: "cuda" or "cpu".
    """
    digest = hashlib.sha256()
    for name in _SOURCES[kind]:
        source = (Path(__file__).parent / name).read_text(encoding="utf-8")
        digest.update((_code_alone(source) if name.endswith(".py") else source).encode())
    return digest.hexdigest()[:16]


def _code_alone(source: str) -> str:
    """The lines of a module as they stand, without comments, docstrings and empty lines: what all Pythons agree on."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def fingerprint() -> str:
    """Of all that decides how a GPU's product is launched: the kernel's code, and every table that may be looked up.

    Compiled graphs hold launches, so what was compiled under another fingerprint must not be used again. Read anew
    with each call; tables that are damaged or of other kernels count as they are.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(kernel_version("cuda").encode())
    for folder in (PACKAGED, user_file(CPU).parent):
        names: list[str] = []
        with contextlib.suppress(OSError):  # no such folder, or none to be looked into
            names = sorted(os.listdir(folder))
        for name in names:
            if name.endswith(".json") and name != file_name(CPU) and os.path.isfile(folder / name):
                table = (folder / name).read_bytes()
                # With lengths, so that bytes cannot wander from one table to the next.
                digest.update(f"\n{name} {len(table)}\n".encode() + table)
    return digest.hexdigest()


def file_name(device: str) -> str:
    """The name of a device's table: `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_file(device: str) -> Path:
    """Where `taq tune` writes and tables of this machine are looked up; without a home, among the packaged ones."""
    try:
        return cache_folder() / "tuned" / file_name(device)
    except OSError:
        return PACKAGED / file_name(device)


def configs_for(
    gpu_name: str, shapes: Shapes, columns: int, group_size: int
) -> dict[int, dict[str, int | bool]] | None:
    """Launch configurations that were measured for a layer.

    A mixture of bitwidths that was not measured is given what was measured for all its rows at the widest of its
    quantized bitwidths: its work per row lies between that and the narrowest.

    Args:
        gpu_name: as `torch.cuda.get_device_name` says it.
        shapes: (bits, rows) of the layer's matrices, in any order.
        columns: K.
        group_size: columns that share a scale.

    Returns:
        Fields of a configuration by bucket, for all buckets that were measured; None if there are none.

    Raises:
        ValueError: the device's table is damaged.
    """
    rows = rows_by_bits(shapes)
    widest = max((bits for bits, _ in rows if bits < 16), default=16)
    alike = ((widest, sum(count for _, count in rows)),)
    found: dict[int, dict[str, int | bool]] = {}
    for wanted in (alike, rows):  # the later overwrites
        for entry in _tables(gpu_name, user_file(gpu_name), "cuda").configs:
            if (entry.rows, entry.columns, entry.group_size) == (wanted, columns, group_size):
                found[entry.bucket] = dict(entry.config)
    return found or None


def table_for(device: str) -> Table:
    """All that was measured on a device with these kernels: the packaged table with this machine's own over it.

    Args:
        device: a GPU's name, or `CPU`.

    Raises:
        ValueError: the device's table is damaged.
    """
    return _tables(device, user_file(device), CPU if device == CPU else "cuda")


@cache
def _tables(device: str, user: Path, kind: str) -> Table:
    """The packaged table with the user's entries over it; the user's file is an argument so that tests can move it."""
    merged = Table(device, kernel_version(kind), {})
    for path in (PACKAGED / file_name(device), user):
        if not os.path.isfile(path):  # unlike Path's, False where the folder must not be looked into
            continue
        table = Table.load(path)
        if table.device != device:
            raise ValueError(f"{path} was measured on {table.device!r}, this is {device!r}. {_REMEDY}")
        if table.kernel != merged.kernel:
            _logger.warning("%s was measured with another version of the kernels: not used. Run `taq tune`.", path)
            continue
        merged = merged.with_entries(table.configs, table.latencies, table.steps)
    return merged
