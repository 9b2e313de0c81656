import pytest
import torch
from compressed import compress_matrix
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from taq_kernels import packing, reference

ORDERS = ("blocks", "rows")


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


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


def test_rows_order_puts_even_columns_into_low_nibbles_and_high_planes_first():
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([0x12, 0x34, 0x56, 0x78])
    planes = packing.pack_planes(codes, 8, "rows")
    assert planes.shape == (16, 32)
    assert planes[0, :2].tolist() == [0x31, 0x75]
    assert planes[0, 16:18].tolist() == [0x42, 0x86]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", packing.BITS)
# Whole blocks; each tail that a block of 64 can have; padding.
@pytest.mark.parametrize("rows", [64, 128, 16, 32, 48, 80, 208, 5, 70])
def test_planes_give_back_every_code(order, bits, rows):
    codes = random_codes(rows, 96, bits)
    planes = packing.pack_planes(codes, bits, order)
    assert planes.shape == (packing.padded_rows(rows), 96 * bits // 8)
    unpacked = torch.cat(
        [
            packing.unpack_rows(planes, bits, order, start, stop)
            for start, stop in packing.bounds(planes.shape[0], order)
        ],
        dim=1,
    )
    assert torch.equal(unpacked[:, :rows].t(), codes)
    assert not unpacked[:, rows:].any()


def test_chunked_packing_is_packing_at_once():
    codes = random_codes(2 * 1024 + 48, 32, 4)
    at_once = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    assert torch.equal(packing.pack_planes(codes, 4, "blocks"), at_once)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_weights_are_those_of_compressed_tensors_to_the_bit(order, bits, symmetric, dtype):
    weight = torch.randn(80, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors, expected = compress_matrix(weight, bits, symmetric)
    codes = packing.unpack_words(tensors["weight_packed"], bits)
    zero_point = None if symmetric else packing.unpack_zero_points(tensors["weight_zero_point"], bits, 80)
    planes = packing.pack_planes(codes, bits, order)
    scale_zeros = packing.pack_scale_zeros(tensors["weight_scale"], zero_point, bits, dtype)
    assert torch.equal(reference.dequantize(planes, scale_zeros, bits, 128, order), expected)


@pytest.mark.parametrize("bits", packing.BITS)
def test_every_zero_point_survives_rounding_of_the_additive_zero(bits):
    # Scales with all mantissa bits set, where the product with a zero point loses most.
    zero_points = torch.arange(2**bits, dtype=torch.uint8).repeat(16, 1)
    scale = torch.full((16, 2**bits), 1.9921875, dtype=torch.bfloat16)
    codes = torch.zeros(16, 32 * 2**bits, dtype=torch.uint8)
    planes = packing.pack_planes(codes, bits, "rows")
    scale_zeros = packing.pack_scale_zeros(scale, zero_points, bits, torch.bfloat16)
    weights = reference.dequantize(planes, scale_zeros.float(), bits, 32, "rows")
    assert torch.equal(weights[:, ::32], -zero_points.float() * 1.9921875)


def test_planes_can_be_extended_only_after_whole_blocks():
    codes = random_codes(64, 32, 4)
    assert packing.can_extend(64, "blocks")
    joined = torch.cat([packing.pack_planes(codes[:64], 4, "blocks"), packing.pack_planes(codes[:16], 4, "blocks")])
    assert torch.equal(joined, packing.pack_planes(torch.cat([codes, codes[:16]]), 4, "blocks"))
    assert not packing.can_extend(16, "blocks")
    assert packing.can_extend(16, "rows")
    assert not packing.can_extend(20, "rows")
