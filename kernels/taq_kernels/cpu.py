"""The product of activations with 4- and 8-bit weights on a CPU, in torch's own kernels.

Few tokens: `aten::_weight_int4pack_mm_for_cpu`, which reads the packed nibbles once per four tokens and sums in
float32; 8-bit weights as the product of [x, x] with their two nibble planes, in one call. Many tokens: unpack 64 rows
of weights at a time into the cache and leave the product to the BLAS. The weights are never held a second time.
"""

from functools import cache

import torch
from torch import Tensor

from taq_kernels import packing

# From this many tokens on, unpacking pays. Milliseconds per 4096 x 4096 product, one thread of a Xeon (AVX-512, no bf16
# instructions), int4 kernel / unpack and multiply: 4 bits 22 / 37 at 48 tokens, 29 / 41 at 64, 59 / 57 at 128,
# 244 / 166 at 512; 8 bits 30 / 44 at 32, 46 / 48 at 48, 60 / 51 at 64. (bf16 on the same: 73 at 64, 550 at 512.)
BLOCKWISE_FROM_TOKENS = {4: 112, 8: 48}


def linear(x: Tensor, planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """x @ W^T.

    Args:
        x: [M, K] fp32, bf16 or fp16, contiguous.
        planes: [padded N, planes * K / 2] uint8, in order "blocks".
        scale_zeros: [planes * K / group_size, padded N, 2] in the dtype of x.
        bits: 4 or 8.
        group_size: 32, 64 or 128.

    Returns:
        [M, padded N] in the dtype of x.
    """
    if x.shape[0] >= BLOCKWISE_FROM_TOKENS[bits]:
        return _linear_blockwise(x, planes, scale_zeros, bits, group_size)
    if bits == 8:
        x = torch.cat([x, x], dim=1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, planes, group_size, scale_zeros)


def _linear_blockwise(x: Tensor, planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int) -> Tensor:
    # The weights are rounded to x's dtype first: the product is then that of the same model held in 16 bits.
    # Without 16-bit multiply-add instructions float32 multiplies five times as fast (measured, AVX-512).
    dtype = x.dtype if _multiplies_natively(x.dtype) else torch.float32
    out = x.new_empty(x.shape[0], planes.shape[0])
    x = x.to(dtype)
    for start, stop in packing.bounds(planes.shape[0], "blocks"):
        weights = packing.dequantize_rows(planes, scale_zeros, bits, group_size, "blocks", start, stop)
        out[:, start:stop] = x @ weights.to(dtype)
    return out


@cache
def _multiplies_natively(dtype: torch.dtype) -> bool:
    capabilities = torch.cpu.get_capabilities()
    names = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
    }
    return dtype == torch.float32 or any(capabilities.get(name, False) for name in names[dtype])
