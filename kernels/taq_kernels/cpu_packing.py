"""The layout of torch's own int4 kernel, for CPUs and machines that the compiled kernel is not for: nibble planes.

A 4-bit matrix is one plane; an 8-bit matrix is a plane of high nibbles and a plane of low ones, side by side along K,
because code = 16 * high + low makes it the 4-bit product of [x, x]. With scale s and zero point z of a group:

    w = (high - 8) * 16s + first + (low - 8) * s + second,    first + second = (136 - z) * s
    w = (nibble - 8) * s + first,                             first = (8 - z) * s            (4 bits)

so that each plane has a scale and an additive zero per row and group, `scale_zeros` [planes * K / group_size, N, 2].
`second` holds what rounding `first` to 16 bits lost. Integer zero points can be had back from them exactly.

Rows are padded to a multiple of 16. Planes are uint8 [N, planes * K / 2], two nibbles a byte, in blocks of 64 rows
(fewer where the CPU has narrower vectors) with all columns of a block before the next. The order depends on the CPU
and is probed, so it is never stored.
"""

from functools import cache

import torch
from torch import Tensor

ROW_MULTIPLE = 16

_MAX_BLOCK_ROWS = 64
_CHUNK_ROWS = 1024  # bounds the int32 temporary of packing to 4 bytes * 1024 rows


def padded_rows(rows: int) -> int:
    """Rows of the planes of a matrix with this many rows."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Nibble planes of integer codes.

    Args:
        codes: [N, K] uint8, 0 .. 2^bits - 1; K a multiple of 32.
        bits: 4 or 8.

    Returns:
        [padded N, planes * K / 2] uint8.
    """
    codes = _pad_rows(codes)
    nibbles = codes if bits == 4 else torch.cat([codes >> 4, codes & 15], dim=1)
    return torch.cat(
        [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(chunk.to(torch.int32), 1)
            for chunk in nibbles.split(_CHUNK_ROWS)
        ]
    )


def unpack_planes(planes: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_planes`, but for the padding.

    Args:
        planes: [padded N, planes * K / 2] uint8.
        bits: 4 or 8.

    Returns:
        [padded N, K] uint8.
    """
    return torch.cat([_unpack_block(planes[start:stop], bits).t() for start, stop in bounds(planes.shape[0])])


def pack_scale_zeros(scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Scales and additive zeros of each plane.

    Args:
        scale: [N, G].
        zero_point: [N, G] in code units; None means symmetric: 2^(bits - 1).
        bits: 4 or 8.

    Returns:
        [planes * G, padded N, 2] in the dtype of `scale`.
    """
    # float64 for the sums: what `second` has to hold is the rounding error of `first`.
    dtype, scale = scale.dtype, scale.double()
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


def unpack_scale_zeros(scale_zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_scale_zeros`, but for the padding.

    Args:
        scale_zeros: [planes * G, padded N, 2].
        bits: 4 or 8.

    Returns:
        Scales and integer-valued zero points, [G, padded N] float32 each.
    """
    # Contiguous: multiplying a block by a strided scale takes torch seven times as long.
    scale, zero = scale_zeros.to(torch.float32).unbind(-1)
    scale, zero, middle = scale.contiguous(), zero.contiguous(), 8
    if bits == 8:
        scale, zero, middle = scale.chunk(2)[1], sum(zero.chunk(2)), 136
    # Rounding to 16 bits moved zero / scale by at most 0.07 (bf16, 15 steps from the middle): round() undoes it.
    # Padded rows have scale 0.
    return scale, middle - torch.nan_to_num(zero / scale, 0.0, 0.0, 0.0).round()


def dequantize_block(planes: Tensor, scale_zeros: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Weights of a block of rows as (code - z) * s with the integer z, rounded once.

    Args:
        planes: [rows, planes * K / 2] uint8, one of `bounds`.
        scale_zeros: [planes * K / group_size, rows, 2].
        bits: 4 or 8.
        group_size: 32, 64 or 128.
        dtype: of the result.

    Returns:
        [K, rows].
    """
    rows = planes.shape[0]
    scale, zero_point = unpack_scale_zeros(scale_zeros, bits)
    weights = _unpack_block(planes, bits).view(-1, group_size, rows).to(torch.float32)
    weights.sub_(zero_point[:, None]).mul_(scale[:, None])
    return weights.view(-1, rows).to(dtype)


def bounds(rows: int) -> list[tuple[int, int]]:
    """First row and end of each block of (padded) rows."""
    return [(start, min(start + block_rows(), rows)) for start in range(0, rows, block_rows())]


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


def _unpack_block(planes: Tensor, bits: int) -> Tensor:
    """[K, rows] uint8 codes of a block: columns first, as a product with x wants them."""
    rows = planes.shape[0]
    order = _block_order(rows)
    # A block is [planes * K, rows / 2]: the low nibbles of a line are one half of the rows, the high the other.
    block = planes.reshape(-1, rows // 2)
    nibbles = torch.cat([block & 15, block >> 4], dim=1)
    if order is not None:
        nibbles = nibbles.index_select(1, order)
    if bits == 4:
        return nibbles
    high, low = nibbles.chunk(2)
    return (high << 4) | low


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


def _pad_rows(values: Tensor) -> Tensor:
    """Zero rows up to a multiple of 16."""
    missing = padded_rows(values.shape[0]) - values.shape[0]
    if not missing:
        return values
    return torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
