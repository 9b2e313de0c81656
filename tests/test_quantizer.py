import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from taq_vllm.quantizer import CLIP_RATIOS, quantize, search_clip

CASES = [(bits, symmetric) for bits in (2, 3, 4, 5, 6, 7, 8) for symmetric in (True, False)]


def weights(rows=24, columns=256, seed=0, dtype=torch.bfloat16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_no_weight_moves_by_more_than_half_a_step(bits, symmetric):
    weight = weights(dtype=torch.float32)
    quantized = quantize(weight, bits, symmetric)
    step = quantized.scale.repeat_interleave(128, 1)
    # Symmetric codes lack the last half step at the top: the largest positive weight may move by a whole one less
    # its rounding, that is half a step beyond the grid; asymmetric ranges shift by the zero point's own rounding.
    assert ((quantized.dequantize() - weight).abs() <= step * 1.0).all()
    inside = (quantized.codes > 0) & (quantized.codes < 2**bits - 1)
    assert ((quantized.dequantize() - weight).abs()[inside] <= 0.5001 * step[inside]).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_rtn_agrees_with_compressed_tensors_own_arithmetic(bits):
    weight = weights(dtype=torch.float32)
    for symmetric in (True, False):
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=128)
        grouped = weight.view(24, 2, 128)
        scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        theirs = fake_quantize(weight, scale, zero_point, args)
        ours = quantize(weight, bits, symmetric).dequantize()
        # A group's extreme lies exactly between two codes, and the two may take either: the loss is the same.
        error, their_error = (ours - weight).abs(), (theirs - weight).abs()
        assert torch.allclose(error, their_error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_what_is_on_the_grid_comes_back_exactly(bits, symmetric):
    codes = torch.randint(0, 2**bits, (8, 256), generator=torch.Generator().manual_seed(1))
    codes[:, ::128], codes[:, 1::128] = 0, 2**bits - 1  # the whole range is used in each group
    zero = 2 ** (bits - 1)
    weight = (codes - zero).float() * 2.0**-6
    quantized = quantize(weight, bits, symmetric=False)
    assert torch.equal(quantized.dequantize(), weight)
    if symmetric:
        # min is -2^(b-1) steps, so the symmetric scale is 2^(b-1) / ((2^b - 1) / 2) steps: not this grid
        error = (quantize(weight, bits, True).dequantize() - weight).abs().max()
        assert error <= 1.1 * 2.0**-6


def test_codes_are_computed_with_the_scale_as_stored():
    weight = weights()
    quantized = quantize(weight, 4, False)
    assert quantized.scale.dtype == torch.bfloat16
    expected = (weight.float().view(24, 2, 128) / quantized.scale.float()[..., None]).round()
    expected = (expected + quantized.zero_point.float()[..., None]).clamp(0, 15)
    assert torch.equal(quantized.codes.view(24, 2, 128).float(), expected)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_clip_never_loses_more_than_rtn_where_it_counts(bits, symmetric):
    weight = weights(seed=3)
    weight[:, 7] *= 12  # an outlier channel that the task hardly uses
    importance = torch.ones(256)
    importance[7] = 1e-3

    def loss(quantized):
        return ((quantized.dequantize().float() - weight.float()).square() * importance).sum()

    clipped, plain = search_clip(weight, bits, symmetric, importance), quantize(weight, bits, symmetric)
    assert loss(clipped) <= loss(plain)
    if bits <= 4:
        assert loss(clipped) < 0.6 * loss(plain)


def test_ranges_below_4_bits_are_searched_further_inside():
    weight, importance = weights(rows=64, columns=1024, dtype=torch.float32), torch.ones(1024)
    weight[:, ::128] = 5  # one in every group, five deviations out: half of the range reaches to it

    def loss(**ratios):
        return (search_clip(weight, 2, True, importance, **ratios).dequantize() - weight).square().sum()

    assert loss() < 0.8 * loss(ratios=CLIP_RATIOS)  # measured: 0.64 where the outlier has either sign


def test_the_scale_may_be_stored_in_another_dtype_than_the_weights():
    weight = weights(dtype=torch.float32)
    for quantized in (
        quantize(weight, 4, False, dtype=torch.float16),
        search_clip(weight, 4, False, torch.ones(256), dtype=torch.float16),
    ):
        assert quantized.scale.dtype == torch.float16


def test_clip_with_only_the_full_range_is_rtn():
    weight = weights()
    clipped, plain = search_clip(weight, 4, False, torch.ones(256), ratios=(1.0,)), quantize(weight, 4, False)
    assert torch.equal(clipped.codes, plain.codes)
    assert torch.equal(clipped.scale, plain.scale)


def test_the_search_does_not_depend_on_how_rows_are_chunked(monkeypatch):
    weight = weights(rows=40)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(5))
    whole = search_clip(weight, 4, False, importance)
    monkeypatch.setattr("taq_vllm.quantizer._CHUNK_WEIGHTS", 256 * 7)
    assert torch.equal(whole.codes, search_clip(weight, 4, False, importance).codes)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_zeros_stay_zeros(bits, symmetric):
    assert torch.equal(quantize(torch.zeros(4, 128), bits, symmetric).dequantize(), torch.zeros(4, 128))


def test_bad_weights_and_shapes_are_refused():
    with pytest.raises(ValueError, match="100 in-features, which 128 does not divide"):
        quantize(torch.ones(4, 100), 4, True)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((4, 128), float("nan")), 4, True)
    with pytest.raises(ValueError, match="got 9 bits"):
        quantize(torch.ones(4, 128), 9, True)
    with pytest.raises(ValueError, match="one per input feature"):
        search_clip(torch.ones(4, 128), 4, True, torch.ones(64))
