"""Baseline: every unit is as good as any other, so ties decide, and the earlier unit comes first."""

from pydantic import BaseModel, ConfigDict

from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.units import GRANULARITIES  # noqa: F401

READS = "weights"
COST_UNIT = None


class Settings(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Zero for everyone."""
    return [UnitScore(unit=unit, score=0.0) for unit in run.units]
