"""`taq::linear`: the product of activations with the quantized shards of one layer, as a torch operator.

    taq::linear(Tensor x, Tensor[] planes, Tensor[] scale_zeros, int[] bits, int[] sizes, int group_size,
                Tensor? bias) -> Tensor

One call per layer whatever its shards' bits are, with a fake implementation, so that torch.compile keeps it whole and
branching on the number of tokens happens inside. The CPU runs `cpu.linear`, other devices `reference.linear`.
"""

import torch
from torch import Tensor

from taq_kernels import cpu, reference

_SCHEMA = (
    "linear(Tensor x, Tensor[] planes, Tensor[] scale_zeros, int[] bits, int[] sizes, int group_size, "
    "Tensor? bias=None) -> Tensor"
)

# A torch.library.Library must outlive its operators; a namespace of the project's own cannot clash with vLLM's.
_library: torch.library.Library | None = None


def register() -> None:
    """Define `torch.ops.taq.linear`; safe to repeat."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("taq", "FRAGMENT")
    _library.define(_SCHEMA)
    _library.impl("linear", _linear_cpu, "CPU")
    _library.impl("linear", _linear_plain, "CUDA")
    torch.library.register_fake("taq::linear", _linear_fake, lib=_library)


def linear(
    x: Tensor,
    planes: list[Tensor],
    scale_zeros: list[Tensor],
    bits: list[int],
    sizes: list[int],
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ [W_0; W_1; ...]^T + bias for shards of different bits.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        planes: per shard [padded N_i, planes_i * K / 2] uint8 in the order of x's device (`packing`).
        scale_zeros: per shard [planes_i * K / group_size, padded N_i, 2] in the dtype of x.
        bits: per shard 4 or 8.
        sizes: per shard N_i, its rows without padding.
        group_size: 32, 64 or 128.
        bias: [sum N_i] or None.

    Returns:
        [..., sum N_i] in the dtype of x, contiguous.
    """
    register()
    return torch.ops.taq.linear(x, planes, scale_zeros, bits, sizes, group_size, bias)


def kernel_name(device: torch.device) -> str:
    """What computes `taq::linear` on a device, for logs."""
    if device.type == "cpu":
        return f"torch int4 ({torch.backends.cpu.get_cpu_capability()})"
    return "plain torch"


def _linear_cpu(x, planes, scale_zeros, bits, sizes, group_size, bias=None):  # noqa: ANN001, ANN202
    return _linear(cpu.linear, x, planes, scale_zeros, bits, sizes, group_size, bias)


def _linear_plain(x, planes, scale_zeros, bits, sizes, group_size, bias=None):  # noqa: ANN001, ANN202
    return _linear(reference.linear, x, planes, scale_zeros, bits, sizes, group_size, bias)


def _linear(product, x, planes, scale_zeros, bits, sizes, group_size, bias):  # noqa: ANN001, ANN202
    x_mk = x.reshape(-1, x.shape[-1]).contiguous()
    outs = [
        product(x_mk, shard_planes, shard_scale_zeros, shard_bits, group_size)
        for shard_planes, shard_scale_zeros, shard_bits in zip(planes, scale_zeros, bits, strict=True)
    ]
    if len(outs) == 1 and outs[0].shape[1] == sizes[0]:
        out = outs[0]
    else:
        out = torch.cat([out[:, :size] for out, size in zip(outs, sizes, strict=True)], dim=1)
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], sum(sizes))


def _linear_fake(x, planes, scale_zeros, bits, sizes, group_size, bias=None):  # noqa: ANN001, ANN202
    return x.new_empty(*x.shape[:-1], sum(sizes))
