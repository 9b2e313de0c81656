"""Weights to integer codes and back: scales, zero points, rounding, and the search for a clipping range.

Rows are cut into groups of 128 input features. A group with scale s and zero point z stores
code = clamp(round(w / s) + z, 0, 2^bits - 1) and stands for (code - z) * s. Codes are always computed with the
scale as it is stored (rounded to the model's dtype), so what is written is what was measured.

Codes have 2 to 8 bits. `quantize` takes the range from minimum and maximum and needs no data. `search_clip` (arXiv
2511.06516, eq. 6 with the layer's weighted weight error as discrepancy) shrinks each group's range to the ratio that
minimises sum_k E[x_k^2] (w_k - q_k)^2, with E[x_k^2] measured on the task's own inputs. The methods of `methods/` are
built from these two; none changes the scale's layout, so all write the same checkpoint format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taq_vllm.plan import GROUP_SIZE, STUDY_BITS

# Ratios of the full range tried by `clip`. On the lab model's matrices half the step gains another 0.5% of the loss,
# and no group chooses less than 0.6 at 4 bits.
CLIP_RATIOS = tuple(1 - 0.05 * step for step in range(9))
# With 4 levels the best range is far inside the extremes: at 2 bits, symmetric, the further ratios gain 5% of the loss
# of normal weights and a third of it where a group has one weight five deviations out; at 3 bits at most 3%.
CLIP_RATIOS_BELOW_4_BITS = tuple(1 - 0.05 * step for step in range(15))

# Weights per chunk of rows in the search: its temporaries stay near 64 MB in float32.
_CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Quantized:
    """One weight matrix as integer codes.

    Attributes:
        bits: 2 to 8.
        symmetric: the zero point is 2^(bits-1) everywhere and is not stored.
        codes: [N, K] uint8, 0 .. 2^bits - 1.
        scale: [N, K / 128] in the weight's dtype.
        zero_point: [N, K / 128] uint8, in code units.
    """

    bits: int
    symmetric: bool
    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for: [N, K] in the scale's dtype."""
        rows, columns = self.codes.shape
        codes = self.codes.view(rows, -1, GROUP_SIZE).float()
        weight = (codes - self.zero_point.float()[..., None]) * self.scale.float()[..., None]
        return weight.view(rows, columns).to(self.scale.dtype)


def quantize(weight: Tensor, bits: int, symmetric: bool, dtype: torch.dtype | None = None) -> Quantized:
    """Round to nearest over each group's full range (`rtn`).

    Args:
        weight: [N, K] bf16, fp16 or fp32; K a multiple of 128.
        bits: 2 to 8.
        symmetric: range [-max|w|, max|w|]; else [min(w, 0), max(w, 0)].
        dtype: of the stored scale; the weight's if not given.

    Raises:
        ValueError: K is not a multiple of 128, or a weight is not finite.
    """
    return _in_chunks(
        weight, bits, lambda groups: _round(groups, bits, symmetric, 1.0, dtype or weight.dtype), symmetric
    )


def search_clip(
    weight: Tensor,
    bits: int,
    symmetric: bool,
    importance: Tensor,
    ratios: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Quantized:
    """Round to nearest over the range that loses least on the task's inputs (`clip`).

    Args:
        weight: [N, K] bf16, fp16 or fp32; K a multiple of 128.
        bits: 2 to 8.
        symmetric: as in `quantize`.
        importance: [K] float, E[x_k^2] of the matrix's inputs.
        ratios: fractions of each group's full range to try; the first wins ties. `CLIP_RATIOS` if not given, and more
            below 4 bits.
        dtype: of the stored scale; the weight's if not given.

    Raises:
        ValueError: K is not a multiple of 128, or a weight or an importance is not finite.
    """
    if importance.shape != (weight.shape[1],):
        raise ValueError(
            f"got importance of shape {tuple(importance.shape)}, need one per input feature: {weight.shape[1]}"
        )
    if not torch.isfinite(importance).all():
        raise ValueError("got activations that are not finite; check the model's weights with `taq verify`")
    importance = importance.to(torch.float32).view(1, -1, GROUP_SIZE)
    if ratios is None:
        ratios = CLIP_RATIOS if bits >= 4 else CLIP_RATIOS_BELOW_4_BITS
    return _in_chunks(
        weight,
        bits,
        lambda groups: _search_chunk(groups, bits, symmetric, importance, ratios, dtype or weight.dtype),
        symmetric,
    )


def _in_chunks(
    weight: Tensor, bits: int, quantize_groups: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], symmetric: bool
) -> Quantized:
    """Quantize some rows at a time, so that no float32 copy of the whole matrix is made.

    Args:
        weight: [N, K].
        bits: 2 to 8.
        quantize_groups: [n, K / 128, 128] float32 to codes of that shape, scales and zero points [n, K / 128].
        symmetric: recorded in the result.

    Raises:
        ValueError: bits, K or weights that cannot be.
    """
    if bits not in STUDY_BITS or bits == 16:
        raise ValueError(f"got {bits} bits; codes have 2 to 8, and 16 is the weight as it is")
    columns = weight.shape[1]
    if columns % GROUP_SIZE:
        raise ValueError(f"got {columns} in-features, which {GROUP_SIZE} does not divide; leave this matrix at 16 bits")
    parts = []
    for chunk in weight.split(max(1, _CHUNK_WEIGHTS // columns)):
        groups = chunk.float().view(-1, columns // GROUP_SIZE, GROUP_SIZE)
        if not torch.isfinite(groups).all():
            raise ValueError("got weights that are not finite; the checkpoint is damaged or its dtype overflowed")
        codes, scale, zero_point = quantize_groups(groups)
        parts.append((codes.to(torch.uint8).view(-1, columns), scale, zero_point.to(torch.uint8)))
    codes, scale, zero_point = (torch.cat(part) for part in zip(*parts, strict=True))
    return Quantized(bits=bits, symmetric=symmetric, codes=codes, scale=scale, zero_point=zero_point)


def _round(
    groups: Tensor, bits: int, symmetric: bool, ratio: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, G, 128], scale [N, G] in `dtype`, zero point [N, G] float32, for `ratio` of the full range."""
    levels = 2**bits - 1
    if symmetric:
        # compressed-tensors' convention: 2^bits - 1 steps across the range, so that the largest positive weight
        # sits half a step above the last code.
        scale = groups.abs().amax(-1) * (2 * ratio / levels)
    else:
        low = groups.amin(-1).clamp(max=0) * ratio
        high = groups.amax(-1).clamp(min=0) * ratio
        scale = (high - low) / levels
    scale = scale.to(dtype)
    # A group of zeros, or one whose step underflows the dtype, has no range: any scale gives zeros.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric:
        zero_point = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.float32)
    else:
        zero_point = (-low / scale.float()).round().clamp(0, levels)
    codes = ((groups / scale.float()[..., None]).round() + zero_point[..., None]).clamp(0, levels)
    return codes, scale, zero_point


def _search_chunk(
    groups: Tensor,
    bits: int,
    symmetric: bool,
    importance: Tensor,
    ratios: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    best_error = None
    for ratio in ratios:
        codes, scale, zero_point = _round(groups, bits, symmetric, ratio, dtype)
        restored = (codes - zero_point[..., None]) * scale.float()[..., None]
        error = ((groups - restored).square() * importance).sum(-1)
        if best_error is None:
            best_error, best = error, (codes, scale, zero_point)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = (
            torch.where(better[..., None], codes, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, zero_point, best[2]),
        )
    return best
