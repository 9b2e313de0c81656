"""How integer codes lie in memory: on disk, and in the tiles that the GPU kernel reads.

A matrix of N rows (out-features) and K columns (in-features) has codes 0 .. 2^bits - 1, and per row and group of
`group_size` columns a scale and a zero point in code units: w = (code - zero point) * scale.

On disk (compressed-tensors "pack-quantized"): int32 words [N, K * bits / 32], the code of the lowest column in the
lowest bits; zero points packed the same way along N: [N * bits / 32, K / group_size].

For a GPU: *tiles* of 128 rows, one after the other, the last with the rows that are left. A tile is cut into blocks of
128 columns, and a block of a *plane* of nibbles is [rows, 32] int16 words: word w of block b holds columns
128 b + 32 j + w, j = 0 .. 3. 4-bit codes are one plane; 8-bit codes are the plane of high nibbles and, behind it, that
of the low ones; 16-bit values are lines of 64 columns, [K / 64, rows, 64]. So each step of the kernel's loop reads one
contiguous piece, 8 KiB of a whole tile's plane, and its four nibbles a word are four matrix operands 32 columns wide,
apart by shifts. K is padded to whole blocks (only where groups are smaller: 128 divides K otherwise).

Scales and zero points: [tiles, K / group_size, 128], so that a step reads the ones of its 128 rows side by side; rows
and groups that do not exist have scale 0.

The CPU's layouts are `cpu`'s. `kernels/README.md` has a picture of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TILE_ROWS = 128
BLOCK = 128  # columns that one step of the kernel covers
WORDS = BLOCK // 4  # int16 words of a row in a block of one plane
DENSE_LINE = BLOCK // 2  # 16-bit values of a row in a step: 128 bytes, a cache line
# Nibble i of a word holds column 32 * order[i] + w of its block. The low plane swaps neighbours, so that
# (high & 0xF0F0) | (low & 0x0F0F) is two whole codes.
HIGH_ORDER = (0, 1, 2, 3)
LOW_ORDER = (1, 0, 3, 2)


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


@dataclass(frozen=True)
class PackedShard:
    """One matrix, or one rank's part of it, packed for one device.

    Attributes:
        bits: 4, 8, or (GPU only) 16.
        rows: N.
        columns: K.
        group_size: columns that share a scale: 128, 64 or 32.
        weights: flat; int16 on a GPU, uint8 on a CPU.
        scales: flat, in the dtype of the checkpoint; empty for 16 bits.
        zero_points: uint8 in the order of `scales`; None means 2^(bits - 1) everywhere.
    """

    bits: int
    rows: int
    columns: int
    group_size: int
    weights: Tensor
    scales: Tensor
    zero_points: Tensor | None


def pack_tiles(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> PackedShard:
    """Codes as the tiles that the GPU kernel reads.

    Args:
        codes: [N, K] uint8, 0 .. 2^bits - 1.
        scale: [N, K / group_size] bf16, fp16 or fp32; kept.
        zero_point: [N, K / group_size] uint8 in code units; None means symmetric: 2^(bits - 1).
        bits: 4 or 8.
        group_size: 32, 64 or 128, a divisor of K.

    Returns:
        The shard, on the device of the codes.

    Raises:
        ValueError: a shape, dtype, width or group size other than these.
    """
    check_codes(codes, scale, zero_point, bits, group_size)
    rows, columns = codes.shape
    nibbles = (codes,) if bits == 4 else (codes >> 4, codes & 15)
    planes = [_words(plane, order) for plane, order in zip(nibbles, (HIGH_ORDER, LOW_ORDER), strict=False)]
    return PackedShard(
        bits=bits,
        rows=rows,
        columns=columns,
        group_size=group_size,
        weights=_to_tiles(planes),
        scales=_to_group_rows(scale, columns, group_size),
        zero_points=None if zero_point is None else _to_group_rows(zero_point, columns, group_size),
    )


def check_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> None:
    """Check what is to be packed, for a GPU or a CPU.

    Raises:
        ValueError: a shape, dtype, device, width or group size other than `pack_tiles` says.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; codes have one of {BITS}")
    rows, columns = _checked_shape(codes, group_size)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; uint8 is packed")
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(f"scale is {scale.dtype}; one of {SCALE_DTYPES} is packed")
    if zero_point is not None and zero_point.dtype != torch.uint8:
        raise ValueError(f"zero_point is {zero_point.dtype}; uint8 is packed")
    groups = (rows, columns // group_size)
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values is not None and tuple(values.shape) != groups:
            raise ValueError(f"{name} is {list(values.shape)}; {rows} rows of {groups[1]} groups need {list(groups)}")
        if values is not None and values.device != codes.device:
            raise ValueError(f"{name} lies on {values.device} and codes on {codes.device}; both need one device")


def unpack_tiles(shard: PackedShard) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack_tiles`: codes [N, K] uint8, scale and zero point [N, K / group_size] (None if symmetric)."""
    planes = _from_tiles(shard, planes=shard.bits // 4, line=WORDS)
    nibbles = [_nibbles(plane, order) for plane, order in zip(planes, (HIGH_ORDER, LOW_ORDER), strict=False)]
    codes = nibbles[0] if shard.bits == 4 else (nibbles[0] << 4) | nibbles[1]
    zero_point = None if shard.zero_points is None else _from_group_rows(shard.zero_points, shard)
    return codes[:, : shard.columns], _from_group_rows(shard.scales, shard), zero_point


def pack_dense_tiles(weight: Tensor, group_size: int = BLOCK) -> PackedShard:
    """A 16-bit matrix as tiles, so that it can stand in one launch with quantized ones.

    Args:
        weight: [N, K] bf16 or fp16: the dtype of the activations that it will be multiplied with.
        group_size: of the quantized matrices beside it; a divisor of K.

    Returns:
        The shard, on the device of the weight.

    Raises:
        ValueError: a shape, dtype or group size other than these.
    """
    rows, columns = _checked_shape(weight, group_size)
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"weight is {weight.dtype}; bfloat16 or float16 is packed")
    values = _pad(weight, 1, BLOCK).view(torch.int16).reshape(rows, -1, DENSE_LINE)
    return PackedShard(
        bits=16,
        rows=rows,
        columns=columns,
        group_size=group_size,
        weights=_to_tiles([values]),
        scales=weight.new_empty(0),
        zero_points=None,
    )


def unpack_dense_tiles(shard: PackedShard, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_dense_tiles`: [N, K] in the dtype that was packed, which the shard itself does not hold."""
    (values,) = _from_tiles(shard, planes=1, line=DENSE_LINE)
    return values.flatten(1).view(dtype)[:, : shard.columns]


def padded_columns(columns: int) -> int:
    """Columns that the tiles hold: whole blocks of 128."""
    return -(-columns // BLOCK) * BLOCK


def tiles(rows: int) -> int:
    """Tiles of a matrix with this many rows; the last may hold fewer than 128."""
    return -(-rows // TILE_ROWS)


def packed_sizes(bits: int, rows: int, columns: int, group_size: int) -> tuple[int, int]:
    """Words of weights, and values of scales (and zero points), that a matrix takes in tiles."""
    words = rows * padded_columns(columns) * bits // 16
    return words, 0 if bits == 16 else tiles(rows) * TILE_ROWS * padded_columns(columns) // group_size


def _checked_shape(matrix: Tensor, group_size: int) -> tuple[int, int]:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; the kernels know {GROUP_SIZES}")
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.shape[1] % group_size:
        raise ValueError(f"a matrix of shape {list(matrix.shape)} cannot be cut into groups of {group_size} columns")
    return matrix.shape[0], matrix.shape[1]


def _words(nibbles: Tensor, order: tuple[int, ...]) -> Tensor:
    """[N, K] uint8 nibbles to [N, K / 128, 32] int16 words, padded with nibbles of 0 to whole blocks."""
    quarters = _pad(nibbles, 1, BLOCK).reshape(nibbles.shape[0], -1, 4, WORDS)
    first, second, third, fourth = (quarters[:, :, quarter] for quarter in order)
    # Little-endian: byte 0 of a word holds nibbles 0 and 1.
    return torch.stack([first | (second << 4), third | (fourth << 4)], dim=-1).view(torch.int16).squeeze(-1)


def _nibbles(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_words`: [N, padded K]."""
    low, high = words.unsqueeze(-1).view(torch.uint8).unbind(-1)
    in_word = [low & 15, low >> 4, high & 15, high >> 4]
    return torch.stack([in_word[order.index(quarter)] for quarter in range(4)], dim=2).flatten(1)


def _to_tiles(planes: list[Tensor]) -> Tensor:
    """[N, steps, line] planes to flat tiles [planes, steps, rows of the tile, line]."""
    pieces = []
    for start, stop in _row_ranges(planes[0].shape[0]):
        tiled = [plane[start:stop].unflatten(0, (-1, min(stop - start, TILE_ROWS))) for plane in planes]
        pieces.append(torch.stack(tiled, dim=1).transpose(2, 3).flatten())
    return torch.cat(pieces)


def _from_tiles(shard: PackedShard, planes: int, line: int) -> list[Tensor]:
    """The inverse of `_to_tiles`: one [N, steps, line] a plane."""
    steps = shard.weights.numel() // (shard.rows * planes * line)
    pieces = []
    for start, stop in _row_ranges(shard.rows):
        words = shard.weights[start * planes * steps * line : stop * planes * steps * line]
        tiled = words.view(-1, planes, steps, min(stop - start, TILE_ROWS), line)
        pieces.append(tiled.transpose(2, 3).transpose(0, 1).flatten(1, 2))
    return list(torch.cat(pieces, dim=1))


def _row_ranges(rows: int) -> list[tuple[int, int]]:
    """The rows of all whole tiles, then those of the ragged one, if they exist."""
    whole = rows // TILE_ROWS * TILE_ROWS
    return [(start, stop) for start, stop in ((0, whole), (whole, rows)) if start < stop]


def _to_group_rows(values: Tensor, columns: int, group_size: int) -> Tensor:
    """[N, K / group_size] to flat [tiles, padded K / group_size, 128]; padding is 0."""
    padded = _pad(_pad(values, 0, TILE_ROWS), 1, padded_columns(columns) // group_size)
    return padded.view(-1, TILE_ROWS, padded.shape[1]).transpose(1, 2).flatten()


def _from_group_rows(values: Tensor, shard: PackedShard) -> Tensor:
    """The inverse of `_to_group_rows`."""
    tiled = values.view(tiles(shard.rows), -1, TILE_ROWS).transpose(1, 2).flatten(0, 1)
    return tiled[: shard.rows, : shard.columns // shard.group_size]


def _pad(values: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros at the end of a dimension, up to a multiple."""
    missing = -values.shape[dim] % multiple
    if not missing:
        return values.contiguous()
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim=dim)
