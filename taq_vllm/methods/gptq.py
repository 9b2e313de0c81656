"""`gptq`: rounding one input feature after the other, each error made up for by the features not rounded yet.

Minimises tr((Q - W) H (Q - W)^T) with H = sum_t x_t x_t^T over the task's tokens (arXiv 2210.17323). With R upper
triangular and H^-1 = R^T R, feature k is rounded and the rest moves by -(w_k - q_k) / R_kk * R_k,k+1.. . A group's
scale is found when its first feature is reached, from the weights as they are by then.

Matrices are fitted in the order in which they run, from the inputs that the block gives with the earlier ones already
rounded (`sequential`). Memory beside the block: two float32 [K, K] matrices while H is factored (measured at K = 4096:
2.3; K = 14336: 1.9 GB), then one of them and three float32 copies of one weight matrix; of experts one [K, K] each, as
many of them at a time as 1 GiB holds.
"""

import re
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from taq_vllm.distributed import total
from taq_vllm.fitting import Block
from taq_vllm.plan import GROUP_SIZE
from taq_vllm.quantizer import Quantized, quantize, search_clip
from taq_vllm.stream import replace_weight

READS_INPUTS = True
READS_OUTPUTS = False

_ROWS = 256  # of [K, K] that are moved at a time
_MOMENTS_BYTES = 1 << 30  # of experts that are looked at together


class Settings(BaseModel):
    """How codes are found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    damping: float = Field(default=0.01, gt=0, le=1)
    """Added to H's diagonal, as a share of its mean."""
    clip: bool = True
    """Search each group's range with H's diagonal as importance, else take it from minimum and maximum."""
    sequential: bool = True
    """Inputs come from the block with its earlier matrices rounded; else from the block in full precision."""
    act_order: bool = False
    """Features with the largest H_kk first. Groups stay contiguous, so scales come from the weights as given."""


def fit_block(block: Block, settings: Settings) -> dict[str, Quantized]:
    """The codes of every matrix below 16 bits."""
    fitted: dict[str, Quantized] = {}
    for groups in _looked_at_together(block):
        moments = sum_outer_products(block, [names[0] for names in groups])
        for names in groups:
            fitted |= _fit_readers(block, names, moments.pop(names[0]), settings)
    return fitted


def _looked_at_together(block: Block) -> list[list[tuple[str, ...]]]:
    """Groups of matrices that read one tensor, in the order in which they run; with each other those whose inputs one
    run of the block can tell: experts do not read what other experts make. As many as memory allows."""
    together: dict[str, list[tuple[str, ...]]] = {}
    for names in block.groups():
        # The experts' first matrices are looked at together, then what reads those: `mlp.experts.3.gate_proj` goes by
        # the name that all have.
        together.setdefault(re.sub(r"\.\d+\.", ".", names[0]), []).append(names)
    found = []
    for groups in together.values():
        at_once = max(1, _MOMENTS_BYTES // (4 * block.entries[groups[0][0]].shape[1] ** 2))
        found += [groups[start : start + at_once] for start in range(0, len(groups), at_once)]
    return found


def _fit_readers(block: Block, names: tuple[str, ...], factor: Tensor, settings: Settings) -> dict[str, Quantized]:
    """The matrices that read one tensor of the second moments `factor` [K, K], which is overwritten."""
    energy = factor.diagonal().clone()
    order = energy.argsort(descending=True, stable=True) if settings.act_order else None
    inverse_factor(factor, settings.damping, order)
    fitted = {}
    for name in names:
        weight, entry = block.matrices[name].weight, block.entries[name]
        fitted[name] = round_with(factor, weight, entry.bits, entry.symmetric, energy, block.dtype, settings, order)
        if settings.sequential:
            replace_weight(block.matrices[name], fitted[name].dequantize())
    return fitted


def sum_outer_products(block: Block, names: Sequence[str]) -> dict[str, Tensor]:
    """H = sum_t x_t x_t^T / tokens of some matrices' inputs: [K, K] float32, by name."""
    found = {}
    for name in names:
        columns = block.entries[name].shape[1]
        found[name] = torch.zeros(columns, columns, device=block.device)

    def add(name: str, inputs: Tensor) -> None:
        inputs = inputs.float()
        found[name].addmm_(inputs.T, inputs)

    block.observe(names, add)
    tokens = block.tokens()
    return {name: total(moments).div_(tokens) for name, moments in found.items()}


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """R, upper triangular, with (H + damping * mean diagonal)^-1 = R^T R.

    Args:
        hessian: [K, K] float32, symmetric and contiguous; becomes R.
        damping: raised tenfold until the factorization succeeds.
        order: [K] of features, in which they are rounded.

    Returns:
        The tensor that was given.

    Raises:
        ValueError: no damping helps.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # features that no token has: nothing to make up for
    mean = diagonal.mean()
    if order is not None:
        hessian.copy_(hessian[order])
        for rows in hessian.split(_ROWS):
            rows.copy_(rows[:, order])
    # H = U U^T with U upper is the Cholesky factor of H with both axes reversed; then R = U^-1.
    _reverse(hessian)
    # LAPACK's layout, [K, K] by columns: what comes in that layout is factored and solved without copies.
    lower, failed = hessian.clone().T, torch.zeros((), dtype=torch.int32, device=hessian.device)
    while damping <= 1:
        lower.copy_(hessian).diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            inverse = hessian.zero_().fill_diagonal_(1).T
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            # By rows this is the transpose, which is turned over in place as well.
            _transpose(hessian)
            _reverse(hessian)
            return hessian
        damping *= 10
    raise ValueError("got activations whose second moments are not positive definite; use more calibration examples")


def _reverse(matrix: Tensor) -> None:
    """Turn both axes of [K, K] round, in place."""
    size = len(matrix)
    for start in range(0, size // 2, _ROWS):
        end = min(start + _ROWS, size // 2)
        top = matrix[start:end].flip(0, 1)
        matrix[start:end] = matrix[size - end : size - start].flip(0, 1)
        matrix[size - end : size - start] = top
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)


def _transpose(matrix: Tensor) -> None:
    """Swap the axes of [K, K] in place."""
    for start in range(0, len(matrix), _ROWS):
        end = start + _ROWS
        right = matrix[start:end, start:].T.clone()
        matrix[start:end, start:] = matrix[start:, start:end].T.clone()
        matrix[start:, start:end] = right


def round_with(
    factor: Tensor,
    weight: Tensor,
    bits: int,
    symmetric: bool,
    energy: Tensor,
    dtype: torch.dtype,
    settings: Settings,
    order: Tensor | None = None,
) -> Quantized:
    """Round one matrix, feature by feature.

    Args:
        factor: [K, K] float32 upper triangular, of `inverse_factor`.
        weight: [N, K].
        bits: 2 to 8.
        symmetric: as in `quantizer.quantize`.
        energy: [K], E[x_k^2].
        dtype: of the scales.
        settings: whether ranges are searched.
        order: [K], the order of `factor`; scales then come from `weight` as it is.
    """

    def ranges(group: Tensor, columns: slice) -> Quantized:
        if settings.clip:
            return search_clip(group, bits, symmetric, energy[columns], dtype=dtype)
        return quantize(group, bits, symmetric, dtype)

    rows, columns = weight.shape
    levels = 2**bits - 1
    transposed = weight.float().T.contiguous()  # features are rows: what is read and written together lies together
    fixed = None
    if order is not None:
        fixed = ranges(weight.float(), slice(None))
        transposed = transposed[order]
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    scales, zero_points = [], []
    for start in range(0, columns, GROUP_SIZE):
        end = start + GROUP_SIZE
        if fixed is None:
            found = ranges(transposed[start:end].T, slice(start, end))
            scales.append(found.scale)
            zero_points.append(found.zero_point)
            scale = found.scale.float().T.expand(GROUP_SIZE, rows)
            zero_point = found.zero_point.float().T.expand(GROUP_SIZE, rows)
        else:
            groups = order[start:end] // GROUP_SIZE
            scale, zero_point = fixed.scale.float().T[groups], fixed.zero_point.float().T[groups]
        local = factor[start:end, start:end]
        block, errors = transposed[start:end], torch.empty(GROUP_SIZE, rows, device=weight.device)
        for k in range(GROUP_SIZE):
            code = (block[k] / scale[k]).round_().add_(zero_point[k]).clamp_(0, levels)
            codes[start + k] = code
            restored = code.sub_(zero_point[k]).mul_(scale[k])
            torch.sub(block[k], restored, out=errors[k]).div_(local[k, k])
            block[k + 1 :].addr_(local[k, k + 1 :], errors[k], alpha=-1)
        transposed[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    if fixed is not None:
        codes, unordered = torch.empty_like(codes), codes
        codes[order] = unordered
        return Quantized(bits, symmetric, codes.T.contiguous(), fixed.scale, fixed.zero_point)
    return Quantized(bits, symmetric, codes.T.contiguous(), torch.cat(scales, 1), torch.cat(zero_points, 1))
