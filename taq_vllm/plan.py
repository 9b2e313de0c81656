"""The plan: how many bits each weight matrix of a model gets for one task, and what that costs.

A plan is a file (`plan.json`) that a person can read, edit and diff. It is written by the allocators, read by
the quantizer and the vLLM plugin, and travels inside the checkpoint (`taq_plan.json`). Sizes are arithmetic on
shapes: nothing is ever quantized to learn how large it would be.

Two sizes matter and differ. *Disk*: what compressed-tensors' pack-quantized format stores: integer codes, one
16-bit scale per group of 128 input features, packed zero points where asymmetric. *Resident*: what the server
holds: one nibble plane (4 bits) or two (8 bits), each with a 16-bit scale and a 16-bit zero per group.

Source: arXiv 2511.06516, eq. 2 (budgeted precision assignment). This module needs neither torch nor vLLM.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from taq_vllm.units import Granularity, experts_of

BITS_MENU = (4, 8, 16)
"""What is written and served."""
STUDY_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
"""What a plan may name in studies with fake-quantized weights."""
SYMMETRIC = {bits: bits >= 8 for bits in STUDY_BITS}
"""Asymmetric codes pay for themselves below 8 bits; at 8 every GPU kernel in use wants symmetric ones."""
GROUP_SIZE = 128
PLAN_FILE = "taq_plan.json"

_BYTES_PER_PARAMETER = 2  # bf16 and fp16: scales, zero points at run time, and everything left in 16 bits
_WEIGHT_SHAPE_BYTES = 16  # compressed-tensors stores `weight_shape` as int64 [2]

Shape = tuple[int, int]


def weight_bytes(bits: int, shape: Shape, symmetric: bool, group_size: int = GROUP_SIZE) -> int:
    """Bytes of one matrix in the checkpoint.

    Args:
        bits: 2 to 8, or 16. What the format stores has 4, 8 or 16; others are counted as packed without gaps.
        shape: (N out-features, K in-features); K must be a multiple of `group_size` below 16 bits.
        symmetric: no zero points are stored.
        group_size: input features that share a scale.

    Returns:
        Codes, scales [N, K / group_size] in 16 bits, packed zero points, and the stored shape, in bytes.
    """
    rows, columns = shape
    if bits == 16:
        return rows * columns * _BYTES_PER_PARAMETER
    groups = columns // group_size
    code_bytes = rows * -(-columns * bits // 32) * 4
    scale_bytes = rows * groups * _BYTES_PER_PARAMETER
    zero_bytes = 0 if symmetric else -(-rows * bits // 32) * groups * 4
    return code_bytes + scale_bytes + zero_bytes + _WEIGHT_SHAPE_BYTES


def resident_bytes(bits: int, shape: Shape, symmetric: bool, group_size: int = GROUP_SIZE) -> int:
    """Bytes of one matrix in the server's memory: codes, a 16-bit scale a group, and a byte for its zero point.

    As the project's kernels hold it, but for rows padded to whole tiles, and zero points of a symmetric matrix that
    shares a layer with asymmetric ones. torch's int4 kernel, which serves where there is no compiler, has 4 bytes a
    group for scale and zero, and at 8 bits twice that.
    """
    rows, columns = shape
    if bits == 16:
        return rows * columns * _BYTES_PER_PARAMETER
    bytes_per_group = _BYTES_PER_PARAMETER + (0 if symmetric else 1)
    return rows * columns * bits // 8 + rows * (columns // group_size) * bytes_per_group


class Record(BaseModel):
    """What all parts of a file share: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRef(Record):
    """The model that a plan was made for."""

    id: str
    """Hub id, or the name of the local folder."""
    revision: str | None = None
    fingerprint: str
    """sha256 over names, shapes, dtypes and first bytes of all tensors: tells models apart, and proves no content."""


class TaskRef(Record):
    """The task whose examples the scores come from."""

    name: str
    data_sha256: str
    examples: int


class ScorerRef(Record):
    """How the scores were made."""

    name: str
    settings: dict[str, Any] = {}


class Allocation(Record):
    """How scores and budget became bits."""

    name: str
    granularity: Granularity = "layer"
    settings: dict[str, Any] = {}


class Budget(Record):
    """What was asked for and what was reached."""

    asked: str
    average_bits: float
    """Bits per planned weight, scales and zero points counted (`weight_bytes`)."""
    planned_bytes: int
    """Bytes on disk of the planned matrices."""
    disk_bytes: int
    """Bytes on disk of all tensors, what is left in 16 bits included (file headers are not)."""
    resident_bytes: int
    """Bytes of all weights in the server's memory."""
    latency_us: dict[int, float] | None = None
    """Of a decode step, by the batches that were asked for, by measured latencies; None if the budget was a size."""

    @classmethod
    def of(
        cls,
        asked: str,
        matrices: Mapping[str, "MatrixPlan"],
        other_bytes: int,
        latency_us: dict[int, float] | None = None,
    ) -> "Budget":
        """What matrices cost.

        Args:
            asked: the budget in the user's words.
            matrices: bits and shapes.
            other_bytes: of everything that is not planned.
            latency_us: of a decode step by batch, where it was measured.
        """
        planned = sum(m.disk_bytes for m in matrices.values())
        weights = sum(m.shape[0] * m.shape[1] for m in matrices.values() if not m.is_embedding)
        return cls(
            asked=asked,
            average_bits=8 * planned / weights,
            planned_bytes=planned,
            disk_bytes=planned + other_bytes,
            resident_bytes=sum(m.resident_bytes for m in matrices.values()) + other_bytes,
            latency_us=latency_us,
        )


class MatrixPlan(Record):
    """What one weight matrix gets, and why."""

    bits: int
    symmetric: bool
    shape: Shape
    """(N out-features, K in-features)."""
    why: Literal["score", "pinned", "edge", "baseline", "uniform", "shape"]
    """`baseline`: a scorer that reads no examples. `uniform`: all have the same bits, whatever their scores. `shape`:
    the in-features do not divide into groups of 128, so the matrix stays at 16 bits."""
    tied: bool = False
    """The head of a model whose embedding doubles as its head: at 16 bits it is the embedding itself and costs nothing,
    below that it is a copy of its own (the embedding stays)."""
    score: float | None = None
    """Of its unit."""
    rank: int | None = None
    """0 is the unit that needs precision most."""

    @field_validator("bits")
    @classmethod
    def _bits_in_menu(cls, bits: int) -> int:
        if bits not in STUDY_BITS:
            raise ValueError(f"got {bits} bits, allowed are {', '.join(map(str, STUDY_BITS))}")
        return bits

    @model_validator(mode="after")
    def _whole_groups(self) -> "MatrixPlan":
        rows, columns = self.shape
        if rows < 1 or columns < 1:
            raise ValueError(f"got shape {self.shape}, both sides must be positive")
        if self.bits < 16 and columns % GROUP_SIZE:
            raise ValueError(
                f"got {self.bits} bits for in-features {columns}, which {GROUP_SIZE} does not divide; "
                "such a matrix must stay at 16 bits"
            )
        return self

    @property
    def is_embedding(self) -> bool:
        """Whether this is the embedding itself, which is not planned."""
        return self.tied and self.bits == 16

    @property
    def disk_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return 0 if self.is_embedding else weight_bytes(self.bits, self.shape, self.symmetric)

    @property
    def resident_bytes(self) -> int:
        """Bytes in the server's memory."""
        return 0 if self.is_embedding else resident_bytes(self.bits, self.shape, self.symmetric)


class Plan(Record):
    """Bits for every planned weight matrix of one model, for one task."""

    version: Literal[1] = 1
    base_model: ModelRef
    task: TaskRef | None = None
    scorer: ScorerRef | None = None
    allocation: Allocation
    budget: Budget
    group_size: Literal[128] = GROUP_SIZE
    menu: tuple[int, ...] = BITS_MENU
    """The bitwidths that could be chosen, ascending. Only plans within `BITS_MENU` are written and served."""
    matrices: dict[str, MatrixPlan]
    """By Hugging Face module name, without `.weight`; `lm_head` only where the head was planned."""

    @field_validator("matrices")
    @classmethod
    def _not_empty(cls, matrices: dict[str, MatrixPlan]) -> dict[str, MatrixPlan]:
        if not matrices:
            raise ValueError("got no matrices; a plan names every weight matrix that it decides on")
        return matrices

    @model_validator(mode="after")
    def _bits_from_menu(self) -> "Plan":
        if self.menu != tuple(sorted(set(self.menu) & set(STUDY_BITS))) or not self.menu:
            raise ValueError(f"got menu {self.menu}, allowed are ascending bitwidths among {STUDY_BITS}")
        for name, matrix in self.matrices.items():
            if matrix.bits not in self.menu:
                allowed = ", ".join(map(str, self.menu))
                raise ValueError(f"matrices.{name}: got {matrix.bits} bits, allowed are {allowed} (the plan's menu)")
        return self

    @classmethod
    def from_json(cls, text: str, where: str) -> "Plan":
        """Parse a plan; `where` names the source in errors.

        Sizes are computed from the matrices again, so that a plan whose bits were edited by hand tells its own.

        Raises:
            ValueError: not JSON, an unknown or missing field, or a value that is not allowed.
        """
        try:
            return cls.model_validate_json(text)._with_sizes()
        except ValidationError as error:
            lines = [
                f"  {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()[:5]
            ]
            more = len(error.errors()) - len(lines)
            if more > 0:
                lines.append(f"  and {more} more")
            raise ValueError(
                f"{where} is not a valid plan:\n" + "\n".join(lines) + "\nMake one with `taq plan`, or mend the field."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read `plan.json`.

        Raises:
            ValueError: the file is missing or not a valid plan.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no plan at {path}: make one with `taq plan`")
        return cls.from_json(path.read_text(encoding="utf-8"), where=str(path))

    def _with_sizes(self) -> "Plan":
        """With the sizes of its matrices; a latency is no longer known once they have others."""
        asked, other_bytes = self.budget.asked, self.budget.disk_bytes - self.budget.planned_bytes
        budget = Budget.of(asked, self.matrices, other_bytes, self.budget.latency_us)
        if budget.planned_bytes != self.budget.planned_bytes:
            budget = Budget.of(asked, self.matrices, other_bytes)
        return self.model_copy(update={"budget": budget})

    def to_json(self) -> str:
        """Indented JSON, one matrix per line so that plans diff line by line."""
        record = self.model_dump(mode="json")
        matrices = record.pop("matrices")
        head = json.dumps(record, indent=2)[:-2]
        lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in matrices.items()]
        return head + ',\n  "matrices": {\n' + ",\n".join(lines) + "\n  }\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the plan; the file appears whole or not at all."""
        write_atomically(Path(path), self.to_json())

    def sha256(self) -> str:
        """Hash of the content, independent of spacing and key order."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def counts(self) -> dict[int, int]:
        """How many matrices have each bitwidth of the menu."""
        return {bits: sum(m.bits == bits for m in self.matrices.values()) for bits in self.menu}

    def check_served(self, where: str) -> None:
        """Refuse a plan of a study, whose bitwidths no checkpoint and no kernel has, and experts of several bitwidths.

        Raises:
            ValueError: a matrix has bits outside `BITS_MENU`, or the experts of a block have not all the same.
        """
        of_experts: dict[str, str] = {}
        for name, matrix in self.matrices.items():
            if matrix.bits not in BITS_MENU:
                raise ValueError(
                    f"{where}: {name} has {matrix.bits} bits, which can be studied but not written or served; served "
                    f"are {', '.join(map(str, BITS_MENU))}: make the plan with `taq plan --menu 4,8,16`"
                )
            experts = experts_of(name)
            form = f"{matrix.bits} bits, {'' if matrix.symmetric else 'a'}symmetric"
            if experts and of_experts.setdefault(experts, form) != form:
                raise ValueError(
                    f"{where}: {name} has {form}, and others of {experts} have {of_experts[experts]}; all experts of a "
                    "block have one format, in which one kernel runs them: give them the same, as with --pin "
                    "'re:.*experts.*=4'"
                )

    def check_fits(
        self,
        model: ModelRef,
        shapes: Mapping[str, Shape],
        head: Mapping[str, Shape] = MappingProxyType({}),
        where: str = "the plan",
    ) -> None:
        """Check that this plan is for this model and names exactly its matrices.

        Args:
            model: the model at hand.
            shapes: every matrix inside the model's blocks, by name, with its (N, K).
            head: the head, which a plan may name or not (`ModelFiles.head`).
            where: what to call the plan in errors.

        Raises:
            ValueError: another model, a matrix that does not exist, one that is missing, or another shape.
        """
        known = {**shapes, **head}
        unknown = [name for name in self.matrices if name not in known]
        missing = [name for name in shapes if name not in self.matrices]
        changed = [
            f"{name} is {known[name]} in the model and {m.shape} in the plan"
            for name, m in self.matrices.items()
            if name in known and tuple(known[name]) != m.shape
        ]
        next_step = f"Make a plan for {model.id} with `taq score` and `taq plan`."
        if unknown:
            raise ValueError(f"{where} names {_some(unknown)}, which {model.id} does not have. {next_step}")
        if missing:
            raise ValueError(f"{where} does not name {_some(missing)} of {model.id}. {next_step}")
        if changed:
            raise ValueError(f"{where} was made for other shapes: {_some(changed)}. {next_step}")
        if self.base_model.fingerprint != model.fingerprint:
            raise ValueError(
                f"{where} was made for {self.base_model.id} (fingerprint {self.base_model.fingerprint[:12]}), "
                f"but {model.id} has fingerprint {model.fingerprint[:12]}. {next_step}"
            )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that readers never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
