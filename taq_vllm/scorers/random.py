"""Baseline: a random order, seeded. A scorer that does not beat it has shown nothing."""

import random

from pydantic import BaseModel, ConfigDict

from taq_vllm import units
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run

READS = "weights"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = None


class Settings(BaseModel):
    """Which order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Every unit's place in a shuffled order, negated."""
    order = list(run.units)
    random.Random(settings.seed).shuffle(order)
    return [UnitScore(unit=unit, score=float(-order.index(unit))) for unit in run.units]
