"""The product of activations with mixed-bitwidth weights in plain torch: the truth for tests, and what runs on a GPU
until a kernel does.

`linear_float32` forms the weights in float32 and multiplies there: no rounding but the planes' own. `linear` rounds
them to the activations' dtype in slabs of rows, as an unquantized model would hold them, and leaves the product to
torch. It neither synchronises nor branches on values, so CUDA graphs can capture it.
"""

import torch
from torch import Tensor

from taq_kernels import packing


def dequantize(planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int, order: packing.Order) -> Tensor:
    """All weights of a packed matrix, rounded once to the dtype of `scale_zeros`.

    Args:
        planes: [padded N, planes * K / 2] uint8.
        scale_zeros: [planes * K / group_size, padded N, 2].
        bits: 4 or 8.
        group_size: 32, 64 or 128.
        order: of the nibbles.

    Returns:
        [padded N, K].
    """
    pieces = [
        packing.dequantize_rows(planes, scale_zeros, bits, group_size, order, start, stop)
        for start, stop in packing.bounds(planes.shape[0], order)
    ]
    return torch.cat(pieces, dim=1).t()


def linear_float32(
    x: Tensor, planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int, order: packing.Order
) -> Tensor:
    """x @ W^T with weights and sums in float32.

    Args:
        x: [M, K].
        planes: [padded N, planes * K / 2] uint8.
        scale_zeros: [planes * K / group_size, padded N, 2].
        bits: 4 or 8.
        group_size: 32, 64 or 128.
        order: of the nibbles.

    Returns:
        [M, padded N] float32.
    """
    return x.float() @ dequantize(planes, scale_zeros.float(), bits, group_size, order).t()


def linear(x: Tensor, planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """x @ W^T with weights rounded to the dtype of x, one slab of rows after the other.

    Args:
        x: [M, K] fp32, bf16 or fp16.
        planes: [padded N, planes * K / 2] uint8, in order "rows".
        scale_zeros: [planes * K / group_size, padded N, 2] in the dtype of x.
        bits: 4 or 8.
        group_size: 32, 64 or 128.

    Returns:
        [M, padded N] in the dtype of x.
    """
    slabs = [
        x @ packing.dequantize_rows(planes, scale_zeros, bits, group_size, "rows", start, stop)
        for start, stop in packing.bounds(planes.shape[0], "rows")
    ]
    return slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=1)
