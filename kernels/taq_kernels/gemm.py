"""The product of activations with a matrix whose tiles have 4, 8 or 16 bits: one Triton kernel, one launch.

y^T = W x^T: the weights are the M side of the matrix instruction. A tile of 128 rows then fills it whatever the number
of tokens, and on Hopper unpacked weights go from registers straight into wgmma, never through shared memory.

Why it looks like this: on an H200, 4-bit weights at the speed of memory leave 4.0 instructions per weight and lane
(132 SM x 128 lanes x 1.98 GHz / (4.3 TB/s / 0.516 byte)), 8-bit ones 7.9. Converting integers and multiplying each by
its scale costs 7.7 to 8.4 of them; this kernel compiles to less than 2.7 and 3.8 (`python -m tests.sass` prints them).

Nothing here has been timed on a GPU. Constants are marked *counted* (from compiled code, held by tests), *inferred*
(arithmetic on published speeds) or *estimate*; none is measured.

In order: layout (work items), unpacking, loops, epilogue, dequantization, configurations, tables, launcher. The tiles
themselves are `packing`'s. Needs triton, so it is imported only where a GPU is used.
"""

# Triton's functions get types when they are traced; `if CONSTEXPR:` around an `if` decides while tracing.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

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
_ITEM = tl.constexpr(len(ITEM))

# ---------------------------------------------------------------------------------------------------- unpacking

# A small integer in the lowest mantissa bits of 128 (bf16: 7 of them) or 1024 (fp16: 10) is that number plus the
# integer: one lop3 instead of a conversion. One fma then subtracts 128 or 1024 together with the zero point, exactly:
# both operands and the difference have at most 8 (fp16: 11) significant bits.
_MAGIC = {"bf16": 0x4300, "fp16": 0x6400}
_ONE = {"bf16": 0x3F80, "fp16": 0x3C00}
_FMA = {"bf16": "fma.rn.bf16x2", "fp16": "fma.rn.f16x2"}  # add.bf16x2 would need sm_90; fma.rn.bf16x2 is sm_80

_AND_OR, _AND_XOR, _SELECT = "0xEA", "0x6A", "0xE4"  # lop3: (a & b) | c;  (a & b) ^ c;  c ? a : b, bit by bit


def unpack_asm(bits: int, dtype: str, symmetric: bool) -> str:
    """PTX that turns two neighbouring words of each plane into eight 16-bit floats, code - zero point.

    Registers hold two words or two floats. $0..$3 are the results: columns w, 32 + w, 64 + w, 96 + w of the block; then
    the word of the (high) plane, that of the low plane for 8 bits, and one addend per result (`addend_base`).

    8 bits need no addend where the zero point is 128 and bf16 has no mantissa bit left for the sign: the lower seven
    bits become 128 + them, the top bit becomes 128 if set and 256 if not, and their difference is code - 128. A general
    zero point costs one more fma. (Folding zero points through sum(x) would save an instruction in four, but needs
    sum(x) in every program; it compiles to 2.0 for 4 bits, inside a budget of 4.0 that 2.4 is inside too.)

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
        # The results are called int16 first, because a dtype here must be a literal.
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
    SCALE_WEIGHTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[128, BLOCK_M] fp32: blocks begin .. end of a 4- or 8-bit tile times x^T."""
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
        ahead = tl.minimum(block + 1, end - 1)
        next_scales = _load_groups(scale_ptrs, ahead * group_step, GROUPS)
        next_zeros = _load_groups(zero_ptrs, ahead * group_step, GROUPS)
        addends = _addends(zeros, BITS, BASE, COMPUTE)
        quarters = _unpack(words_ptrs + block * step, low_ptrs + block * step, addends, BITS, ASM, COMPUTE)
        part = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
        for i in tl.static_range(_BLOCK // WIDTH):
            scale = scales[i * WIDTH // GROUP_SIZE].to(tl.float32)[:, None]
            w = _columns(quarters, i * WIDTH // _WORDS, WIDTH)
            x = _load_x(x_ptr, offs_m, M, K, block * _BLOCK + i * WIDTH, WIDTH, EVEN_K, COMPUTE)
            if SCALE_WEIGHTS:
                acc = tl.dot((w.to(tl.float32) * scale).to(COMPUTE), x, acc=acc)
            else:
                part = tl.dot(w, x, acc=part)
                if (i + 1) * WIDTH % GROUP_SIZE == 0:
                    acc += part * scale
                    part = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
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
    LINE: tl.constexpr = _BLOCK // 2
    acc = tl.full((_ROWS, BLOCK_M), 0.0, tl.float32)
    for line in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(line_ptrs + line * step, eviction_policy="evict_first").to(COMPUTE)
        acc = tl.dot(w, _load_x(x_ptr, offs_m, M, K, line * LINE, LINE, EVEN_K, COMPUTE), acc=acc)
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
    SCALE_WEIGHTS: tl.constexpr,
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
                4, ASM_4, BASE_4, COMPUTE, GROUP_SIZE, EVEN_K, BLOCK_M, WIDE, SCALE_WEIGHTS, STAGES_4,
            )  # fmt: skip
    if HAS_8:
        if bits == 8:
            acc = _sum_codes(
                x_ptr, words_ptrs, words_ptrs + blocks * step, step, scale_ptrs, zero_ptrs, begin, end, offs_m, M, K,
                8, ASM_8, BASE_8, COMPUTE, GROUP_SIZE, EVEN_K, BLOCK_M, WIDE, SCALE_WEIGHTS, STAGES_8,
            )  # fmt: skip
    if HAS_16:
        if bits == 16:
            LINE: tl.constexpr = _BLOCK // 2
            values_ptr = tile_ptr.to(tl.pointer_type(x_ptr.dtype.element_ty), bitcast=True)
            line_ptrs = values_ptr + stored_n[:, None] * LINE + tl.arange(0, LINE)[None, :]
            acc = _sum_dense(
                x_ptr, line_ptrs, rows * LINE, 2 * begin, 2 * end, offs_m, M, K, COMPUTE, EVEN_K, BLOCK_M, STAGES_16
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
