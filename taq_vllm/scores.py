"""What a scorer found about the parts of a model for one task (`scores.json`).

Every scorer writes the same file: one score per unit (`units.py`), higher means that the task needs more precision
there, with a standard error over the calibration examples wherever one can be had. Scorers that measure what a bitwidth
costs also give that cost per bitwidth. Allocators read nothing else.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from taq_vllm import __version__
from taq_vllm.plan import ModelRef, Record, ScorerRef, TaskRef, write_atomically
from taq_vllm.units import Granularity

MADE_BY = f"taq-vllm {__version__}"
_FIRST_VERSION = "taq-vllm 0.1.0"


class UnitScore(Record):
    """One unit's score."""

    unit: str
    score: float
    stderr: float | None = None
    """Standard error over calibration examples; None where the scorer reads no examples."""
    from_zero: bool = True
    """False: the score cannot be told from zero, and is ranked as zero."""
    tiebreak: float = 0.0
    """Orders units whose scores are equal; higher needs more precision."""
    costs: dict[int, float] = Field(default_factory=dict)
    """What the unit alone at so many bits costs, in `Scores.cost_unit`; additive over units to first order. Bitwidths
    that were not measured are missing; 16 bits cost nothing."""
    cost_stderrs: dict[int, float] = Field(default_factory=dict)
    """Standard errors of `costs` over calibration examples."""
    details: dict[str, float | bool] = Field(default_factory=dict)
    """What the score was made of, by the scorer's own names."""

    @property
    def ranked(self) -> tuple[float, float]:
        """What units are ordered by, highest first: the score, 0 where it cannot be told from it, then the tiebreak."""
        return self.score if self.from_zero else 0.0, self.tiebreak


def ranking(units: Iterable[UnitScore]) -> list[str]:
    """Names of units, the one that needs precision most first; equal ones stay in the order given.

    Noise is not ranked: scores that cannot be told from zero are equal, and go by the tiebreak.
    """
    return [entry.unit for entry in sorted(units, key=lambda entry: entry.ranked, reverse=True)]


def defaults_for(cost_unit: str | None) -> tuple[str, Granularity]:
    """Allocation and granularity where none is asked for.

    Costs add up, so the exact knapsack can decide matrix by matrix; what only ranks orders layers.

    Args:
        cost_unit: of the scorer; None if it gives no costs.
    """
    return ("knapsack", "module") if cost_unit else ("monotone", "layer")


class Scores(Record):
    """Every unit's score, and how it was made."""

    version: Literal[2] = 2
    model: ModelRef
    task: TaskRef | None
    scorer: ScorerRef
    granularity: Granularity = "layer"
    cost_unit: str | None = None
    """Of `UnitScore.costs`, as `nats per answer token`; None where the scorer gives no costs."""
    units: tuple[UnitScore, ...]
    """In the model's order."""
    seconds: float
    peak_memory_bytes: int
    """Highest resident memory of the process until then, libraries included; a GPU's memory is not in it."""
    made_by: str = _FIRST_VERSION
    """Package and version: another one may score otherwise, and does not answer from this file."""

    @property
    def ranking(self) -> list[str]:
        """Units, the one that needs precision most first (`ranking`)."""
        return ranking(self.units)

    def save(self, path: str | Path) -> None:
        """Write `scores.json`; the file appears whole or not at all."""
        write_atomically(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read `scores.json`.

        Raises:
            ValueError: the file is missing or not valid.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no scores at {path}: make them with `taq score`")
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "file"
            raise ValueError(
                f"{path} is not a valid scores file: {where}: {first['msg']}; run `taq score` again"
            ) from error
