"""The product of activations with quantized weights in plain torch and float32, from codes: the truth for tests.

    w = (code - zero point) * scale,    zero point = 2^(bits - 1) if symmetric,    y = x @ w^T

It knows no packed layout, so the kernels of every device can be compared with it.
"""

import torch
from torch import Tensor


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Weights of integer codes.

    Args:
        codes: [N, K] uint8, 0 .. 2^bits - 1.
        scale: [N, K / group_size], any floating dtype.
        zero_point: [N, K / group_size] in code units; None means symmetric: 2^(bits - 1).
        bits: 4 or 8.
        group_size: 32, 64 or 128.

    Returns:
        [N, K] float32.
    """
    middle = torch.full_like(scale, 2 ** (bits - 1)) if zero_point is None else zero_point
    groups = codes.float().unflatten(1, (-1, group_size))
    return ((groups - middle.float()[:, :, None]) * scale.float()[:, :, None]).flatten(1)


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ W^T + bias.

    Args:
        x: [M, K], any floating dtype.
        codes: [N, K] uint8.
        scale: [N, K / group_size].
        zero_point: [N, K / group_size] or None.
        bits: 4 or 8.
        group_size: 32, 64 or 128.
        bias: [N] or None.

    Returns:
        [M, N] float32.
    """
    y = x.float() @ dequantize(codes, scale, zero_point, bits, group_size).t()
    return y if bias is None else y + bias.float()
