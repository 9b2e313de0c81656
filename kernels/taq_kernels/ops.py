"""`taq::linear`: the product of activations with one layer's mixed-bitwidth matrices, as a torch operator.

    taq::linear(Tensor x, Tensor weights, Tensor scales, Tensor? zero_points, Tensor[] tables, int[] launches,
                int[] bits, int[] sizes, int group_size, Tensor? bias=None) -> Tensor

x is [..., K] fp32, bf16 or fp16 with any strides; the result is x @ [W_0; W_1; ...]^T + bias, [..., sum(sizes)] in the
dtype of x. The arguments from `weights` to `group_size` are the fields of `Operands`, which `join` makes of a layer's
matrices as `pack` and `pack_dense` packed them for their device.

For inference: there is no backward. One call per layer whatever its matrices' bits are, with a fake implementation, so
that torch.compile keeps it whole and branching on the number of tokens happens inside. CPUs run `cpu.linear`, GPUs
`gemm.linear`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taq_kernels import cpu, packing, tuned
from taq_kernels.packing import PackedShard

if TYPE_CHECKING:
    from taq_kernels.gemm import Config

_SCHEMA = (
    "linear(Tensor x, Tensor weights, Tensor scales, Tensor? zero_points, Tensor[] tables, int[] launches, "
    "int[] bits, int[] sizes, int group_size, Tensor? bias=None) -> Tensor"
)
MIN_CAPABILITY = 80
"""The oldest GPU that `gemm` runs on, as 80 for compute capability 8.0: products in bf16, asynchronous copies."""

# A torch.library.Library must outlive its operators; a namespace of the project's own cannot clash with vLLM's.
_library: torch.library.Library | None = None


@dataclass(frozen=True)
class Operands:
    """A layer's weights as `taq::linear` takes them, in the order of its arguments.

    Attributes:
        weights: the packed codes of all matrices, flat: int16 on GPUs, uint8 on CPUs.
        scales: the matrices' scales, flat, in the dtype that the checkpoint has.
        zero_points: uint8, as many as scales; None if every matrix is symmetric.
        tables: on GPUs, which tile is read when, for each range of M (`gemm.build_tables`); empty on CPUs.
        launches: on GPUs, the settings of each of their launches.
        bits: per matrix 4 or 8, on GPUs also 16.
        sizes: per matrix its rows.
        group_size: 128, 64 or 32.
    """

    weights: Tensor
    scales: Tensor
    zero_points: Tensor | None
    tables: list[Tensor]
    launches: list[int]
    bits: list[int]
    sizes: list[int]
    group_size: int


def register() -> None:
    """Define `torch.ops.taq.linear`; safe to repeat."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("taq", "FRAGMENT")
    _library.define(_SCHEMA)
    _library.impl("linear", _linear_cpu, "CPU")
    _library.impl("linear", _linear_cuda, "CUDA")
    torch.library.register_fake("taq::linear", _linear_fake, lib=_library)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> PackedShard:
    """Pack one matrix of integer codes for the device that it lies on.

    Args:
        codes: [N, K] uint8, 0 .. 2^bits - 1.
        scale: [N, K / group_size] bf16, fp16 or fp32.
        zero_point: [N, K / group_size] uint8 in code units; None means symmetric: 2^(bits - 1).
        bits: 4 or 8.
        group_size: 128, 64 or 32.

    Raises:
        ValueError: another dtype, shape, device, number of bits or group size.
    """
    pack_on_device = cpu.pack if codes.device.type == "cpu" else packing.pack_tiles
    return pack_on_device(codes, scale, zero_point, bits, group_size)


def has_dense_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether 16-bit matrices can stand in a layer's call: on GPUs, unless the activations are fp32."""
    return device.type != "cpu" and dtype in (torch.bfloat16, torch.float16)


def pack_dense(weight: Tensor, group_size: int) -> PackedShard:
    """Pack one 16-bit matrix, to stand beside quantized ones in a GPU's launch.

    Args:
        weight: [N, K] in the dtype of the activations; `has_dense_tiles` of its device and dtype.
        group_size: of the layer's quantized matrices.

    Raises:
        ValueError: another device, dtype or shape.
    """
    if not has_dense_tiles(weight.device, weight.dtype):
        raise ValueError(
            f"got weights of {weight.dtype} on {weight.device}; only 16-bit weights on a GPU have a packed form, "
            "elsewhere they are multiplied as they are"
        )
    return packing.pack_dense_tiles(weight, group_size)


def join(shards: Sequence[PackedShard], configs: "Mapping[int, Config] | None" = None) -> Operands:
    """The matrices of one layer, below each other, as the operands of one call.

    Args:
        shards: packed on one device, with equal K and group size.
        configs: a `gemm.Config` per M bucket, for tuning; by default the device's tuned table or else a heuristic
            decides. Only for GPUs.

    Raises:
        ValueError: the matrices cannot be computed in one call.
    """
    if not shards:
        raise ValueError("got no matrices; a layer has at least one")
    first = shards[0]
    for shard in shards[1:]:
        if (shard.columns, shard.group_size, shard.weights.device) != (
            first.columns,
            first.group_size,
            first.weights.device,
        ):
            raise ValueError(
                f"matrices of one layer need equal K, group size and device; got K={first.columns} in groups of "
                f"{first.group_size} on {first.weights.device}, and K={shard.columns} in groups of "
                f"{shard.group_size} on {shard.weights.device}"
            )
    quantized = [shard for shard in shards if shard.bits < 16]
    if len({shard.scales.dtype for shard in quantized}) > 1:
        raise ValueError(f"scales of one layer need one dtype; got {[str(shard.scales.dtype) for shard in quantized]}")
    # Those of 16-bit matrices are empty, in the weights' dtype.
    scale_dtype = quantized[0].scales.dtype if quantized else first.scales.dtype
    zero_points = None
    if any(shard.zero_points is not None for shard in quantized):
        zero_points = torch.cat([_zero_points(shard) for shard in shards])
    shapes = [(shard.bits, shard.rows) for shard in shards]
    tables, launches = [], []
    if first.weights.dtype == torch.int16:
        tables, launches = _launch_tables(shapes, first.columns, first.group_size, first.weights.device, configs)
    return Operands(
        weights=_joined_weights(shards),
        scales=torch.cat([shard.scales.to(scale_dtype) for shard in shards]),
        zero_points=zero_points,
        tables=tables,
        launches=launches,
        bits=[bits for bits, _ in shapes],
        sizes=[rows for _, rows in shapes],
        group_size=first.group_size,
    )


def warm_up(operands: Operands, columns: int, dtype: torch.dtype, bias: Tensor | None = None) -> None:
    """Compile what calls with these operands will launch: a CUDA graph must not be the first to call. Nothing on CPUs.

    Args:
        operands: of a layer.
        columns: K.
        dtype: of the activations.
        bias: as in the calls that follow.
    """
    if operands.tables:
        from taq_kernels import gemm

        with torch.cuda.device(operands.weights.device):
            gemm.warm_up(columns, dtype, **vars(operands), bias=bias)


def kernel_name(device: torch.device) -> str:
    """What computes `taq::linear` on a device, for logs."""
    if device.type == "cpu":
        return cpu.kernel_name()
    major, minor = torch.cuda.get_device_capability(device)
    return f"Triton mixed-bitwidth GEMM (sm_{major}{minor})"


def _launch_tables(
    shapes: Sequence[tuple[int, int]],
    columns: int,
    group_size: int,
    device: torch.device,
    configs: "Mapping[int, Config] | None",
) -> tuple[list[Tensor], list[int]]:
    """What was tuned for this GPU, a heuristic where nothing was."""
    from taq_kernels import gemm  # needs triton, which CPUs do without

    gpu = torch.cuda.get_device_properties(device)
    if configs is None:
        arch = 10 * gpu.major + gpu.minor
        measured = tuned.configs_for(gpu.name, shapes, columns, group_size) or {}
        configs = {
            bucket: gemm.Config(**measured[bucket])
            if bucket in measured
            else gemm.heuristic(shapes, columns, arch, gpu.multi_processor_count, bucket)
            for bucket in gemm.BUCKETS
        }
    tables = gemm.build_tables(shapes, columns, group_size, configs, gpu.multi_processor_count)
    return [table.to(device) for table in tables.tables], tables.launches


def _linear_cpu(x, weights, scales, zero_points, tables, launches, bits, sizes, group_size, bias=None):  # noqa: ANN001, ANN202
    _check(x, weights, scales, zero_points, bits, sizes, group_size, bias, cpu.packed_sizes)
    x_mk = x.reshape(-1, x.shape[-1]).contiguous()
    y = cpu.linear(x_mk, weights, scales, zero_points, bits, sizes, group_size, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _linear_cuda(x, weights, scales, zero_points, tables, launches, bits, sizes, group_size, bias=None):  # noqa: ANN001, ANN202
    from taq_kernels import gemm

    _check(x, weights, scales, zero_points, bits, sizes, group_size, bias, packing.packed_sizes)
    if len(tables) != len(launches) // len(gemm.LAUNCH) + 1 or any(table.device != x.device for table in tables):
        raise ValueError(
            f"got {len(tables)} tables and {len(launches)} numbers of launches; needed are those of one `join`, on "
            f"{x.device}"
        )
    x_mk = x.reshape(-1, x.shape[-1])
    # Triton launches on the current device, and an operator in Python gets no guard of its own.
    with torch.cuda.device(x.device):
        y = gemm.linear(x_mk, weights, scales, zero_points, tables, launches, bits, sizes, group_size, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _linear_fake(x, weights, scales, zero_points, tables, launches, bits, sizes, group_size, bias=None):  # noqa: ANN001, ANN202
    return x.new_empty(*x.shape[:-1], sum(sizes))


def _check(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None,
    packed_sizes: Callable[[int, int, int, int], tuple[int, int]],
) -> None:
    """Check that a kernel will find all that it reads: it is given addresses, not tensors.

    What a table says was checked when it was built, and cannot be here: that would wait for the GPU.

    Raises:
        ValueError: names what it would not.
    """
    if x.dim() == 0 or x.dtype not in packing.SCALE_DTYPES:
        raise ValueError(f"got x of {x.dtype} and shape {list(x.shape)}; needed is bf16, fp16 or fp32 [..., K]")
    columns = x.shape[-1]
    if group_size not in packing.GROUP_SIZES or columns == 0 or columns % group_size:
        raise ValueError(
            f"got x with {columns} columns in groups of {group_size}; groups have "
            f"{', '.join(map(str, packing.GROUP_SIZES))} columns, and K is a multiple of them"
        )
    if len(bits) != len(sizes) or not sizes or min(sizes) < 1:
        raise ValueError(f"got bits {list(bits)} for matrices of {list(sizes)} rows; needed is one of each per matrix")
    on_cpu = x.device.type == "cpu"
    allowed = packing.BITS if on_cpu else (*packing.BITS, 16)
    if not set(bits) <= set(allowed):
        raise ValueError(f"got bits {list(bits)}; matrices on {x.device.type} have {', '.join(map(str, allowed))} bits")
    needed_weights = needed_scales = 0
    for matrix_bits, rows in zip(bits, sizes, strict=True):
        weight_count, scale_count = packed_sizes(matrix_bits, rows, columns, group_size)
        needed_weights += weight_count
        needed_scales += scale_count
    needed = [
        ("weights", weights, needed_weights, (torch.uint8 if on_cpu else torch.int16,)),
        ("scales", scales, needed_scales, packing.SCALE_DTYPES),
        ("zero_points", zero_points, needed_scales, (torch.uint8,)),
        ("bias", bias, sum(sizes), (x.dtype,)),
    ]
    for name, tensor, count, dtypes in needed:
        if tensor is None:
            continue
        if (
            tensor.dtype not in dtypes
            or tensor.numel() != count
            or not tensor.is_contiguous()
            or tensor.device != x.device
        ):
            raise ValueError(
                f"got {name} of {tensor.dtype} and shape {list(tensor.shape)} on {tensor.device}; {sum(sizes)} rows at "
                f"{list(bits)} bits and {columns} columns in groups of {group_size}, for x of {x.dtype}, need {count} "
                f"contiguous values of {' or '.join(map(str, dtypes))} on {x.device}. Operands are made by `join`, for "
                "activations with the same number of columns."
            )


def _joined_weights(shards: Sequence[PackedShard]) -> Tensor:
    """The packed weights one after the other, on a CPU in huge pages as `cpu.pack` has them."""
    weights = [shard.weights for shard in shards]
    if len(weights) == 1:
        return weights[0]
    if weights[0].device.type != "cpu":
        return torch.cat(weights)
    return torch.cat(weights, out=cpu.empty_in_huge_pages(sum(map(len, weights)), weights[0].dtype))


def _zero_points(shard: PackedShard) -> Tensor:
    if shard.zero_points is not None:
        return shard.zero_points
    return torch.full_like(shard.scales, 2 ** (shard.bits - 1) if shard.bits < 16 else 0, dtype=torch.uint8)
