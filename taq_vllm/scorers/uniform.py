"""Baseline: every unit is as good as any other; ties are broken so that those that are protected lie spread out.

The order is van der Corput's sequence (1/2, 1/4, 3/4, 1/8, ...) over the model's units: any first few of them are
spread over its depth.
"""

from pydantic import BaseModel, ConfigDict

from taq_vllm import units
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run

READS = "weights"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = None


class Settings(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Zero for everyone; the tiebreak spreads."""
    order: dict[int, None] = {}
    number = 0
    while len(order) < len(run.units):
        number += 1
        order[int(_van_der_corput(number) * len(run.units))] = None
    places = {unit: place for place, unit in enumerate(order)}
    return [UnitScore(unit=unit, score=0.0, tiebreak=float(-places[i])) for i, unit in enumerate(run.units)]


def _van_der_corput(number: int) -> float:
    """The number's binary digits mirrored at the point: 1, 2, 3 to 1/2, 1/4, 3/4."""
    digits = f"{number:b}"
    return int(digits[::-1], 2) / 2 ** len(digits)
