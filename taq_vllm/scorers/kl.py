"""TAQ-KL: how far the next-token distributions on the task's prompts move when one unit alone is perturbed.

    cost_b(unit) = mean over tokens of KL(p_full || p_perturbed), in nats

Over the prompts' tokens, so that no labels are needed, or with `on=answers` over those of the completions.

Later versions of arXiv 2511.06516 call this TAQ-KL. The perturbation is the unit's actual quantization (default), or
noise that stands for it: uniform within a step of each group, of variance step^2 / 12, seeded. Long prompts count by
their tokens; the standard error is that of a ratio over examples.

Only what follows the perturbed unit is run (`one_at_a_time.py`). The full model is walked once before that, and of it
the last hidden states are kept, not the logits, which are made from both in chunks: so

    2 N + sum over (unit, bits) of (N - l)     block executions
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from taq_vllm import units
from taq_vllm.distributed import gather
from taq_vllm.estimates import ratio_and_stderr
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.one_at_a_time import Key, Values, walk
from taq_vllm.progress import steps
from taq_vllm.quantizer import quantize
from taq_vllm.rounding import Rounding, check_bits
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.stream import Batch, Head, make_batches

READS = "prompts"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = "nats per token"


class Settings(BaseModel):
    """How each unit is perturbed, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on: Literal["prompts", "answers"] = "prompts"
    """Which tokens' distributions count: all that follow a prompt's tokens, or those of the answers, read after their
    prompts (which needs completions)."""
    perturbation: Literal["quantization", "noise"] = "quantization"
    bits: tuple[int, ...] = (4,)
    symmetric: bool | None = None
    """None: what plans do at each bitwidth (asymmetric below 8)."""
    max_examples: int = Field(128, ge=2)
    max_tokens: int = Field(512, ge=1)
    """Of a prompt; with `on=answers` nothing is cut, the answer stands at the end."""
    batch_size: int = Field(16, ge=1)
    seed: int = 0
    """Of the noise."""

    _bits = field_validator("bits")(check_bits)

    @property
    def reads(self) -> str:
        """What `scoring` takes instead of `READS`."""
        return self.on


@dataclass(frozen=True)
class Noise:
    """Weights plus noise of their quantization error's variance, uniform within half a step to either side.

    Attributes:
        rounding: whose steps.
        seed: with a matrix's name and bits, of its noise; the same on every device.
    """

    rounding: Rounding
    seed: int

    def __call__(self, name: str, weight: Tensor, bits: int) -> Tensor:
        """The matrix `name` with noise: [N, K] to [N, K]."""
        scale = quantize(weight, bits, self.rounding.is_symmetric(bits)).scale.float()
        digest = hashlib.sha256(f"{self.seed} {name} {bits}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        uniform = torch.rand(weight.shape, generator=generator).to(weight.device) - 0.5
        step = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
        return weight.float() + uniform * step


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Score every unit by the divergence that it alone causes."""
    model = run.model
    batches = make_batches(
        run.sequences, settings.batch_size, None if settings.on == "answers" else settings.max_tokens
    )
    hidden = model.embed(batches)
    with steps("kl: full model", len(batches) * model.layers) as progress:
        for layer in range(model.layers):
            with model.block(layer) as block:
                hidden.replace(lambda states, layer=layer, block=block: model.run(layer, block, states))
            progress.advance(len(batches))

    def divergence(_: Key | None, perturbed: HiddenStates, head: Head, full_head: Head) -> Values:
        sums = torch.zeros(len(run.sequences), dtype=torch.float64)
        rows_at_once = head.rows_at_once
        for batch, full_states, states in zip(batches, hidden, perturbed, strict=True):
            counted = _counted(batch, settings)
            owners = batch.examples.repeat_interleave(counted.sum(1))
            counted = counted.to(states.device)
            for full_rows, rows, owner in zip(
                full_states[counted].split(rows_at_once),
                states[counted].split(rows_at_once),
                owners.split(rows_at_once),
                strict=True,
            ):
                full_log = full_head.logits(full_rows).log_softmax(-1)
                log = head.logits(rows).log_softmax(-1)
                sums.index_add_(0, owner, (full_log.exp() * (full_log - log)).sum(-1).double().cpu())
        return {"kl": gather(sums)}

    rounding = Rounding(settings.symmetric)
    perturb = rounding if settings.perturbation == "quantization" else Noise(rounding, settings.seed)
    found, _ = walk(run, batches, settings.bits, perturb, divergence, "kl: one unit at a time")
    lengths = torch.zeros(len(run.sequences), dtype=torch.float64)
    for batch in batches:
        lengths[batch.examples] = _counted(batch, settings).sum(1).double()
    tokens = gather(lengths)
    return [_unit_score(unit, {bits: found[unit, bits]["kl"] for bits in settings.bits}, tokens) for unit in run.units]


def _counted(batch: Batch, settings: Settings) -> Tensor:
    """[B, T] bool: the positions whose next-token distribution counts."""
    return batch.is_predicted if settings.on == "answers" else batch.is_token


def _unit_score(unit: str, sums: dict[int, Tensor], tokens: Tensor) -> UnitScore:
    """From KL summed over each example's tokens [examples] and how many those are [examples]."""
    costs, stderrs = {}, {}
    for bits, of_examples in sums.items():
        costs[bits], stderrs[bits] = ratio_and_stderr(of_examples, tokens)
    lowest = min(costs)
    return UnitScore(unit=unit, score=costs[lowest], stderr=stderrs[lowest], costs=costs, cost_stderrs=stderrs)
