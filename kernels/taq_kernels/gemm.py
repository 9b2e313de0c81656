"""The product of activations with a matrix whose tiles have 4, 8 or 16 bits: one Triton kernel, one launch.

y^T = W x^T: the weights are the M side of the matrix instruction. A tile of 128 rows then fills it whatever the number
of tokens, and on Hopper unpacked weights go from registers straight into wgmma, never through shared memory.

Why it looks like this: on an H200, 4-bit weights at the speed of memory leave 4.0 instructions per weight and lane
(132 SM x 128 lanes x 1.98 GHz / (4.3 TB/s / 0.516 byte)), 8-bit ones 7.9. Converting integers and multiplying each by
its scale costs 7.7 to 8.4 of them; this kernel compiles to less than 2.7 and 3.8 (16 tokens, symmetric; with zero
points 8 bits take 4.05). `python -m tests.sass` prints them.

Nothing here has been timed on a GPU. Constants are marked *counted* (from compiled code, held by tests), *inferred*
(arithmetic on published speeds) or *estimate*; none is measured.

In order: layout (work items), unpacking, loops, epilogue, dequantization, configurations, tables, launcher. The tiles
themselves are `packing`'s. Needs triton, so it is imported only where a GPU is used.
"""

# Triton's functions get types when they are traced; `if CONSTEXPR:` around an `if` decides while tracing.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from taq_kernels import packing

# ---------------------------------------------------------------------------------------------------- layout

# A work item is a row of an int32 table: one program sums one tile over one part of K. Its columns:
#   bits     4, 8 or 16
#   weights  where the tile begins in the store, in units of 32 words (64 bytes)
#   scales   where its scales and zero points begin, in units of 128 values
#   row      its first row of the result
#   rows     how many: 128; the last tile of a shard may have fewer
#   part     which part of the K / 128 blocks: [part * blocks / parts, (part + 1) * blocks / parts)
#   parts    into how many K is cut for this tile
#   slot     with parts > 1: where its partial sums begin in the workspace; part i has slot + i
ITEM = ("bits", "weights", "scales", "row", "rows", "part", "parts", "slot")

# The kernel's view of `packing`: what a jitted function reads must be a constexpr.
_ROWS = tl.constexpr(packing.TILE_ROWS)
_BLOCK = tl.constexpr(packing.BLOCK)
_WORDS = tl.constexpr(packing.WORDS)
_LINE = tl.constexpr(packing.DENSE_LINE)
_ITEM = tl.constexpr(len(ITEM))

# ---------------------------------------------------------------------------------------------------- unpacking

# A small integer in the lowest mantissa bits of 128 (bf16: 7 of them) or 1024 (fp16: 10) is that number plus the
# integer: one lop3 instead of a conversion. One fma then subtracts 128 or 1024 together with the zero point, exactly:
# both operands and the difference have at most 8 (fp16: 11) significant bits.
_MAGIC = {"bf16": 0x4300, "fp16": 0x6400}
_ONE = {"bf16": 0x3F80, "fp16": 0x3C00}
_FMA = {"bf16": "fma.rn.bf16x2", "fp16": "fma.rn.f16x2"}  # add.bf16x2 would need sm_90; fma.rn.bf16x2 is sm_80

_AND_OR, _AND_XOR, _SELECT = "0xEA", "0x6A", "0xE4"  # lop3: (a & b) | c;  (a & b) ^ c;  c ? a : b, bit by bit


@cache
def unpack_asm(bits: int, dtype: str, symmetric: bool) -> str:
    """PTX that turns two neighbouring words of each plane into eight 16-bit floats, code - zero point.

    Registers hold two words or two floats. $0..$3 are the results: columns w, 32 + w, 64 + w, 96 + w of the block; then
    the word of the (high) plane, that of the low plane for 8 bits, and one addend per result (`addend_base`).

    In bf16 an 8-bit code has one bit more than the mantissa: the lower seven become 128 + them, the top one becomes
    -128 if set and -256 if not, and their sum is code - 128. So a symmetric zero point costs nothing, any other an fma
    more. (Zero points could be folded through sum(x) instead, which saves an fma for two weights. They are subtracted
    because that is exact, needs no sum(x) in every program, and what it costs is inside the budget: counted, 2.6 of 4.0
    instructions for 4 bits, 4.1 of 7.9 for 8.)

    Args:
        bits: 4 or 8.
        dtype: "bf16" or "fp16".
        symmetric: whether the zero point is 2^(bits - 1).
    """
    magic, one, fma = _twice(_MAGIC[dtype]), _twice(_ONE[dtype]), _FMA[dtype]
    lines = [".reg .b32 one, word, low, even, odd, top;", f"mov.b32 one, {one};"]
    if bits == 4:
        for j in range(4):
            word = "word" if j else "$4"
            if j:
                lines.append(f"shr.u32 word, $4, {4 * j};")
            lines.append(f"lop3.b32 ${j}, {word}, 0x000F000F, {magic}, {_AND_OR};")
            lines.append(f"{fma} ${j}, ${j}, one, ${5 + j};")
    else:
        # Nibbles of the high plane are in order 0 1 2 3, of the low plane in order 1 0 3 2: half of each makes bytes.
        lines.append(f"lop3.b32 odd, $4, $5, 0xF0F0F0F0, {_SELECT};")
        lines.append("shl.b32 word, $4, 4;")
        lines.append("shr.u32 low, $5, 4;")
        lines.append(f"lop3.b32 even, word, low, 0xF0F0F0F0, {_SELECT};")
        for j in range(4):
            byte = ("even", "odd")[j % 2]
            if j >= 2:
                lines.append(f"shr.u32 word, {byte}, 8;")
                byte = "word"
            if dtype == "bf16":
                lines.append(f"lop3.b32 ${j}, {byte}, 0x007F007F, {magic}, {_AND_OR};")
                lines.append(f"lop3.b32 top, {byte}, 0x00800080, 0xC380C380, {_AND_XOR};")  # -128 or -256
                lines.append(f"{fma} ${j}, ${j}, one, top;")
            else:
                lines.append(f"lop3.b32 ${j}, {byte}, 0x00FF00FF, {magic}, {_AND_OR};")
            if dtype == "fp16" or not symmetric:
                lines.append(f"{fma} ${j}, ${j}, one, ${6 + j};")
    return "{\n" + "\n".join(lines) + "\n}"


def addend_base(bits: int, dtype: str) -> int:
    """What `unpack_asm` adds to a float is this minus the zero point: an integer that both formats hold exactly."""
    if dtype == "fp16":
        return -1024
    return -128 if bits == 4 else 128


def _twice(half: int) -> str:
    return f"0x{half:04X}{half:04X}"


@triton.jit
def _unpack(words_ptrs, low_ptrs, addends, BITS: tl.constexpr, ASM: tl.constexpr, COMPUTE: tl.constexpr):
    """One block of a 4- or 8-bit tile as four [128, 32] tensors of code - zero point: columns 32 j + w are the j-th."""
    words = tl.load(words_ptrs, eviction_policy="evict_first")
    if BITS == 8:
        low = tl.load(low_ptrs, eviction_policy="evict_first")
    if ASM is None:
        first = words.to(tl.int32)
        if BITS == 4:
            q0, q1, q2, q3 = first & 15, (first >> 4) & 15, (first >> 8) & 15, (first >> 12) & 15
        else:
            second = low.to(tl.int32)
            q0 = (first & 15) << 4 | (second >> 4) & 15
            q1 = first & 240 | second & 15
            q2 = (first >> 4) & 240 | (second >> 12) & 15
            q3 = (first >> 8) & 240 | (second >> 8) & 15
        return (
            q0.to(COMPUTE) + addends[0],
            q1.to(COMPUTE) + addends[1],
            q2.to(COMPUTE) + addends[2],
            q3.to(COMPUTE) + addends[3],
        )
    else:
        # pack=2: a register holds two words, and one of each result's 16-bit floats for either. The results are called
        # int16 first, because a dtype here must be a literal.
        if BITS == 4:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                ASM,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [words, addends[0], addends[1], addends[2], addends[3]],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        else:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                ASM,
                "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
                [words, low, addends[0], addends[1], addends[2], addends[3]],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        return (
            q0.to(COMPUTE, bitcast=True),
            q1.to(COMPUTE, bitcast=True),
            q2.to(COMPUTE, bitcast=True),
            q3.to(COMPUTE, bitcast=True),
        )


@triton.jit
def _addend(zero_points, BASE: tl.constexpr, COMPUTE: tl.constexpr):
    """BASE - zero point of 128 rows as [128, 32], without converting integers: 2^23 + z has the bits 0x4B000000 | z."""
    shifted = (zero_points.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.broadcast_to((BASE + 8388608.0 - shifted).to(COMPUTE)[:, None], (_ROWS, _WORDS))


@triton.jit
def _addends(zero_points, BITS: tl.constexpr, BASE: tl.constexpr, COMPUTE: tl.constexpr):
    """The addend of each of the four results of `_unpack`; `zero_points` are those of the block's groups, or ()."""
    if len(zero_points) == 0:
        same = tl.full((_ROWS, _WORDS), BASE - 2 ** (BITS - 1), COMPUTE)
        return same, same, same, same
    elif len(zero_points) == 1:
        same = _addend(zero_points[0], BASE, COMPUTE)
        return same, same, same, same
    elif len(zero_points) == 2:
        first, second = _addend(zero_points[0], BASE, COMPUTE), _addend(zero_points[1], BASE, COMPUTE)
        return first, first, second, second
    else:
        return (
            _addend(zero_points[0], BASE, COMPUTE),
            _addend(zero_points[1], BASE, COMPUTE),
            _addend(zero_points[2], BASE, COMPUTE),
            _addend(zero_points[3], BASE, COMPUTE),
        )


@triton.jit
def _load_groups(ptrs, offset, GROUPS: tl.constexpr):
    """Scales or zero points of a block: one [128] for each group in it; none where there are none."""
    if ptrs is None:
        return ()
    elif GROUPS == 1:
        return (tl.load(ptrs + offset),)
    elif GROUPS == 2:
        return tl.load(ptrs + offset), tl.load(ptrs + offset + _ROWS)
    else:
        return (
            tl.load(ptrs + offset),
            tl.load(ptrs + offset + _ROWS),
            tl.load(ptrs + offset + 2 * _ROWS),
            tl.load(ptrs + offset + 3 * _ROWS),
        )


# ---------------------------------------------------------------------------------------------------- loops


@triton.jit
def _columns(quarters, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH columns from quarter FIRST on: [128, 32] pieces side by side, which moves nothing between registers."""
    if WIDTH == 32:
        return quarters[FIRST]
    elif WIDTH == 64:
        pair = tl.join(quarters[FIRST], quarters[FIRST + 1])
        return tl.reshape(tl.permute(pair, (0, 2, 1)), (_ROWS, 64))
    else:
        pairs = tl.join(tl.join(quarters[0], quarters[1]), tl.join(quarters[2], quarters[3]))
        return tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), (_ROWS, 128))


@triton.jit
def _load_x(x_ptr, offs_m, M, K, column, WIDTH: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr):
    """x^T [WIDTH, BLOCK_M] from a column on; zeros beyond M and K."""
    offs_k = column + tl.arange(0, WIDTH)
    mask = (offs_m < M)[None, :]
    if not EVEN_K:
        mask = mask & (offs_k < K)[:, None]
    return tl.load(x_ptr + offs_m[None, :] * K + offs_k[:, None], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def _sum_codes(
    x_ptr,
    words_ptrs,
    low_ptrs,
    step,
    scale_ptrs,
    zero_ptrs,
    begin,
    end,
    offs_m,
    M,
    K,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
    BASE: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    ZEROS_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[128, BLOCK_M] fp32: blocks begin .. end of a 4- or 8-bit tile times x^T; each group's sum is scaled once."""
    GROUPS: tl.constexpr = _BLOCK // GROUP_SIZE
    # One matrix product a group where its operand comes from registers (wgmma: one wait instead of four); else four.
    WIDTH: tl.constexpr = GROUP_SIZE if WIDE else 32
    acc = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
    group_step = GROUPS * _ROWS
    # One block ahead: a load of 256 bytes is too small for the asynchronous copies that bring the weights.
    next_scales = _load_groups(scale_ptrs, begin * group_step, GROUPS)
    next_zeros = _load_groups(zero_ptrs, begin * group_step, GROUPS)
    for block in tl.range(begin, end, num_stages=STAGES):
        scales, zeros = next_scales, next_zeros
        if not ZEROS_AHEAD:
            zeros = _load_groups(zero_ptrs, block * group_step, GROUPS)
        ahead = tl.minimum(block + 1, end - 1)
        next_scales = _load_groups(scale_ptrs, ahead * group_step, GROUPS)
        next_zeros = _load_groups(zero_ptrs, ahead * group_step, GROUPS)
        addends = _addends(zeros, BITS, BASE, COMPUTE)
        quarters = _unpack(words_ptrs + block * step, low_ptrs + block * step, addends, BITS, ASM, COMPUTE)
        group_sum = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
        for i in tl.static_range(_BLOCK // WIDTH):
            scale = scales[i * WIDTH // GROUP_SIZE].to(tl.float32)[:, None]
            w = _columns(quarters, i * WIDTH // _WORDS, WIDTH)
            x = _load_x(x_ptr, offs_m, M, K, block * _BLOCK + i * WIDTH, WIDTH, EVEN_K, COMPUTE)
            group_sum = tl.dot(w, x, acc=group_sum)
            if (i + 1) * WIDTH % GROUP_SIZE == 0:
                acc += group_sum * scale
                group_sum = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
    return acc


@triton.jit
def _sum_dense(
    x_ptr,
    line_ptrs,
    step,
    begin,
    end,
    offs_m,
    M,
    K,
    COMPUTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[128, BLOCK_M] fp32: steps begin .. end, of 64 columns, of a 16-bit tile times x^T."""
    acc = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
    for line in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(line_ptrs + line * step, eviction_policy="evict_first").to(COMPUTE)
        acc = tl.dot(w, _load_x(x_ptr, offs_m, M, K, line * _LINE, _LINE, EVEN_K, COMPUTE), acc=acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    weights_ptr,  # int16 words, tile after tile
    scales_ptr,  # [.., 128] bf16, fp16 or fp32
    zeros_ptr,  # [.., 128] uint8, or None: symmetric
    bias_ptr,  # [N] or None
    items_ptr,  # [items, 8] int32
    y_ptr,  # [M, N], dtype of x
    partials_ptr,  # [slots, M blocks, 128, BLOCK_M] fp32
    arrivals_ptr,  # [slots, M blocks] int32, zero before and after
    M,
    K,
    N,
    ASM_4: tl.constexpr,  # None: no inline assembly
    ASM_8: tl.constexpr,
    BASE_4: tl.constexpr,
    BASE_8: tl.constexpr,
    HAS_4: tl.constexpr,
    HAS_8: tl.constexpr,
    HAS_16: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of x; fp32 in Triton's interpreter, which computes bf16 wrongly
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
    ZEROS_AHEAD: tl.constexpr,
    STAGES_4: tl.constexpr,
    STAGES_8: tl.constexpr,
    STAGES_16: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y = x W^T + bias. Grid: (M blocks, items); blocks of one tile run together and share its weights in L2."""
    pid_m = tl.program_id(0)
    item_ptr = items_ptr + tl.program_id(1) * _ITEM
    bits = tl.load(item_ptr)
    tile_ptr = weights_ptr + tl.load(item_ptr + 1).to(tl.int64) * _WORDS
    group_row = tl.load(item_ptr + 2).to(tl.int64)
    row = tl.load(item_ptr + 3)
    rows = tl.load(item_ptr + 4)
    part = tl.load(item_ptr + 5)
    parts = tl.load(item_ptr + 6)
    slot = tl.load(item_ptr + 7)

    blocks = (K + _BLOCK - 1) // _BLOCK
    begin = part * blocks // parts
    end = (part + 1) * blocks // parts
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, _ROWS)
    # Rows that a ragged tile does not have are computed as copies of its last one and not stored.
    stored_n = tl.minimum(offs_n, rows - 1)
    words_ptrs = tile_ptr + stored_n[:, None] * _WORDS + tl.arange(0, _WORDS)[None, :]
    step = rows * _WORDS
    scale_ptrs = scales_ptr + group_row * _ROWS + offs_n
    zero_ptrs = None
    if zeros_ptr is not None:
        zero_ptrs = zeros_ptr + group_row * _ROWS + offs_n

    acc = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
    if HAS_4:
        if bits == 4:
            acc = _sum_codes(
                x_ptr, words_ptrs, words_ptrs, step, scale_ptrs, zero_ptrs, begin, end, offs_m, M, K,
                BITS=4, ASM=ASM_4, BASE=BASE_4, COMPUTE=COMPUTE, GROUP_SIZE=GROUP_SIZE, EVEN_K=EVEN_K,
                BLOCK_M=BLOCK_M, WIDE=WIDE, ZEROS_AHEAD=ZEROS_AHEAD, STAGES=STAGES_4,
            )  # fmt: skip
    if HAS_8:
        if bits == 8:
            acc = _sum_codes(
                x_ptr, words_ptrs, words_ptrs + blocks * step, step, scale_ptrs, zero_ptrs, begin, end, offs_m, M, K,
                BITS=8, ASM=ASM_8, BASE=BASE_8, COMPUTE=COMPUTE, GROUP_SIZE=GROUP_SIZE, EVEN_K=EVEN_K,
                BLOCK_M=BLOCK_M, WIDE=WIDE, ZEROS_AHEAD=ZEROS_AHEAD, STAGES=STAGES_8,
            )  # fmt: skip
    if HAS_16:
        if bits == 16:
            values_ptr = tile_ptr.to(tl.pointer_type(x_ptr.dtype.element_ty), bitcast=True)
            line_ptrs = values_ptr + stored_n[:, None] * _LINE + tl.arange(0, _LINE)[None, :]
            acc = _sum_dense(
                x_ptr, line_ptrs, rows * _LINE, 2 * begin, 2 * end, offs_m, M, K, COMPUTE, EVEN_K, BLOCK_M, STAGES_16
            )

    # ------------------------------------------------------------------------------------------------ epilogue

    if SPLIT:
        if parts > 1:
            # Each part leaves its sum in its own slot; whoever arrives last adds all of them, in order of the parts, so
            # that the result does not depend on who that is.
            offs = offs_n[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            slot_step = tl.num_programs(0) * _ROWS * BLOCK_M
            first_ptrs = partials_ptr + slot.to(tl.int64) * slot_step + pid_m * _ROWS * BLOCK_M + offs
            tl.store(first_ptrs + part * slot_step, acc)
            # All threads' stores before the one thread's release; its acquire before all threads' loads.
            tl.debug_barrier()
            arrival_ptr = arrivals_ptr + slot * tl.num_programs(0) + pid_m
            if tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu") < parts - 1:
                return
            tl.store(arrival_ptr, 0)
            acc = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
            for i in range(parts):
                acc += tl.load(first_ptrs + i * slot_step, cache_modifier=".cg")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row + stored_n).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_m[None, :] * N + (row + offs_n)[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < M)[None, :] & (offs_n < rows)[:, None])


# ---------------------------------------------------------------------------------------------------- dequantization


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(
    weights_ptr,  # int16, from the first tile on
    scales_ptr,  # [tiles, groups, 128]
    zeros_ptr,  # the same in uint8, or None: symmetric
    out_ptr,  # [rows, K] bf16, fp16 or fp32
    rows,
    K,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Weights of whole tiles, rounded once. Grid: (K / 128 blocks, tiles); bound by memory, so written plainly."""
    block = tl.program_id(0)
    tile = tl.program_id(1)
    blocks = tl.num_programs(0)
    tile_rows = tl.minimum(rows - tile * _ROWS, _ROWS)
    offs_n = tl.arange(0, _ROWS)
    stored_n = tl.minimum(offs_n, tile_rows - 1)[:, None]
    tile_ptr = weights_ptr + tile.to(tl.int64) * (_ROWS * _WORDS * BITS // 4) * blocks
    out_ptrs = out_ptr + (tile * _ROWS + offs_n).to(tl.int64)[:, None] * K
    mask_n = (offs_n < tile_rows)[:, None]
    step = tile_rows * _WORDS
    if BITS == 16:
        lane = tl.arange(0, _LINE)[None, :]
        for i in tl.static_range(2):
            line = block * 2 + i
            values = tl.load(tile_ptr + line * tile_rows * _LINE + stored_n * _LINE + lane)
            mask = mask_n & (line * _LINE + lane < K)
            tl.store(out_ptrs + line * _LINE + lane, values.to(out_ptr.dtype.element_ty, bitcast=True), mask=mask)
    else:
        GROUPS: tl.constexpr = _BLOCK // GROUP_SIZE
        group_offset = (tile * blocks + block) * GROUPS * _ROWS
        scales = _load_groups(scales_ptr + offs_n, group_offset, GROUPS)
        zero_ptrs = None
        if zeros_ptr is not None:
            zero_ptrs = zeros_ptr + offs_n
        addends = _addends(_load_groups(zero_ptrs, group_offset, GROUPS), BITS, 0, tl.float32)
        words_ptrs = tile_ptr + block * step + stored_n * _WORDS + tl.arange(0, _WORDS)[None, :]
        quarters = _unpack(words_ptrs, words_ptrs + blocks * step, addends, BITS, None, tl.float32)
        for i in tl.static_range(GROUPS):
            w = _columns(quarters, i * GROUP_SIZE // _WORDS, GROUP_SIZE) * scales[i].to(tl.float32)[:, None]
            offs_k = block * _BLOCK + i * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
            tl.store(out_ptrs + offs_k, w.to(out_ptr.dtype.element_ty), mask=mask_n & (offs_k < K))


# ---------------------------------------------------------------------------------------------------- configurations

# Numbers of tokens up to which a configuration serves. More are left to the vendor's product of dequantized weights:
# at 1024 tokens and gate_up's shape that reaches 0.82 of its own speed on 16-bit weights (inferred).
BUCKETS = (16, 32, 64, 128, 256)

# Tokens of one program: sums of 256 leave no registers for the operands (counted: they spill, in the loop).
BLOCK_MS = (16, 32, 64, 128)

# Bytes that the dequantized rows of one vendor product may take: large enough to fill a GPU with work (estimate).
_SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Config:
    """How one bucket of one layer is computed. All that tuning may choose.

    Attributes:
        block_m: tokens of a program; one of BLOCK_MS.
        num_warps: of a program.
        stages_4: blocks in flight in the loop over 4-bit tiles.
        stages_8: the same for 8-bit tiles.
        stages_16: the same for 16-bit tiles, in steps of 64 columns.
        wide: one matrix product a group instead of one every 32 columns. For wgmma and tcgen05 (num_warps 4 or 8 on
            sm_90 and sm_100): fewer waits; elsewhere it costs instructions (counted).
        programs_per_sm: K is split until about so many programs share a multiprocessor.
        dequantize: leave the product to the vendor's library.
    """

    block_m: int
    num_warps: int
    stages_4: int
    stages_8: int
    stages_16: int
    wide: bool
    programs_per_sm: int
    dequantize: bool

    def stages(self, bits: int) -> int:
        """Of the loop over tiles of these bits."""
        return {4: self.stages_4, 8: self.stages_8, 16: self.stages_16}[bits]


@dataclass(frozen=True)
class _Architecture:
    shared_kib: int  # that one program may have
    blocks: dict[int, tuple[int, int]]  # block_m: warps of a program, programs that fit on a multiprocessor


# Counted: registers and shared memory of the variants in tests/test_gemm_compile.py allow these programs; with these
# warps none spills up to block_m 32, nor in a loop above (but on sm_100 at 16 tokens, with zero points in groups of
# 32: two registers). On sm_100 two warps use mma.sync, which at 16 tokens compiles to fewer instructions than tcgen05
# (2.1 against 2.5 per weight) and waits for less.
_SMALL_SHARED = {16: (4, 2), 32: (4, 2), 64: (8, 1), 128: (8, 1)}
_ARCHITECTURES = {
    80: _Architecture(163, {16: (4, 3), 32: (4, 2), 64: (8, 1), 128: (8, 1)}),
    86: _Architecture(99, _SMALL_SHARED),
    89: _Architecture(99, _SMALL_SHARED),
    90: _Architecture(227, {16: (4, 3), 32: (4, 2), 64: (4, 2), 128: (8, 1)}),
    100: _Architecture(227, {16: (2, 4), 32: (4, 2), 64: (4, 2), 128: (8, 1)}),
    120: _Architecture(99, _SMALL_SHARED),
}

# What tuning tries (estimate). At 128 tokens the sums of a tile and of its group are all of a thread's registers with 4
# warps: the loop spills (counted).
_WARPS = {16: (2, 4), 32: (2, 4), 64: (4, 8), 128: (8,)}
_PROGRAMS_PER_SM = (1, 2, 3, 4, 6)


def heuristic(shapes: Sequence[tuple[int, int]], columns: int, arch: int, num_sms: int, bucket: int) -> Config:
    """The configuration for a GPU and shape that nobody has tuned.

    Args:
        shapes: bits and rows of each shard.
        columns: K.
        arch: compute capability, 90 for 9.0.
        num_sms: multiprocessors of the GPU.
        bucket: one of BUCKETS.

    Raises:
        ValueError: the GPU is older than compute capability 8.0.
    """
    architecture = _architecture(arch)
    block_m = min(bucket, BLOCK_MS[-1])
    num_warps, programs = architecture.blocks[block_m]
    wide = _has_wide(arch, num_warps)
    # A program may use its share of a multiprocessor's shared memory, of which each takes 1 KiB more than it asks for.
    share = ((architecture.shared_kib + 1) // programs - 1) * 1024
    # Three or four blocks in flight are 48 KiB or more a multiprocessor; 23 KiB hide 700 ns at 4.3 TB/s (inferred).
    stages = [
        max(s for s in range(2, most + 1) if s == 2 or shared_bytes(arch, bits, s, block_m, num_warps, wide) <= share)
        for bits, most in ((4, 4), (8, 3), (16, 3))
    ]
    return Config(
        block_m=block_m,
        num_warps=num_warps,
        stages_4=stages[0],
        stages_8=stages[1],
        stages_16=stages[2],
        wide=wide,
        programs_per_sm=min(
            range(1, 2 * programs + 1),
            key=lambda target: _relative_time(
                shapes, columns, block_m, -(-bucket // block_m), target * num_sms, programs * num_sms
            ),
        ),
        dequantize=False,
    )


def candidates(shapes: Sequence[tuple[int, int]], columns: int, arch: int, num_sms: int, bucket: int) -> list[Config]:
    """What tuning tries; `heuristic` first. Arguments and errors are its."""
    first = heuristic(shapes, columns, arch, num_sms, bucket)
    most_shared = _architecture(arch).shared_kib * 1024
    bases = [first]
    if first.block_m > 32:  # the same tokens in twice as many programs of half as many
        bases.append(heuristic(shapes, columns, arch, num_sms, first.block_m // 2))
    configs = [first]
    seen = {_launched(first, shapes, columns, num_sms, bucket)}
    for base in bases:
        for num_warps in _WARPS[base.block_m]:
            # On sm_100 narrow tcgen05 products outgrow their own memory (counted: no code at 128 tokens).
            choices = {_has_wide(arch, num_warps), False} if arch // 10 == 9 else {_has_wide(arch, num_warps)}
            for wide, deeper, programs in product(sorted(choices, reverse=True), (0, 1), _PROGRAMS_PER_SM):
                config = replace(
                    base,
                    num_warps=num_warps,
                    wide=wide,
                    stages_4=base.stages_4 + deeper,
                    stages_8=base.stages_8 + deeper,
                    stages_16=base.stages_16 + deeper,
                    programs_per_sm=programs,
                )
                needed = max(
                    shared_bytes(arch, bits, config.stages(bits), config.block_m, num_warps, wide) for bits, _ in shapes
                )
                launched = _launched(config, shapes, columns, num_sms, bucket)
                if needed <= most_shared and launched not in seen:
                    seen.add(launched)
                    configs.append(config)
    if bucket >= 128:
        configs.append(replace(first, dequantize=True))
    return configs


def _launched(
    config: Config, shapes: Sequence[tuple[int, int]], columns: int, num_sms: int, bucket: int
) -> tuple[Config, tuple[tuple[int, int], ...]]:
    """All that decides what a configuration launches: K can be cut alike for different numbers of programs."""
    m_blocks = -(-bucket // config.block_m)
    parts = _parts(shapes, columns, config.block_m, m_blocks, config.programs_per_sm * num_sms)
    return replace(config, programs_per_sm=0), tuple(parts.items())


def _relative_time(
    shapes: Sequence[tuple[int, int]], columns: int, block_m: int, m_blocks: int, target: int, at_once: int
) -> float:
    """Rounds of programs that run at once, times the longest of them; to compare ways to split K (estimate)."""
    parts = _parts(shapes, columns, block_m, m_blocks, target)
    blocks = packing.padded_columns(columns) // packing.BLOCK
    programs = m_blocks * sum(packing.tiles(rows) * parts[bits] for bits, rows in shapes)
    longest = max(_block_cost(bits, block_m) * -(-blocks // parts[bits]) for bits in parts)
    return -(-programs // at_once) * (longest + _START_COST)


def shared_bytes(arch: int, bits: int, stages: int, block_m: int, num_warps: int, wide: bool) -> int:
    """Shared memory that a loop takes at most (counted): one buffer fewer than stages, except of what products read."""
    columns = packing.BLOCK if bits < 16 else packing.DENSE_LINE
    weights, x = columns * packing.TILE_ROWS * bits // 8, columns * block_m * 2
    # wgmma and tcgen05 read x, and weights that need no unpacking, from their buffers while the next are filled.
    reads_buffers = _has_wide(arch, num_warps)
    weight_buffers = stages if reads_buffers and bits == 16 else stages - 1
    x_buffers = stages if reads_buffers else stages - 1
    # With zero points, 8 warps with narrow products pass the unpacked block on to each other.
    unpacked = packing.TILE_ROWS * packing.BLOCK * 2 if num_warps == 8 and bits < 16 and not wide else 0
    few = packing.TILE_ROWS * 4  # scales and zero points on their way to other threads; barriers
    return weight_buffers * weights + x_buffers * x + unpacked + few


def _architecture(arch: int) -> _Architecture:
    known = [number for number in _ARCHITECTURES if number <= arch]
    if not known:
        raise ValueError(f"the GPU has compute capability {arch / 10}; the kernels need 8.0")
    return _ARCHITECTURES[max(known)]


def _has_wide(arch: int, num_warps: int) -> bool:
    """Whether products take whole groups: where Triton multiplies with wgmma (sm_90) or tcgen05 (sm_100)."""
    return arch // 10 in (9, 10) and num_warps >= 4


# ---------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Tables:
    """What `linear` needs to know about a layer, made once when it is loaded.

    Attributes:
        tables: work items of each bucket [items, 8] int32, then the counters of arrived parts [n] int32, all zero. The
            counters are zero again after each launch, so launches of one layer must follow each other on one stream.
        launches: the fields LAUNCH of each bucket, one after the other.
    """

    tables: list[Tensor]
    launches: list[int]


LAUNCH = ("tokens", "slots", "block_m", "num_warps", "stages_4", "stages_8", "stages_16", "wide", "dequantize")

# At so many tokens per bit of a weight, multiplying takes as long as reading: an H200's number, 47 tokens for 4 bits
# (inferred), used for every GPU: it only weighs tiles of different bits against each other.
_TOKENS_PER_BIT = 12

# What starting and ending a program costs, in the unit of `_block_cost`: two blocks of 4 bits (estimate).
_START_COST = 8


def build_tables(
    shapes: Sequence[tuple[int, int]],
    columns: int,
    group_size: int,
    configs: Mapping[int, Config],
    num_sms: int,
) -> Tables:
    """Work items of a matrix whose shards' tiles follow each other in the store.

    Args:
        shapes: bits and rows of each shard, in the order of the result's rows.
        columns: K.
        group_size: 32, 64 or 128.
        configs: for each bucket (the largest number of tokens that it serves) how it is computed.
        num_sms: multiprocessors of the GPU.

    Returns:
        The tables, on the CPU.

    Raises:
        ValueError: a bucket or configuration that cannot be.
    """
    tables, launches, counters = [], [], 1
    for bucket, config in sorted(configs.items()):
        if bucket < 1 or config.block_m not in BLOCK_MS:
            raise ValueError(f"bucket {bucket} with block_m {config.block_m}; block_m must be one of {BLOCK_MS}")
        m_blocks = -(-bucket // config.block_m)
        items, slots = ([], 0) if config.dequantize else _items(shapes, columns, group_size, config, m_blocks, num_sms)
        table = torch.tensor(items, dtype=torch.int32).view(-1, len(ITEM))
        if not config.dequantize:
            validate_table(table, shapes, columns, group_size, slots)
        tables.append(table)
        values = {"tokens": bucket, "slots": slots} | asdict(config)
        launches += [int(values[field]) for field in LAUNCH]
        counters = max(counters, slots * m_blocks)
    return Tables([*tables, torch.zeros(counters, dtype=torch.int32)], launches)


def validate_table(table: Tensor, shapes: Sequence[tuple[int, int]], columns: int, group_size: int, slots: int) -> None:
    """Check that programs which follow a table read inside the store and write each element of the result once.

    Args:
        table: [items, 8] int32, on the CPU.
        shapes: bits and rows of each shard.
        columns: K.
        group_size: 32, 64 or 128.
        slots: of the workspace.

    Raises:
        ValueError: says which item is wrong, and how.
    """
    if table.ndim != 2 or table.shape[1] != len(ITEM) or table.dtype != torch.int32:
        raise ValueError(f"a table is [items, {len(ITEM)}] int32; this is {list(table.shape)} {table.dtype}")
    blocks = packing.padded_columns(columns) // packing.BLOCK
    sizes = [packing.packed_sizes(bits, rows, columns, group_size) for bits, rows in shapes]
    weights_end, scales_end = (sum(size) for size in zip(*sizes, strict=True))
    total_rows = sum(rows for _, rows in shapes)
    parts_of_tile: dict[tuple[int, ...], set[int]] = {}
    for index, values in enumerate(table.tolist()):
        item = dict(zip(ITEM, values, strict=True))
        if item["bits"] not in (4, 8, 16):
            raise ValueError(f"item {index} has bits {item['bits']}; 4, 8 or 16 are computed")
        if not 1 <= item["rows"] <= packing.TILE_ROWS or not 0 <= item["row"] <= total_rows - item["rows"]:
            raise ValueError(f"item {index}: {item['rows']} rows from {item['row']} on are not in {total_rows}")
        if not 0 <= item["part"] < item["parts"] <= blocks:
            raise ValueError(f"item {index} is part {item['part']} of {item['parts']}; K has {blocks} blocks")
        words = packing.BLOCK * blocks * item["rows"] * item["bits"] // 16
        if not 0 <= item["weights"] * packing.WORDS <= weights_end - words:
            raise ValueError(
                f"item {index} reads {words} words from {item['weights'] * packing.WORDS} on; "
                f"the store has {weights_end}"
            )
        groups = packing.BLOCK * blocks // group_size if item["bits"] < 16 else 0
        if not 0 <= item["scales"] * packing.TILE_ROWS <= scales_end - groups * packing.TILE_ROWS:
            raise ValueError(
                f"item {index} reads {groups} groups of scales from {item['scales']} on; the store has "
                f"{scales_end // packing.TILE_ROWS}"
            )
        if item["parts"] > 1 and not 0 <= item["slot"] <= slots - item["parts"]:
            raise ValueError(f"item {index} needs slots {item['slot']} and {item['parts'] - 1} more; there are {slots}")
        seen = parts_of_tile.setdefault((*values[:5], *values[6:]), set())
        if item["part"] in seen:
            raise ValueError(f"item {index} computes rows {item['row']} .. again: part {item['part']}")
        seen.add(item["part"])
    next_row = 0
    for (_, _, _, row, rows, parts, _), seen in sorted(parts_of_tile.items(), key=lambda entry: entry[0][3]):
        if len(seen) != parts:
            raise ValueError(f"rows {row} ..: {len(seen)} of {parts} parts of K are computed")
        if row != next_row:
            raise ValueError(f"row {min(row, next_row)} is computed {'twice' if row < next_row else 'nowhere'}")
        next_row += rows
    if next_row != total_rows:
        raise ValueError(f"row {next_row} is computed nowhere")
    next_slot = 0
    for _, _, _, row, _, parts, slot in sorted(parts_of_tile, key=lambda tile: tile[6]):
        if parts > 1 and slot < next_slot:
            raise ValueError(f"rows {row} ..: slot {slot} belongs to another tile")
        next_slot = slot + parts if parts > 1 else next_slot


def _items(
    shapes: Sequence[tuple[int, int]], columns: int, group_size: int, config: Config, m_blocks: int, num_sms: int
) -> tuple[list[tuple[int, ...]], int]:
    """Work items, the costliest first, so that the last programs to run are short; and the slots they use."""
    blocks = packing.padded_columns(columns) // packing.BLOCK
    parts_of = _parts(shapes, columns, config.block_m, m_blocks, config.programs_per_sm * num_sms)
    items, slots, weights, scales, row = [], 0, 0, 0, 0
    for bits, shard_rows in shapes:
        parts = parts_of[bits]
        for first in range(0, shard_rows, packing.TILE_ROWS):
            rows = min(packing.TILE_ROWS, shard_rows - first)
            for part in range(parts):
                length = (part + 1) * blocks // parts - part * blocks // parts
                cost = _block_cost(bits, config.block_m) * rows * length
                items.append((cost, (bits, weights, scales, row, rows, part, parts, slots if parts > 1 else -1)))
            words, group_values = packing.packed_sizes(bits, rows, columns, group_size)
            weights += words // packing.WORDS
            scales += group_values // packing.TILE_ROWS
            row += rows
            slots += parts if parts > 1 else 0
    if weights > 2**31 - 1:
        raise ValueError(f"{weights * packing.WORDS} words of weights in one layer; a table addresses 2^36")
    return [item for _, item in sorted(items, key=lambda entry: -entry[0])], slots


def _parts(shapes: Sequence[tuple[int, int]], columns: int, block_m: int, m_blocks: int, target: int) -> dict[int, int]:
    """For tiles of each number of bits, into how many parts K is cut so that `target` programs get equal work."""
    blocks = packing.padded_columns(columns) // packing.BLOCK
    total = sum(_block_cost(bits, block_m) * packing.tiles(rows) for bits, rows in shapes) * m_blocks
    # A part writes and rereads 128 x block_m x 4 bytes: keep that under the 4-bit weights it reads (estimate).
    most = max(1, blocks // max(2, block_m // 8))
    parts = {}
    for bits, _ in shapes:
        wanted = min(most, max(1, int(_block_cost(bits, block_m) * target / total)))
        parts[bits] = -(-blocks // -(-blocks // wanted))  # the fewest with the same longest part
    return parts


def _block_cost(bits: int, block_m: int) -> float:
    """Time of a block of 128 columns, in that of reading one bit of each weight."""
    return max(bits, block_m / _TOKENS_PER_BIT)


# ---------------------------------------------------------------------------------------------------- launcher

# Read when Triton's decorators run: they made functions for its interpreter, which has no inline assembly.
_INTERPRETED = triton.knobs.runtime.interpret

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}


@torch.no_grad()  # products are written to `out`, which autograd refuses where anything asks for a gradient
def linear(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    tables: Sequence[Tensor],
    launches: Sequence[int],
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ [W_0; W_1; ...]^T + bias for shards of different bits: one launch, no synchronisation.

    Allocates the result and a workspace from torch's caching allocator, which CUDA graphs capture. The first call with
    a bucket compiles its kernel: see `warm_up`.

    Args:
        x: [M, K] bf16, fp16 or fp32; fp32 takes dequantized weights and the vendor's product.
        weights: the shards' tiles, one after the other, int16.
        scales: likewise; any floating dtype.
        zero_points: likewise, uint8; None: all shards are symmetric.
        tables: from `build_tables`, on the device of x.
        launches: from `build_tables`.
        bits: of each shard: 4, 8 or 16. Tiles of 16 bits hold values in the dtype of x.
        sizes: rows of each shard.
        group_size: 32, 64 or 128.
        bias: [sum of sizes] in the dtype of x, or None.

    Returns:
        [M, sum of sizes] in the dtype of x.

    Raises:
        ValueError: x is fp32 beside 16-bit tiles.
    """
    x = x.contiguous()
    tokens, columns = x.shape
    y = torch.empty(tokens, sum(sizes), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    launch = _launch(launches, tokens)
    if launch is None or launch["dequantize"] or x.dtype == torch.float32:
        _multiply_dequantized(x, weights, scales, zero_points, bits, sizes, group_size, bias, y)
        return y
    *items, arrivals = tables
    table = items[launch["index"]]
    m_blocks = -(-tokens // launch["block_m"])
    partials = torch.empty(
        launch["slots"] * m_blocks * packing.TILE_ROWS * launch["block_m"], dtype=torch.float32, device=x.device
    )
    gemm_kernel[m_blocks, table.shape[0]](
        x,
        weights,
        scales,
        zero_points,
        bias,
        table,
        y,
        partials,
        arrivals,
        tokens,
        columns,
        y.shape[1],
        **kernel_constants(launch, _NAMES[x.dtype], bits, zero_points is None, columns, group_size, _INTERPRETED),
        num_warps=launch["num_warps"],
    )
    return y


def kernel_constants(
    launch: Mapping[str, int],
    dtype: str,
    bits: Sequence[int],
    symmetric: bool,
    columns: int,
    group_size: int,
    interpreted: bool,
) -> dict[str, object]:
    """The constexpr arguments of `gemm_kernel`.

    Args:
        launch: the fields LAUNCH of a bucket, by name.
        dtype: of x: "bf16" or "fp16".
        bits: of the shards.
        symmetric: whether there are no zero points.
        columns: K.
        group_size: 32, 64 or 128.
        interpreted: for Triton's interpreter: no inline assembly, and float32, because it computes bf16 wrongly.
    """
    return {
        "ASM_4": None if interpreted else unpack_asm(4, dtype, symmetric),
        "ASM_8": None if interpreted else unpack_asm(8, dtype, symmetric),
        "BASE_4": 0 if interpreted else addend_base(4, dtype),
        "BASE_8": 0 if interpreted else addend_base(8, dtype),
        "HAS_4": 4 in bits,
        "HAS_8": 8 in bits,
        "HAS_16": 16 in bits,
        "COMPUTE": tl.float32 if interpreted else _TYPES[dtype],
        "GROUP_SIZE": group_size,
        "EVEN_K": columns % packing.BLOCK == 0,
        "BLOCK_M": launch["block_m"],
        "WIDE": bool(launch["wide"]),
        # One block ahead hides their latency; counted: with 8 warps and wgmma that would move the unpacked weights
        # through shared memory (3.9 instead of 3.5 instructions per 4-bit weight).
        "ZEROS_AHEAD": not (launch["wide"] and launch["num_warps"] == 8),
        "STAGES_4": launch["stages_4"],
        "STAGES_8": launch["stages_8"],
        "STAGES_16": launch["stages_16"],
        "SPLIT": launch["slots"] > 0,
    }


def dequantize(
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    columns: int,
    group_size: int,
    out: Tensor,
) -> None:
    """Weights of consecutive tiles.

    Args:
        weights: from the first word of the first tile on, int16.
        scales: from that tile's on; unused for 16 bits.
        zero_points: likewise, uint8, or None.
        bits: 4, 8 or 16.
        columns: K.
        group_size: 32, 64 or 128.
        out: [rows, K] bf16, fp16 or fp32, contiguous: where to write (code - zero point) * scale, rounded once.
    """
    grid = (packing.padded_columns(columns) // packing.BLOCK, packing.tiles(out.shape[0]))
    dequantize_kernel[grid](
        weights, scales, zero_points, out, out.shape[0], columns, BITS=bits, GROUP_SIZE=group_size, num_warps=4
    )


def _multiply_dequantized(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """The product by way of a scratch that holds some rows of weights in the dtype of x."""
    if x.dtype == torch.float32 and 16 in bits:
        raise ValueError("x is float32, but 16-bit tiles hold values of a 16-bit dtype; give x in that dtype")
    columns = x.shape[1]
    row_bytes = columns * x.element_size()
    most_rows = max(_SCRATCH_BYTES // row_bytes // packing.TILE_ROWS, 1) * packing.TILE_ROWS
    scratch = torch.empty(min(most_rows, max(sizes)), columns, dtype=x.dtype, device=x.device)
    word, value, row = 0, 0, 0
    for shard_bits, shard_rows in zip(bits, sizes, strict=True):
        for first in range(0, shard_rows, most_rows):
            rows = min(most_rows, shard_rows - first)
            slab = scratch[:rows]
            zeros = None if zero_points is None else zero_points[value:]
            dequantize(weights[word:], scales[value:], zeros, shard_bits, columns, group_size, slab)
            out = y[:, row : row + rows]
            if bias is None:
                torch.mm(x, slab.t(), out=out)
            else:
                torch.addmm(bias[row : row + rows], x, slab.t(), out=out)
            words, values = packing.packed_sizes(shard_bits, rows, columns, group_size)
            word, value, row = word + words, value + values, row + rows


def warm_up(
    columns: int,
    dtype: torch.dtype,
    weights: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    tables: Sequence[Tensor],
    launches: Sequence[int],
    bits: Sequence[int],
    sizes: Sequence[int],
    group_size: int,
    bias: Tensor | None = None,
) -> None:
    """Compile all that `linear` may launch with these arguments: a CUDA graph must not be the first to call it."""
    buckets = launches[:: len(LAUNCH)]
    for tokens in (*buckets, max(buckets) + 1):  # above the last: dequantized
        x = torch.zeros(tokens, columns, dtype=dtype, device=weights.device)
        linear(x, weights, scales, zero_points, tables, launches, bits, sizes, group_size, bias)


def _launch(launches: Sequence[int], tokens: int) -> dict[str, int] | None:
    """The fields of the bucket that serves so many tokens, and its index; None: too many for any."""
    for index, start in enumerate(range(0, len(launches), len(LAUNCH))):
        if tokens <= launches[start]:
            return dict(zip(LAUNCH, launches[start : start + len(LAUNCH)], strict=True), index=index)
    return None
