"""`learned`: gradient on scales, zero points and rounding, block by block, against the block's full-precision output.

Minimises the mean squared difference of the block's output on the inputs at hand to the full-precision block's output
on the full-precision model's hidden states (arXiv 2511.06516, eq. 6), so a block also makes up for what the blocks
before it lost. With V in [-1/2, 1/2] a code is clamp(round(w / s + V) + z, 0, 2^bits - 1); rounding passes gradients
straight through, and each step moves every parameter by the sign of its gradient (SignRound, arXiv 2309.05516), one
batch a step, with a rate that falls linearly to 0. It starts from `clip` and keeps the parameters with the least loss
over all batches; the start is among them.

Memory beside the block: four float32 per weight below 16 bits (the weight, V, what the codes stand for, its gradient;
on a CPU that computes in float32 the first is the block's own) and two bytes of codes (the best and those at hand).
Where all 218 million weights of an 8B block (d = 4096, MLP 14336, 8 of 32 heads shared) are below 16 bits that is
218e6 * (4 * 4 + 2) = 3.9 GB, besides what the backward pass keeps of one batch and seven float32 copies of the largest
matrix (59 million: 1.6 GB; measured on one of 34 million) while it is moved. `--dry-run` measures it on two blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from taq_vllm.distributed import total
from taq_vllm.fitting import Block
from taq_vllm.methods import clip
from taq_vllm.plan import GROUP_SIZE
from taq_vllm.quantizer import Quantized

READS_INPUTS = True
READS_OUTPUTS = True

_CHECKS = 4  # losses over all batches that are looked at, evenly spaced over the steps


class Settings(BaseModel):
    """How long and how far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=200, ge=1)
    rate: float | None = Field(default=None, gt=0)
    """Of V and of a scale's relative change, at the first step; 1 / steps if not given, so that V can go anywhere."""
    seed: int = 0
    """Of the batches' order."""


def fit_block(block: Block, settings: Settings) -> dict[str, Quantized]:
    """The codes of every matrix below 16 bits."""
    fits = {
        name: _Fit.start(block.matrices[name].weight, quantized, block.dtype)
        for name, quantized in clip.fit_block(block, clip.Settings()).items()
    }
    best = {name: fit.quantized() for name, fit in fits.items()}
    best_loss = output_loss(block, best)
    order = _order(len(block.batches), settings.steps, settings.seed)
    first_rate = settings.rate or 1 / settings.steps
    for step, batch in enumerate(order):
        rate = first_rate * (1 - step / settings.steps)
        _step(block, fits, batch, rate)
        if (step + 1) * _CHECKS // settings.steps > step * _CHECKS // settings.steps:
            found = {name: fit.quantized() for name, fit in fits.items()}
            loss = output_loss(block, found)
            if loss < best_loss:
                best_loss, best = loss, found
    return best


def output_loss(block: Block, fitted: dict[str, Quantized]) -> float:
    """What `learned` minimises, for codes however found: mean squared difference over tokens and features."""
    weights = _weights(block, {name: quantized.dequantize() for name, quantized in fitted.items()})
    with torch.no_grad():
        losses = [_difference(block, batch, weights).double() for batch in range(len(block.batches))]
    return float(total(torch.stack(losses).sum())) / block.tokens()


@dataclass
class _Fit:
    """One matrix's parameters, in groups of 128 input features; float32.

    Attributes:
        weight: [N, G, 128].
        offset: [N, G, 128], V.
        first_scale: [N, G].
        change: [N, G]: the scale is first_scale * (1 + change), as stored.
        zero: [N, G], not rounded yet.
        bits: 2 to 8.
        symmetric: the zero point stays.
        dtype: of the stored scale.
    """

    weight: Tensor
    offset: Tensor
    first_scale: Tensor
    change: Tensor
    zero: Tensor
    bits: int
    symmetric: bool
    dtype: torch.dtype

    @classmethod
    def start(cls, weight: Tensor, quantized: Quantized, dtype: torch.dtype) -> "_Fit":
        groups = weight.detach().float().view(len(weight), -1, GROUP_SIZE)
        scale, zero = quantized.scale.float(), quantized.zero_point.float()
        # The offset with which these codes are what rounds: 0 where they are the nearest, which they are after `clip`.
        codes = quantized.codes.view_as(groups).float() - zero[..., None]
        offset = codes - (groups / scale[..., None]).round()
        offset = torch.where(offset.abs() == 1, offset * 0.5, torch.zeros_like(offset))
        return cls(groups, offset, scale, torch.zeros_like(scale), zero, quantized.bits, quantized.symmetric, dtype)

    def scale(self) -> Tensor:
        return (self.first_scale * (1 + self.change)).to(self.dtype).float()

    def codes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes before clamping, scale, zero point, and w / s."""
        scale, zero = self.scale(), self.zero.round()
        ratio = self.weight / scale[..., None]
        return (ratio + self.offset).round_().add_(zero[..., None]), scale, zero, ratio

    def restored(self) -> Tensor:
        """[N, K] float32."""
        codes, scale, zero, _ = self.codes()
        codes.clamp_(0, 2**self.bits - 1).sub_(zero[..., None]).mul_(scale[..., None])
        return codes.view(len(codes), -1)

    def move(self, gradient: Tensor, rate: float) -> None:
        """One step against the sign of the gradient by the restored weight, [N, K]."""
        levels = 2**self.bits - 1
        gradient = gradient.view_as(self.weight)
        codes, _, zero, ratio = self.codes()
        clamped = codes.clamp(0, levels)
        outside = codes != clamped
        inside = gradient.masked_fill(outside, 0)
        # d restored / d scale = code - zero - (inside ? w / s : 0)
        by_scale = (gradient * clamped.sub_(zero[..., None])).sum(-1) - (inside * ratio).sum(-1)
        self.change.sub_(by_scale.sign(), alpha=rate).clamp_(-0.5, 0.5)
        if not self.symmetric:
            # Where a code is at the end of the range, a larger zero point lowers what it stands for by a step.
            by_zero = inside.sum(-1) - gradient.sum(-1)
            self.zero.sub_(by_zero.sign(), alpha=rate * levels / 2).clamp_(0, levels)
        self.offset.sub_(inside.sign_(), alpha=rate).clamp_(-0.5, 0.5)

    def quantized(self) -> Quantized:
        codes, scale, zero, _ = self.codes()
        codes = codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).view(len(codes), -1)
        return Quantized(self.bits, self.symmetric, codes, scale.to(self.dtype), zero.to(torch.uint8))


def _order(batches: int, steps: int, seed: int) -> list[int]:
    """Batches in random order, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()
    return order[:steps]


def _difference(block: Block, batch: int, weights: dict[str, Tensor]) -> Tensor:
    """Sum over one batch's real tokens of the mean squared difference over features."""
    states = block.hidden[batch].clone()  # what was made in inference mode can not be saved for a gradient
    is_token = block.batches[batch].is_token.to(block.device)

    def with_weights(states: Tensor, **arguments: Any) -> Tensor:
        return torch.func.functional_call(block.module, weights, (states,), arguments)

    output = block.apply(with_weights, states)[is_token]
    if block.target is None:
        with torch.no_grad():
            target = block.apply(block.module, states)[is_token]
    else:
        target = block.target[batch][is_token].clone()
    return (output.float() - target.float()).square().sum() / output.shape[-1]


def _weights(block: Block, restored: dict[str, Tensor]) -> dict[str, Tensor]:
    matrices = block.matrices
    return {f"{name}.weight": weight.to(matrices[name].weight.dtype) for name, weight in restored.items()}


def _step(block: Block, fits: dict[str, _Fit], batch: int, rate: float) -> None:
    weights = _weights(block, {name: fit.restored() for name, fit in fits.items()})
    for weight in weights.values():
        weight.requires_grad_()
    with torch.enable_grad():
        _difference(block, batch, weights).backward()
    for name, fit in fits.items():
        weight = weights[f"{name}.weight"]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # an expert without a token
        fit.move(total(gradient.float()), rate)
