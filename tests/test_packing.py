from dataclasses import replace

import pytest
import torch
from compressed import compress_matrix
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from taq_kernels import packing, reference


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def random_matrix(rows, columns, bits, group_size, asymmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = (rows, columns // group_size)
    scale = torch.rand(groups, generator=generator)
    zero_point = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator) if asymmetric else None
    return random_codes(rows, columns, bits, seed), scale, zero_point, bits, group_size


def test_lowest_bits_of_a_word_hold_the_first_column():
    words = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32)
    assert packing.unpack_words(words, 4).tolist() == [list(range(16))]
    assert packing.unpack_words(words, 8).tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]


@pytest.mark.parametrize("bits", packing.BITS)
def test_words_of_compressed_tensors_become_its_codes(bits):
    codes = random_codes(24, 128, bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(packing.unpack_words(pack_to_int32(signed, bits), bits), codes)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("rows", [8, 21])
def test_zero_points_of_compressed_tensors_are_unpacked_along_rows_without_padding(bits, rows):
    zero_points = random_codes(rows, 3, bits)
    signed = (zero_points.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(packing.unpack_zero_points(words, bits, rows), zero_points)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_words_are_the_weights_of_compressed_tensors_to_the_bit(bits, symmetric, dtype):
    weight = torch.randn(80, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors, expected = compress_matrix(weight, bits, symmetric)
    codes = packing.unpack_words(tensors["weight_packed"], bits)
    zero_point = None if symmetric else packing.unpack_zero_points(tensors["weight_zero_point"], bits, 80)
    shard = packing.pack_tiles(codes, tensors["weight_scale"], zero_point, bits, 128)
    assert torch.equal(reference.dequantize(*packing.unpack_tiles(shard), bits, 128).to(dtype), expected)


def words_of(shard):
    return [word & 0xFFFF for word in shard.weights.tolist()]


def test_word_of_4_bits_holds_columns_32_apart_the_first_lowest():
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, [0, 32, 64, 96]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    codes[0, [128 + 31, 128 + 63, 128 + 95, 128 + 127]] = torch.tensor([5, 6, 7, 8], dtype=torch.uint8)
    words = words_of(packing.pack_tiles(codes, torch.ones(1, 2), None, 4, 128))
    assert len(words) == 64
    assert (words[0], words[63]) == (0x4321, 0x8765)
    assert not any(words[1:63])


def test_word_of_8_bits_is_high_nibbles_in_order_and_behind_them_low_ones_with_neighbours_swapped():
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, [2, 34, 66, 98]] = torch.tensor([0x1A, 0x2B, 0x3C, 0x4D], dtype=torch.uint8)
    words = words_of(packing.pack_tiles(codes, torch.ones(1, 1), None, 8, 128))
    assert len(words) == 64
    assert (words[2], words[32 + 2]) == (0x4321, 0xCDAB)
    # What the order is for: half of each word makes two codes.
    assert (words[2] & 0xF0F0) | (words[34] & 0x0F0F) == 0x4D2B


def test_step_of_a_tile_is_contiguous_and_the_last_tile_has_only_its_rows():
    # The code says where it should be: 130 rows of 3 blocks, two tiles.
    row, block = torch.arange(130)[:, None], torch.arange(384)[None] // 128
    codes = (row * 3 + block) % 16
    shard = packing.pack_tiles(codes.to(torch.uint8), torch.ones(130, 3), None, 4, 128)
    first = [word & 15 for word in shard.weights.tolist()]
    assert shard.weights.numel() == 130 * 3 * 32
    for tile_row, tile_block, word in ((0, 0, 0), (5, 0, 31), (127, 2, 7), (64, 1, 16)):
        assert first[(tile_block * 128 + tile_row) * 32 + word] == (tile_row * 3 + tile_block) % 16
    second = first[128 * 3 * 32 :]
    assert second[(2 * 2 + 1) * 32] == (129 * 3 + 2) % 16


def test_scales_of_a_step_lie_side_by_side_and_padding_is_zero():
    scale = torch.arange(1, 130 * 3 + 1).float().view(130, 3)
    zero_point = (scale % 16).to(torch.uint8)
    shard = packing.pack_tiles(random_codes(130, 192, 4), scale, zero_point, 4, 64)
    scales = shard.scales.view(2, 4, 128)  # 192 columns are a block and a half: 4 groups of 64
    assert torch.equal(scales[0, 1], scale[:128, 1])
    assert torch.equal(scales[1, 2, :2], scale[128:, 2])
    assert not scales[1, :, 2:].any()
    assert not scales[:, 3].any()
    assert torch.equal(shard.zero_points.view(2, 4, 128)[0, 2], zero_point[:128, 2])


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(packing.BITS),
    rows=st.one_of(st.integers(1, 400), st.sampled_from([127, 128, 129, 256])),
    groups=st.integers(1, 9),
    group_size=st.sampled_from(packing.GROUP_SIZES),
    asymmetric=st.booleans(),
)
def test_tiles_give_back_what_compressed_tensors_packed(bits, rows, groups, group_size, asymmetric):
    codes, scale, zero_point, *_ = random_matrix(rows, groups * group_size, bits, group_size, asymmetric, seed=rows)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    unpacked = packing.unpack_words(pack_to_int32(signed, bits), bits)[:, : codes.shape[1]]
    shard = packing.pack_tiles(unpacked, scale, zero_point, bits, group_size)
    sizes = packing.packed_sizes(bits, rows, groups * group_size, group_size)
    assert (shard.weights.numel(), shard.scales.numel()) == sizes
    assert shard.weights.numel() % (32 * bits // 4) == 0  # a table addresses 32 words
    codes_again, scale_again, zero_point_again = packing.unpack_tiles(shard)
    assert torch.equal(codes_again, codes)
    assert torch.equal(scale_again, scale)
    assert zero_point_again is None if zero_point is None else torch.equal(zero_point_again, zero_point)


@pytest.mark.parametrize("dtype", packing.SCALE_DTYPES)
def test_scales_keep_their_dtype(dtype):
    codes, scale, *_ = random_matrix(5, 128, 4, 128, False)
    assert packing.pack_tiles(codes, scale.to(dtype), None, 4, 128).scales.dtype == dtype


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 20).map(lambda groups: 32 * groups),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_dense_tiles_give_back_the_weight(rows, columns, dtype):
    weight = torch.randn(rows, columns).to(dtype)
    shard = packing.pack_dense_tiles(weight, 32)
    assert (shard.bits, shard.weights.dtype, shard.scales.numel()) == (16, torch.int16, 0)
    assert shard.weights.numel() == packing.packed_sizes(16, rows, columns, 32)[0]
    assert torch.equal(packing.unpack_dense_tiles(shard, dtype), weight)


def test_dense_tile_is_lines_of_64_columns():
    weight = torch.arange(3 * 128).view(3, 128).bfloat16()
    values = packing.pack_dense_tiles(weight).weights.view(torch.bfloat16).view(2, 3, 64)
    assert torch.equal(values[1, 2], weight[2, 64:])


def test_shards_of_whole_tiles_follow_each_other():
    first, second = random_matrix(256, 128, 8, 128, True), random_matrix(40, 128, 8, 128, True, seed=1)
    joined = packing.pack_tiles(*(torch.cat(pair) for pair in zip(first[:3], second[:3], strict=True)), 8, 128)
    shards = [packing.pack_tiles(*first), packing.pack_tiles(*second)]
    for name in ("weights", "scales", "zero_points"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(joined, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 96}, "group_size is 96"),
        ({"codes": random_codes(4, 96, 4)}, r"\[4, 96\] cannot be cut into groups of 64"),
        ({"codes": random_codes(4, 128, 4).flatten()}, "cannot be cut"),
        ({"codes": random_codes(4, 128, 4).int()}, r"codes are torch\.int32"),
        ({"scale": torch.ones(4, 1)}, r"scale is \[4, 1\]; 4 rows of 2 groups need \[4, 2\]"),
        ({"scale": torch.ones(4, 2).double()}, r"scale is torch\.float64"),
        ({"zero_point": torch.zeros(4, 3, dtype=torch.uint8)}, "zero_point is"),
        ({"zero_point": torch.zeros(4, 2)}, r"zero_point is torch\.float32"),
    ],
)
def test_matrices_that_cannot_be_packed_are_refused(change, message):
    arguments = {"codes": random_codes(4, 128, 4), "scale": torch.ones(4, 2), "zero_point": None}
    arguments |= {"bits": 4, "group_size": 64}
    packing.pack_tiles(**arguments)
    with pytest.raises(ValueError, match=message):
        packing.pack_tiles(**(arguments | change))


def test_float32_weights_have_no_dense_tiles():
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        packing.pack_dense_tiles(torch.zeros(4, 128))


def test_a_code_in_another_place_is_noticed():
    # The round trips above would hold for any pair of inverse orders; this says that words differ where codes do.
    shard = packing.pack_tiles(*random_matrix(130, 256, 8, 128, False))
    changed = shard.weights.clone()
    changed[7] ^= 1
    codes, _, _ = packing.unpack_tiles(shard)
    codes_changed, _, _ = packing.unpack_tiles(replace(shard, weights=changed))
    assert (codes != codes_changed).sum() == 1
