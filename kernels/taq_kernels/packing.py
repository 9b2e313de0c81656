"""How integer codes lie in memory. Every layout of this project is defined here and nowhere else.

A matrix of N rows (out-features) and K columns (in-features) has codes 0 .. 2^bits - 1, and per row and group of
`group_size` columns a scale s and a zero point z in code units: w = (code - z) * s.

On disk (compressed-tensors "pack-quantized"): int32 words [N, K * bits / 32], the code of the lowest column in the
lowest bits; zero points packed the same way along N: [N * bits / 32, K / group_size].

In memory: *nibble planes*. A 4-bit matrix is one plane; an 8-bit matrix is a plane of high nibbles and a plane of
low ones, side by side along K, because code = 16 * high + low makes it the 4-bit product of [x, x]:

    w = (high - 8) * 16s + first + (low - 8) * s + second,    first + second = (136 - z) * s
    w = (nibble - 8) * s + first,                             first = (8 - z) * s            (4 bits)

so that each plane has a scale and an additive zero per row and group: `scale_zeros` [planes * K / group_size, N, 2].
`second` holds what rounding `first` to 16 bits lost. Integer zero points can be had back from them exactly.

Rows are padded to a multiple of 16. Planes are uint8 [N, planes * K / 2], two nibbles a byte, in one of two orders:
- *rows* (GPUs): byte j of a row holds column 2j in its low and column 2j + 1 in its high nibble;
- *blocks* (CPU): the order of torch's own int4 kernel, blocks of 64 rows (fewer where the CPU has narrower
  vectors) with all columns of a block before the next. It depends on the CPU and is probed, so it is never stored.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Order = Literal["rows", "blocks"]

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
ROW_MULTIPLE = 16

_MAX_BLOCK_ROWS = 64
_SLAB_ROWS = 4096  # a slab of 4096 x 8192 weights takes 64 MB in 16 bits
_CHUNK_ROWS = 1024  # bounds the int32 temporary of the CPU's packing to 4 bytes * 1024 rows


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes from compressed-tensors' words.

    Args:
        words: [N, K * bits / 32] int32.
        bits: 4 or 8.

    Returns:
        [N, K] uint8.
    """
    # Little-endian: the bytes of a word hold its codes in column order.
    code_bytes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return code_bytes
    return torch.stack([code_bytes & 15, code_bytes >> 4], dim=-1).flatten(1)


def unpack_zero_points(words: Tensor, bits: int, rows: int) -> Tensor:
    """Zero points from compressed-tensors' words.

    Args:
        words: [ceil(N * bits / 32), G] int32.
        bits: 4 or 8.
        rows: N; the last word may be padded.

    Returns:
        [N, G] uint8, in code units.
    """
    return unpack_words(words.t(), bits)[:, :rows].t()


def padded_rows(rows: int) -> int:
    """Rows of the planes of a matrix with this many rows."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def order_on(device: torch.device) -> Order:
    """The order that the kernels of a device read."""
    return "blocks" if device.type == "cpu" else "rows"


def pack_planes(codes: Tensor, bits: int, order: Order) -> Tensor:
    """Nibble planes of integer codes.

    Args:
        codes: [N, K] uint8, 0 .. 2^bits - 1; K a multiple of 32. On the CPU for "blocks".
        bits: 4 or 8.
        order: of the nibbles.

    Returns:
        [padded N, planes * K / 2] uint8.
    """
    codes = _pad_rows(codes)
    nibbles = codes if bits == 4 else torch.cat([codes >> 4, codes & 15], dim=1)
    if order == "rows":
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return torch.cat(
        [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(chunk.to(torch.int32), 1)
            for chunk in nibbles.split(_CHUNK_ROWS)
        ]
    )


def pack_scale_zeros(scale: Tensor, zero_point: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Scales and additive zeros of each plane.

    Args:
        scale: [N, G].
        zero_point: [N, G] in code units; None means symmetric: 2^(bits - 1).
        bits: 4 or 8.
        dtype: of the activations that the planes will be multiplied with.

    Returns:
        [planes * G, padded N, 2] in `dtype`.
    """
    # float64 for the sums: what `second` has to hold is the rounding error of `first`.
    scale = scale.to(dtype).double()
    middle = 2 ** (bits - 1)
    zero_point = torch.full_like(scale, middle) if zero_point is None else zero_point.double()
    if bits == 4:
        planes = [torch.stack([scale, (8 - zero_point) * scale], dim=-1)]
    else:
        total = (136 - zero_point) * scale
        first = total.to(dtype).double()
        planes = [torch.stack([16 * scale, first], dim=-1), torch.stack([scale, total - first], dim=-1)]
    packed = torch.cat([_pad_rows(plane).transpose(0, 1) for plane in planes])
    return packed.to(dtype).contiguous()


def unpack_rows(planes: Tensor, bits: int, order: Order, start: int, stop: int) -> Tensor:
    """Codes of some rows; the inverse of `pack_planes`.

    Args:
        planes: [padded N, planes * K / 2] uint8, from `pack_planes`.
        bits: 4 or 8.
        order: of the nibbles.
        start: first row.
        stop: one after the last row; for "blocks", start and stop are a block's (`bounds`).

    Returns:
        [K, stop - start] uint8: columns first, as a product with x wants them.
    """
    rows = planes[start:stop]
    if order == "rows":
        nibbles = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1).t()
    else:
        order = _block_order(stop - start)
        # A block is [planes * K, rows / 2]: the low nibbles of a line are one half of the rows, the high the other.
        block = rows.reshape(-1, (stop - start) // 2)
        nibbles = torch.cat([block & 15, block >> 4], dim=1)
        if order is not None:
            nibbles = nibbles.index_select(1, order)
    if bits == 4:
        return nibbles
    high, low = nibbles.chunk(2)
    return (high << 4) | low


def dequantize_rows(
    planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int, order: Order, start: int, stop: int
) -> Tensor:
    """Weights of some rows, rounded once to the dtype of `scale_zeros`, as (code - z) * s with the integer z.

    Args:
        planes: as for `unpack_rows`.
        scale_zeros: [planes * K / group_size, padded N, 2].
        bits: 4 or 8.
        group_size: 32, 64 or 128.
        order: as for `unpack_rows`.
        start: as for `unpack_rows`.
        stop: as for `unpack_rows`.

    Returns:
        [K, stop - start] in the dtype of `scale_zeros`.
    """
    codes = unpack_rows(planes, bits, order, start, stop)
    scale, zero_point = _scale_and_zero_point(scale_zeros[:, start:stop], bits)
    weights = codes.view(-1, group_size, stop - start).to(torch.float32)
    weights.sub_(zero_point[:, None]).mul_(scale[:, None])
    return weights.view(-1, stop - start).to(scale_zeros.dtype)


def bounds(rows: int, order: Order) -> list[tuple[int, int]]:
    """First row and end of each piece in which (padded) rows are best unpacked: blocks, or slabs of 4096 rows."""
    size = block_rows() if order == "blocks" else _SLAB_ROWS
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def can_extend(rows: int, order: Order) -> bool:
    """Whether planes of more rows can simply follow these: nothing is padded and no block is cut short."""
    return rows % (block_rows() if order == "blocks" else ROW_MULTIPLE) == 0


@cache
def block_rows() -> int:
    """Rows that this CPU's int4 kernel keeps together: 64 with AVX-512, 32 with AVX2.

    Raises:
        RuntimeError: torch lays nibbles out in an order that this module does not know.
    """
    nibble_rows = _probe(2 * _MAX_BLOCK_ROWS)
    size = _MAX_BLOCK_ROWS
    while size >= ROW_MULTIPLE:
        # One column of a block takes size / 2 bytes; in the right block size these are `size` different rows.
        first_column = nibble_rows[: size // 2].flatten()
        if torch.equal(first_column.sort().values, torch.arange(size)):
            return size
        size //= 2
    raise RuntimeError(
        f"torch {torch.__version__} packs int4 weights in an unknown order on this CPU "
        f"({torch.backends.cpu.get_cpu_capability()}); please report both"
    )


@cache
def _block_order(rows: int) -> Tensor | None:
    """Where each row of a block lies among its (low, high) nibbles; None if they lie in order."""
    stored = _probe(rows)[: rows // 2].t().flatten()
    order = stored.argsort()
    return None if torch.equal(order, torch.arange(rows)) else order


def _probe(rows: int) -> Tensor:
    """[bytes, 2]: the row that torch's packing puts into the low and the high nibble of each byte."""
    columns = 32
    index = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, columns)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    low_digit = pack((index % 16).contiguous(), 1).flatten().to(torch.int64)
    high_digit = pack((index // 16).contiguous(), 1).flatten().to(torch.int64)
    return torch.stack([(low_digit & 15) + 16 * (high_digit & 15), (low_digit >> 4) + 16 * (high_digit >> 4)], -1)


def _scale_and_zero_point(scale_zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Float32 scale and integer-valued zero point, [G, rows] each, from `pack_scale_zeros`."""
    # Contiguous: multiplying a block by a strided scale takes torch seven times as long.
    scale, zero = scale_zeros.to(torch.float32).unbind(-1)
    scale, zero, middle = scale.contiguous(), zero.contiguous(), 8
    if bits == 8:
        scale, zero, middle = scale.chunk(2)[1], sum(zero.chunk(2)), 136
    # Rounding to 16 bits moved zero / scale by at most 0.07 (bf16, 15 steps from the middle): round() undoes it.
    # Padded rows have scale 0.
    return scale, middle - torch.nan_to_num(zero / scale, 0.0, 0.0, 0.0).round()


def _pad_rows(values: Tensor) -> Tensor:
    """Zero rows up to a multiple of 16."""
    missing = padded_rows(values.shape[0]) - values.shape[0]
    if not missing:
        return values
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
