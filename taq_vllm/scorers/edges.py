"""Baseline: the blocks nearest to either end of the model first."""

from pydantic import BaseModel, ConfigDict

from taq_vllm import units
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.units import HEAD, layer_of

READS = "weights"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = None


class Settings(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Blocks between a unit and the nearer end, negated; the head is at the end."""
    last = run.files.layers - 1
    return [
        UnitScore(unit=unit, score=0.0 if unit == HEAD else -float(min(layer_of(unit), last - layer_of(unit))))
        for unit in run.units
    ]
