"""The product of activations with 4- and 8-bit weights on a CPU.

`lowbit.cpp` does it where it can be had (`cpu_build`) and the CPU has AVX2 or better: all shards of a layer in one
call. Sums are float32 or, with VNNI, exact sums of integers that activations are rounded to; its header has the layout,
and how exact that is. Elsewhere torch's own int4 kernel does, in its own layout (`cpu_packing`), a shard at a time.
Which of the two is a matter of the machine: packed weights are never stored.

With AMX, which multiplies matrices of bf16 several times as fast as FMA (on paper: no such machine was at hand), many
tokens take another way: slabs of weights are rounded to 16 bits and the product is left to torch. The weights are never
held a second time. This gives up two properties of the kernel. Weights and result are both rounded, as where a model is
held in bf16: 1.4 times the error of rounding the result alone. And a token's result depends on the batch: below
AMX_FROM_TOKENS tokens it is the kernel's, from there on this other one.

A process that forks after a product of several threads hangs in the child's first (libgomp), as with torch alone.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from taq_kernels import cpu_build, cpu_packing
from taq_kernels.packing import PackedShard, check_codes

# The numbers of lowbit.cpp.
ISAS = {"AVX2": 1, "AVX-512": 2, "AVX-512 VNNI": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# From this many tokens on, AMX pays for unpacking. An estimate: no such machine was at hand. 64 tokens times
# 4096 x 4096 take the kernel 6.8 ms at 4 bits and 7.4 at 8 (VNNI, one thread of a Xeon, 3 GHz). Unpacking takes 2.9
# and 3.4 (measured), and reading 32 MB of bf16 weights 2.5, which AMX would hardly exceed. Without AMX the kernel is
# the faster one always: from 64 tokens on it multiplies at 75 to 84 % of what vpdpwssd can do.
# From here on, not below, weights are rounded too: 1.4 times the error, and on the other side of this number of tokens
# the same token gets another result.
AMX_FROM_TOKENS = 64
_SLAB_ROWS = 512  # 4 MB of 16-bit weights at K = 4096: some megabytes a core is what L2 and L3 hold

# From this many tokens on, unpacking pays for torch's int4 kernel. Milliseconds per 4096 x 4096 product, one thread of
# a Xeon (AVX-512, no bf16 instructions), int4 kernel / unpack and multiply: 4 bits 22 / 37 at 48 tokens, 29 / 41 at 64,
# 59 / 57 at 128, 244 / 166 at 512; 8 bits 30 / 44 at 32, 46 / 48 at 48, 60 / 51 at 64. (bf16: 73 at 64, 550 at 512.)
BLOCKWISE_FROM_TOKENS = {4: 112, 8: 48}

_TILE_ROWS = 64  # kTile of lowbit.cpp
_HUGE_PAGE = 1 << 21  # bytes; of x86, and of Arm with pages of 4 KB


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> PackedShard:
    """Weights in the layout that `linear` reads on this machine.

    Args:
        codes: [N, K] uint8, 0 .. 2^bits - 1; K a multiple of 32 and of group_size.
        scale: [N, K / group_size] bf16, fp16 or fp32, kept as it is.
        zero_point: [N, K / group_size] uint8 in code units; None means 2^(bits - 1).
        bits: 4 or 8.
        group_size: 128, 64 or 32.

    Raises:
        ValueError: a shape, dtype, device, width or group size other than these.
    """
    check_codes(codes, scale, zero_point, bits, group_size)
    rows, columns = codes.shape
    library = _library()
    if library is None:
        planes = cpu_packing.pack_planes(codes, bits)
        scale_zeros = cpu_packing.pack_scale_zeros(scale, zero_point, bits)
        return PackedShard(bits, rows, columns, group_size, planes.flatten(), scale_zeros.flatten(), None)
    codes = codes.contiguous()
    weights = empty_in_huge_pages(library.lowbit_packed_bytes(bits, rows, columns), torch.uint8)
    library.lowbit_pack(bits, codes.data_ptr(), rows, columns, weights.data_ptr())
    zero_points = None if zero_point is None else _to_tiles(zero_point)
    return PackedShard(bits, rows, columns, group_size, weights, _to_tiles(scale), zero_points)


def unpack(shard: PackedShard) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`, for tests and inspection: codes [N, K], scales and zero points [N, K / group_size].

    In torch's layout a matrix whose zero points are all 2^(bits - 1) can't be told from one that has none.
    """
    bits, rows, columns = shard.bits, shard.rows, shard.columns
    library = _library()
    if library is None:
        planes, scale_zeros = _planes(shard.weights, shard.scales, bits, rows, columns, shard.group_size)
        scale, zero_point = cpu_packing.unpack_scale_zeros(scale_zeros, bits)
        codes = cpu_packing.unpack_planes(planes, bits)[:rows]
        scale, zero_point = (values.t()[:rows].contiguous() for values in (scale, zero_point))
        symmetric = bool((zero_point == 2 ** (bits - 1)).all())
        return codes, scale.to(shard.scales.dtype), None if symmetric else zero_point.to(torch.uint8)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    library.lowbit_unpack(bits, shard.weights.data_ptr(), rows, columns, codes.data_ptr())
    groups = columns // shard.group_size
    zero_point = None if shard.zero_points is None else _from_tiles(shard.zero_points, rows, groups)
    return codes, _from_tiles(shard.scales, rows, groups), zero_point


def linear(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """x @ [W_0; W_1; ...]^T + bias for shards of different bits, with the fastest code that this CPU has.

    Args:
        x: [M, K] bf16, fp16 or fp32, contiguous.
        weights: the shards' packed weights, one after the other.
        scales: the same of their scales.
        zero_points: the same of their zero points, or None.
        bits: per shard 4 or 8.
        sizes: per shard N_i, its rows.
        group_size: 128, 64 or 32.
        bias: [sum N_i] in the dtype of x, or None.

    Returns:
        [M, sum N_i] in the dtype of x. With VNNI a token that has an infinity is all NaN.
    """
    if _library() is None:
        return _linear_planes(x, weights, scales, bits, sizes, group_size, bias)
    if x.shape[0] >= AMX_FROM_TOKENS and _has_amx(x.dtype):
        return linear_dequantized(x, weights, scales, zero_points, bits, sizes, group_size, bias)
    return linear_with(_best_isa(x.dtype), x, weights, scales, zero_points, bits, sizes, group_size, bias)


def linear_with(
    isa: int,
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """`linear` by the compiled kernel for one instruction set, one of `ISAS`.

    Raises:
        ValueError: bits other than 4 and 8, or the CPU lacks the instruction set, or it is VNNI and x is float32.
        MemoryError: no memory for x in the kernel's layout.
    """
    (shards, bits_address, sizes_address, total), _arrays = _shards(tuple(bits), tuple(sizes))
    tokens, columns = x.shape
    y = x.new_empty(tokens, total)
    status = _library().lowbit_linear(
        isa,
        torch.get_num_threads(),
        _DTYPES[x.dtype],
        x.data_ptr(),
        tokens,
        columns,
        group_size,
        shards,
        bits_address,
        sizes_address,
        weights.data_ptr(),
        scales.data_ptr(),
        _DTYPES[scales.dtype],
        None if zero_points is None else zero_points.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    _check(status, bits, isa, x.dtype)
    return y


def linear_dequantized(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """`linear` by torch's product with slabs of weights that are rounded to the dtype of x; so is the result, once.

    Raises:
        ValueError: bits other than 4 and 8.
        MemoryError: no memory for unpacking.
    """
    library, isa = _library(), _best_isa(torch.float32)
    columns, groups = x.shape[1], x.shape[1] // group_size
    y = x.new_empty(x.shape[0], sum(sizes))
    weight, tile, out = weights.data_ptr(), 0, 0
    for shard_bits, rows in zip(bits, sizes, strict=True):
        for start in range(0, rows, _SLAB_ROWS):
            count = min(_SLAB_ROWS, rows - start)
            tiles = -(-count // _TILE_ROWS)
            slab = x.new_empty(columns, tiles * _TILE_ROWS)
            group = tile * groups * _TILE_ROWS
            status = library.lowbit_dequantize(
                isa,
                torch.get_num_threads(),
                shard_bits,
                count,
                columns,
                group_size,
                weight,
                scales.data_ptr() + group * scales.element_size(),
                _DTYPES[scales.dtype],
                None if zero_points is None else zero_points.data_ptr() + group,
                _DTYPES[x.dtype],
                slab.data_ptr(),
            )
            _check(status, bits, isa, x.dtype)
            part, slab = slice(out, out + count), slab[:, :count]
            # addmm adds the bias to float32 sums.
            y[:, part] = x @ slab if bias is None else torch.addmm(bias[part], x, slab)
            weight += library.lowbit_packed_bytes(shard_bits, count, columns)
            tile += tiles
            out += count
    return y


def packed_sizes(bits: int, rows: int, columns: int, group_size: int) -> tuple[int, int]:
    """Bytes of weights, and values of scales, that a matrix takes once it is packed on this machine."""
    groups = columns // group_size
    if _library() is None:
        padded = cpu_packing.padded_rows(rows)
        return padded * columns * bits // 8, groups * padded * 2 * (bits // 4)
    padded = -(-rows // _TILE_ROWS) * _TILE_ROWS
    return padded * columns * bits // 8, groups * padded


def empty_in_huge_pages(count: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor for what is read from end to end, in pages of 2 MB as far as Linux gives them on request.

    One token through 8 MB of 4-bit weights takes 0.58 ms so and 0.68 ms in pages of 4 KB (a Xeon, 3 GHz): the hardware
    fetches ahead up to the end of a page. Memory of malloc would not do: what was used before keeps its pages.
    """
    size = count * dtype.itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _HUGE_PAGE
    # Not what is left of the last one, which would be paid in full.
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, offset, size // _HUGE_PAGE * _HUGE_PAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def supports(isa: int) -> bool:
    """Whether there is a compiled kernel and the CPU has what one of its instruction sets, of `ISAS`, needs."""
    return _library() is not None and bool(_library().lowbit_supported(isa))


def is_built() -> bool:
    """Whether `lowbit.cpp` multiplies here, not torch's int4 kernel."""
    return _library() is not None


def kernel_name() -> str:
    """What computes `linear` on bf16 activations, for logs."""
    if not is_built():
        return f"torch int4 ({torch.backends.cpu.get_cpu_capability()})"
    best = _best_isa(torch.bfloat16)
    name = next(name for name, isa in ISAS.items() if isa == best)
    return f"lowbit ({name}, AMX from {AMX_FROM_TOKENS} tokens)" if _has_amx(torch.bfloat16) else f"lowbit ({name})"


def _linear_planes(x, weights, scales, bits, sizes, group_size, bias):  # noqa: ANN001, ANN202
    """`linear` in torch's kernels: x [M, K], flat weights and scales to [M, sum N_i]."""
    columns = x.shape[1]
    outs, weight, scale = [], 0, 0
    for shard_bits, rows in zip(bits, sizes, strict=True):
        weight_count, scale_count = packed_sizes(shard_bits, rows, columns, group_size)
        weight_end, scale_end = weight + weight_count, scale + scale_count
        planes, scale_zeros = _planes(
            weights[weight:weight_end], scales[scale:scale_end], shard_bits, rows, columns, group_size
        )
        weight, scale = weight_end, scale_end
        if x.shape[0] >= BLOCKWISE_FROM_TOKENS[shard_bits]:
            out = _linear_blockwise(x, planes, scale_zeros, shard_bits, group_size)
        else:
            repeated = torch.cat([x, x], dim=1) if shard_bits == 8 else x
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(repeated, planes, group_size, scale_zeros.to(x.dtype))
        outs.append(out[:, :rows])
    y = torch.cat(outs, dim=1)
    return y if bias is None else y.add_(bias)


def _linear_blockwise(x: Tensor, planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """x [M, K] times one shard's `_planes`: [M, padded N]."""
    # The weights are rounded to x's dtype first: the product is then that of the same model held in 16 bits.
    # Without 16-bit multiply-add instructions float32 multiplies five times as fast (measured, AVX-512).
    dtype = x.dtype if _multiplies_natively(x.dtype) else torch.float32
    out = x.new_empty(x.shape[0], planes.shape[0])
    x_multiplied = x.to(dtype)
    for start, stop in cpu_packing.bounds(planes.shape[0]):
        rows = slice(start, stop)
        weights = cpu_packing.dequantize_block(planes[rows], scale_zeros[:, rows], bits, group_size, x.dtype)
        out[:, rows] = x_multiplied @ weights.to(dtype)
    return out


def _planes(
    weights: Tensor, scales: Tensor, bits: int, rows: int, columns: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """A shard's flat tensors as `cpu_packing` has them: [padded N, planes * K / 2], [planes * G, padded N, 2]."""
    padded = cpu_packing.padded_rows(rows)
    return weights.view(padded, columns * bits // 8), scales.view(bits // 4 * (columns // group_size), padded, 2)


def _to_tiles(values: Tensor) -> Tensor:
    """[N, G] to the flat order [tiles, G, 64]; padded rows are 0."""
    rows, groups = values.shape
    tiles = -(-rows // _TILE_ROWS)
    padded = values.new_zeros(tiles * _TILE_ROWS, groups)
    padded[:rows] = values
    return padded.view(tiles, _TILE_ROWS, groups).transpose(1, 2).flatten()


def _from_tiles(values: Tensor, rows: int, groups: int) -> Tensor:
    return values.view(-1, groups, _TILE_ROWS).transpose(1, 2).reshape(-1, groups)[:rows].contiguous()


@lru_cache(maxsize=4096)
def _shards(bits: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, int, int, int], tuple]:
    """What C is told about a layer's shards: their number, the addresses of their bits and rows; and all rows."""
    array = ctypes.c_int64 * len(bits)
    arrays = array(*bits), array(*sizes)
    # The arrays live as long as their addresses: both are in the cache.
    return (len(bits), ctypes.addressof(arrays[0]), ctypes.addressof(arrays[1]), sum(sizes)), arrays


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel with its functions' types, if the CPU has an instruction set that it can use."""
    library = cpu_build.library()
    if library is None:
        return None
    integer, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.lowbit_supported.argtypes = [integer]
    library.lowbit_best.argtypes = [integer]
    library.lowbit_packed_bytes.argtypes = [integer, long, long]
    library.lowbit_packed_bytes.restype = long
    for function in (library.lowbit_pack, library.lowbit_unpack):
        function.argtypes = [integer, pointer, long, long, pointer]
        function.restype = None
    library.lowbit_linear.argtypes = [integer, integer, integer, pointer, long, long, integer, integer]
    library.lowbit_linear.argtypes += [pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer]
    library.lowbit_dequantize.argtypes = [integer, integer, integer, long, long, integer]
    library.lowbit_dequantize.argtypes += [pointer, pointer, integer, pointer, integer, pointer]
    return library if library.lowbit_best(_DTYPES[torch.float32]) else None


@cache
def _best_isa(dtype: torch.dtype) -> int:
    return _library().lowbit_best(_DTYPES[dtype])


def _check(status: int, bits: Sequence[int], isa: int, dtype: torch.dtype) -> None:
    """Raises what a status of lowbit.cpp means."""
    if status == 1:
        raise MemoryError("no memory for what the kernel unpacks and lays out anew")
    if status:
        raise ValueError(
            f"the CPU kernel can't multiply {dtype} by {list(bits)} bits with instruction set {isa} of {ISAS}: "
            "needed are 4 or 8 bits and an instruction set that this CPU has; VNNI takes activations of 16 bits alone"
        )


def _has_amx(dtype: torch.dtype) -> bool:
    return _has_instructions(dtype, "amx_")


def _multiplies_natively(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or _has_instructions(dtype, "amx_", "avx512_", "")


@cache
def _has_instructions(dtype: torch.dtype, *families: str) -> bool:
    """Whether torch sees one of these families of instructions for a 16-bit dtype; "" is Arm's."""
    suffix = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return any(torch.cpu.get_capabilities().get(f"{family}{suffix}", False) for family in families)
