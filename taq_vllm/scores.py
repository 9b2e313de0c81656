"""Scores: what a scorer found about every layer of a model for one task (`scores.json`).

Every scorer writes the same file: one score per transformer block, higher means that the task needs more precision
there, with a standard error over the calibration examples wherever one can be had. Allocators read nothing else.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from taq_vllm.plan import ModelRef, ScorerRef, TaskRef, write_atomically


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerScore(_Record):
    """One layer's score."""

    layer: int
    score: float
    stderr: float | None = None
    """Standard error over calibration examples; None where the scorer reads no examples."""
    from_zero: bool = True
    """False: the score cannot be told from zero, and is ranked as zero."""
    tiebreak: float = 0.0
    """Orders layers whose scores are equal; higher needs more precision."""
    details: dict[str, float | bool] = {}
    """What the score was made of, by the scorer's own names."""


class Scores(_Record):
    """Every layer's score, and how it was made."""

    version: Literal[1] = 1
    model: ModelRef
    task: TaskRef | None
    scorer: ScorerRef
    layers: tuple[LayerScore, ...]
    seconds: float
    peak_memory_bytes: int
    """Highest resident memory of the process until then, libraries included; a GPU's memory is not in it."""

    @property
    def ranking(self) -> list[int]:
        """Layers, the one that needs precision most first.

        Noise is not ranked: scores that cannot be told from zero are equal. Equal scores go by the tiebreak, then the
        earlier layer comes first.
        """
        return [
            s.layer for s in sorted(self.layers, key=lambda s: (-s.score if s.from_zero else 0.0, -s.tiebreak, s.layer))
        ]

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

    def answers(self, model: ModelRef, task: TaskRef | None, scorer: str, settings: dict[str, Any]) -> bool:
        """Whether these scores are what such a run would give."""
        return (
            self.model.fingerprint == model.fingerprint
            and self.task == task
            and self.scorer == ScorerRef(name=scorer, settings=settings)
        )
