"""Baseline: how much of each weight matrix rounding destroys. Reads no data, so it knows nothing of the task.

    cost_b(unit) = sum over its matrices of ||W - Q_b(W)||^2 / ||W||^2

with Q_b round to nearest in groups of 128 (`quantizer.quantize`). Every matrix counts the same, however many weights it
has, so costs are additive and the same at every granularity; what a byte spent there would gain is the allocator's
question. The score is the cost at the lowest of the bitwidths. One matrix is in memory at a time.
"""

import torch
from pydantic import BaseModel, ConfigDict, field_validator

from taq_vllm import units
from taq_vllm.model_files import ModelFiles
from taq_vllm.progress import track
from taq_vllm.rounding import Rounding, check_bits, is_quantizable
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.units import HEAD

READS = "weights"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = "relative squared error of weights"


class Settings(BaseModel):
    """Which bitwidths, and how they round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: tuple[int, ...] = (4, 8)
    symmetric: bool | None = None
    """None: what plans do at each bitwidth (asymmetric below 8)."""

    _bits = field_validator("bits")(check_bits)


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Sum every unit's relative errors, matrix by matrix."""
    rounding = Rounding(settings.symmetric)
    errors: dict[str, dict[int, float]] = {}
    names = [name for matrices in run.units.values() for name in matrices]
    for name in track(names, "weight-error: rounding", len(names)):
        errors[name] = _relative_errors(run.files, name, settings.bits, rounding, run.device)
    return [
        UnitScore(unit=unit, score=costs[settings.bits[0]], costs=costs)
        for unit, matrices in run.units.items()
        for costs in [{bits: sum(errors[name][bits] for name in matrices) for bits in settings.bits}]
    ]


def _relative_errors(
    files: ModelFiles, name: str, bits: tuple[int, ...], rounding: Rounding, device: str
) -> dict[int, float]:
    source = "model.embed_tokens" if name == HEAD and files.tied else name
    weight = files.read(f"{source}.weight").to(device)
    if weight.dtype not in (torch.bfloat16, torch.float16):
        weight = weight.to(torch.bfloat16)  # as the model is served
    size = weight.float().square().sum()
    if not is_quantizable(weight.shape[1]) or size == 0:
        return dict.fromkeys(bits, 0.0)
    return {
        width: ((weight.float() - rounding(name, weight, width).float()).square().sum() / size).item() for width in bits
    }
