import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taq_kernels import cpu, cpu_packing, ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def if_supported(name, *more):
    """A test's parameters for one instruction set: skipped where this machine can't run it."""
    isa = cpu.ISAS[name]
    marks = pytest.mark.skipif(not cpu.supports(isa), reason=f"no {name} or no compiler")
    return pytest.param(isa, *more, id="-".join([name, *map(str, more)]), marks=marks)


def isas():
    """Each instruction set."""
    return [if_supported(name) for name in cpu.ISAS]


def isas_and_dtypes():
    """Each instruction set with the activations that it multiplies."""
    return [
        if_supported(name, dtype)
        for name in cpu.ISAS
        for dtype in DTYPES
        if name != "AVX-512 VNNI" or dtype != torch.float32
    ]


needs_kernel = pytest.mark.skipif(cpu._library() is None, reason="no compiler, or not an x86-64 CPU with AVX2")


@pytest.fixture(params=["compiled", "torch"])
def layout(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_library", lambda: None)
    elif cpu._library() is None:
        pytest.skip("no compiler, or not an x86-64 CPU with AVX2")
    return request.param


@pytest.fixture
def one_thread_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def matrix(rows, columns, bits, group_size=128, symmetric=True, dtype=torch.bfloat16, seed=0):
    """Codes, scales and zero points."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = (rows, columns // group_size)
    scale = (torch.rand(groups, generator=generator) * 0.01 + 0.001).to(dtype)
    zero_point = None if symmetric else torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator)
    return codes, scale, zero_point


def weights_of(codes, scale, zero_point, bits, group_size):
    """The weights in float64, where products of codes and scales are exact."""
    middle = 2 ** (bits - 1)
    zero_point = middle if zero_point is None else zero_point.double().repeat_interleave(group_size, 1)
    return (codes.double() - zero_point) * scale.double().repeat_interleave(group_size, 1)


def join(shards):
    """Arguments of `cpu.linear` after x; symmetric shards get zero points if another one has some."""
    zero_points = None
    if any(shard.zero_points is not None for shard in shards):
        zero_points = torch.cat(
            [
                torch.full(shard.scales.shape, 2 ** (shard.bits - 1), dtype=torch.uint8)
                if shard.zero_points is None
                else shard.zero_points
                for shard in shards
            ]
        )
    return (
        torch.cat([shard.weights for shard in shards]),
        torch.cat([shard.scales for shard in shards]),
        zero_points,
        [shard.bits for shard in shards],
        [shard.rows for shard in shards],
        shards[0].group_size,
    )


def activations(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_rms(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def assert_exact_up_to_rounding(got, expected, summing):
    """At most 2 % more error than the rounded exact result has; in float32 what sums in float32 may add."""
    assert got.shape == expected.shape
    rounding = relative_rms(expected.to(got.dtype), expected)
    if got.dtype == torch.float32:
        assert relative_rms(got, expected) < rounding + summing
    else:
        assert relative_rms(got, expected) <= 1.02 * rounding


@needs_kernel
def test_a_row_of_4_bit_codes_is_a_golden_word():
    codes = torch.full((64, 32), 8, dtype=torch.uint8)
    codes[17, 8:16] = torch.arange(8)
    shard = cpu.pack(codes, torch.ones(64, 1), None, 4, 32)
    words = shard.weights.view(torch.int32)
    # Step 1 (columns 8-15) begins at word 64, cell 1 (rows 16-31) 16 words later, row 17 is its lane 1. Codes 0 .. 7
    # are -8 .. -1, nibbles 8 .. F: columns 0, 2, 4, 6 in the lower half, 1, 3, 5, 7 in the upper.
    assert words[64 + 16 + 1].item() & 0xFFFFFFFF == 0xFDB9ECA8
    words[64 + 16 + 1] = 0
    assert not words.any()


@needs_kernel
def test_an_8_bit_code_is_a_golden_byte():
    codes = torch.full((64, 32), 128, dtype=torch.uint8)
    codes[35, 6] = 255
    shard = cpu.pack(codes, torch.ones(64, 1), None, 8, 32)
    # Step 1 (columns 4-7), cell 2 (rows 32-47), column 2 of it, row 3 of it: 255 - 128.
    assert shard.weights.nonzero().flatten().tolist() == [256 + 2 * 64 + 2 * 16 + 3]
    assert shard.weights.max().item() == 127


def test_unpacking_is_the_inverse_of_packing(layout):
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 140),
        groups=st.integers(1, 3),
        bits=st.sampled_from([4, 8]),
        group_size=st.sampled_from([32, 64, 128]),
        symmetric=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(rows, groups, bits, group_size, symmetric, dtype, seed):
        codes, scale, zero_point = matrix(rows, groups * group_size, bits, group_size, symmetric, dtype, seed)
        got_codes, got_scale, got_zero_point = cpu.unpack(cpu.pack(codes, scale, zero_point, bits, group_size))
        assert torch.equal(got_codes, codes)
        assert got_scale.dtype == dtype
        assert torch.equal(got_scale, scale)
        if zero_point is None:
            assert got_zero_point is None
        elif not (layout == "torch" and (zero_point == 2 ** (bits - 1)).all()):
            assert torch.equal(got_zero_point, zero_point)

    check()


@pytest.mark.parametrize(("bits", "bytes_per_weight"), [(4, 0.5), (8, 1)])
@needs_kernel
def test_a_packed_matrix_takes_the_bytes_of_its_codes_scales_and_zero_points(bits, bytes_per_weight):
    codes, scale, zero_point = matrix(128, 256, bits, symmetric=False)
    shard = cpu.pack(codes, scale, zero_point, bits, 128)
    assert shard.weights.nbytes == 128 * 256 * bytes_per_weight
    assert (shard.scales.nbytes, shard.zero_points.nbytes) == (128 * 2 * 2, 128 * 2)
    assert cpu.packed_sizes(bits, 128, 256, 128) == (shard.weights.numel(), shard.scales.numel())
    assert cpu.pack(codes, scale, None, bits, 128).zero_points is None


@pytest.mark.parametrize(("isa", "dtype"), isas_and_dtypes())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [128, 64, 32])
def test_product_is_the_exact_one_rounded(isa, dtype, bits, symmetric, group_size):
    columns, rows = 384, 100
    scale_dtype = {128: torch.bfloat16, 64: torch.float16, 32: torch.float32}[group_size]
    codes, scale, zero_point = matrix(rows, columns, bits, group_size, symmetric, scale_dtype)
    operands = join([cpu.pack(codes, scale, zero_point, bits, group_size)])
    exact_weights = weights_of(codes, scale, zero_point, bits, group_size)
    # Errors of K float32 additions, each of a partial sum: 2^-24 sqrt(K) of the result. AVX2's 4-bit codes are
    # multiplied as 24 + c, whose RMS is 24.4 against 4.6 for c.
    summing = math.sqrt(columns) * 2**-24 * (5.3 if isa == cpu.ISAS["AVX2"] and bits == 4 else 1)
    for tokens in (*range(1, 14), 16, 33, 100, 200):
        x = activations(tokens, columns, dtype=dtype)
        got = cpu.linear_with(isa, x, *operands, None)
        assert got.dtype == dtype
        assert_exact_up_to_rounding(got, x.double() @ exact_weights.T, summing)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("tokens", [2, 40])
def test_activations_of_one_sign_and_outliers_cost_no_accuracy(isa, tokens):
    codes, scale, zero_point = matrix(64, 512, 8, symmetric=False)
    operands = join([cpu.pack(codes, scale, zero_point, 8, 128)])
    exact_weights = weights_of(codes, scale, zero_point, 8, 128)
    outliers = activations(tokens, 512)
    outliers[:, ::64] *= 100
    for x in (activations(tokens, 512).abs() + 5, outliers):
        got = cpu.linear_with(isa, x, *operands, None)
        assert_exact_up_to_rounding(got, x.double() @ exact_weights.T, 0)


needs_vnni = pytest.mark.skipif(not cpu.supports(cpu.ISAS["AVX-512 VNNI"]), reason="no AVX-512 VNNI or no compiler")


@pytest.mark.parametrize("times", [1, 30, 100, 1000, 10000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@needs_vnni
def test_integers_of_16_bits_are_as_exact_as_the_kernels_header_says(dtype, times):
    codes, scale, _ = matrix(2048, 512, 8)
    x = activations(24, 512, dtype=dtype)
    x[:, 5::128] *= times  # one of each group
    expected = x.double() @ weights_of(codes, scale, None, 8, 128).T
    got = cpu.linear_with(cpu.ISAS["AVX-512 VNNI"], x, *join([cpu.pack(codes, scale, None, 8, 128)]), None)
    for token in range(24):
        rounding = relative_rms(expected[token].to(dtype), expected[token])
        # An error of 2e-4 in the product, and that of rounding it. (For bf16 that is 2 %: fp16 tells it from none.)
        # The norm of 2,048 independent errors is off by 1.6 %: 7 % are four times that.
        assert relative_rms(got[token], expected[token]) < 1.07 * math.hypot(rounding, 2e-4)


@pytest.mark.parametrize("outliers", [1, 8, 30])
@pytest.mark.parametrize("times", [5, 13, 50, 200, 10000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group_size", "tokens"), [(4, 128, 3), (8, 128, 40), (8, 64, 300), (4, 64, 12)])
@needs_vnni
def test_outliers_whose_weights_are_zero_do_not_cost_the_others_their_accuracy(
    bits, group_size, tokens, dtype, times, outliers
):
    codes, scale, zero_point = matrix(512, 256, bits, group_size, symmetric=False)
    x = activations(tokens, 256, dtype=dtype)
    others = torch.ones(256, dtype=torch.bool)
    for first in range(0, 256, group_size):
        columns = slice(first + 3, first + 3 + outliers)
        x[::2, columns], others[columns] = 3.0 * times, False
        codes[:, columns] = zero_point[:, first // group_size].unsqueeze(1)
    operands = join([cpu.pack(codes, scale, zero_point, bits, group_size)])
    expected = x.double() @ weights_of(codes, scale, zero_point, bits, group_size).T
    got = cpu.linear_with(cpu.ISAS["AVX-512 VNNI"], x, *operands, None)
    # What each group has lost of its median, and rounding the result. The RMS of 136 errors, the fewest, is off by 4 %;
    # with 10,000 tokens in all one is off by four times that.
    medians = (
        x.double().abs().view(tokens, -1, group_size).kthvalue(group_size // 2 + 1, dim=2)[0].square().mean(1).sqrt()
    )
    lost = 0.29 / (2**8 if dtype == torch.bfloat16 else 2**11) * medians
    lost /= x[:, others].double().square().mean(1).sqrt()
    for token in range(tokens):
        rounding = relative_rms(expected[token].to(dtype), expected[token])
        assert relative_rms(got[token], expected[token]) < 1.16 * math.hypot(rounding, lost[token])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("bits", "largest"), [(4, 15), (8, 255)])
def test_the_largest_sums_do_not_overflow(isa, tokens, bits, largest):
    codes = torch.cat([torch.full((64, 128), code, dtype=torch.uint8) for code in (0, largest)])
    zero_point = largest - codes[:, :1]
    operands = join([cpu.pack(codes, torch.ones(128, 1), zero_point, bits, 128)])
    for sign in (1, -1):
        got = cpu.linear_with(isa, torch.full((tokens, 128), sign * 1.9921875, dtype=torch.bfloat16), *operands, None)
        exact = torch.tensor(sign * 1.9921875 * 128 * largest, dtype=torch.float64).to(torch.bfloat16)
        assert torch.equal(got, torch.cat([-exact.expand(tokens, 64), exact.expand(tokens, 64)], dim=1))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("tokens", [6, 40])
def test_activations_may_have_any_size_and_what_is_no_number_stays_with_its_token(isa, tokens):
    operands = join([cpu.pack(*matrix(64, 256, 4), 4, 128)])
    x = activations(tokens, 256)
    x[0] = 0
    x[1] *= 2.0**-110
    x[2] *= 2.0**100
    x[3, 7] = math.inf
    x[4, 200] = math.nan
    got = cpu.linear_with(isa, x, *operands, None)
    expected = x.double() @ weights_of(*matrix(64, 256, 4), 4, 128).T
    assert not got[0].any()
    for token in (1, 2, 5):
        assert_exact_up_to_rounding(got[token], expected[token], 0)
    assert not got[3:5].isfinite().any()
    assert got[5:].isfinite().all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 16, 50])
def test_shards_of_different_bits_and_ragged_sizes_are_one_call(isa, with_bias, tokens):
    bits, sizes = (4, 8, 4, 8), (64, 20, 130, 7)
    matrices = [
        matrix(n, 256, b, symmetric=i % 2 == 0, seed=i) for i, (n, b) in enumerate(zip(sizes, bits, strict=True))
    ]
    operands = join([cpu.pack(*m, b, 128) for m, b in zip(matrices, bits, strict=True)])
    x, bias = activations(tokens, 256), activations(sum(sizes), seed=9) if with_bias else None
    expected = x.double() @ torch.cat([weights_of(*m, b, 128) for m, b in zip(matrices, bits, strict=True)]).T
    if with_bias:
        expected += bias.double()
    assert_exact_up_to_rounding(cpu.linear_with(isa, x, *operands, bias), expected, 0)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [128, 32])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_a_token_is_computed_alike_whatever_comes_with_it_and_by_any_number_of_threads(
    isa, bits, group_size, outlier, one_thread_after
):
    operands = join([cpu.pack(*matrix(200, 256, bits, group_size, symmetric=False), bits, group_size)])
    x = activations(300, 256)
    x[::3, 5] *= outlier  # these tokens' first group needs a second pass with VNNI, their neighbours' does not
    torch.set_num_threads(1)
    whole = cpu.linear_with(isa, x, *operands, None).view(torch.int16)
    for tokens in (1, 2, 3, 5, 8, 12, 13, 64, 193):
        for first in (0, 1):
            part = cpu.linear_with(isa, x[first : first + tokens], *operands, None)
            assert torch.equal(part.view(torch.int16), whole[first : first + tokens])
    torch.set_num_threads(2)
    for tokens in (1, 7, 40, 300):
        assert torch.equal(cpu.linear_with(isa, x[:tokens], *operands, None).view(torch.int16), whole[:tokens])


@pytest.mark.parametrize("isa", isas())
def test_rounding_is_to_nearest_even_and_keeps_what_is_not_a_number(isa):
    codes = torch.full((64, 32), 8, dtype=torch.uint8)
    codes[:, :2] = 9  # the sum of two columns
    # Only the rounded sum overflows, not the float32 ones before it.
    operands = join([cpu.pack(codes, torch.full((64, 1), 2.0**20), None, 4, 32)])
    x = torch.zeros(5, 32, dtype=torch.bfloat16)
    x[:, :2] = torch.tensor([[256, 1], [258, 1], [-256, -1], [3.3895e38, 1e36], [math.nan, 1]]) * 2.0**-20
    got = cpu.linear_with(isa, x, *operands, None)
    assert got[:4, 5].tolist() == [256, 260, -256, math.inf]
    assert got[4].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_give_no_rows(layout, dtype):
    operands = join([cpu.pack(*matrix(20, 128, 4, dtype=dtype), 4, 128)])
    assert cpu.linear(torch.empty(0, 128, dtype=dtype), *operands, None).shape == (0, 20)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@needs_kernel
def test_product_with_rounded_weights_is_exact_up_to_both_roundings(with_bias, bits, dtype):
    sizes = (600, 70)  # more than a slab, and a ragged tile
    matrices = [matrix(n, 256, bits, symmetric=False, seed=n) for n in sizes]
    operands = join([cpu.pack(*m, bits, 128) for m in matrices])
    x, bias = activations(40, 256, dtype=dtype), activations(sum(sizes), dtype=dtype) if with_bias else None
    weights = torch.cat([weights_of(*m, bits, 128) for m in matrices])
    expected, with_rounded_weights = x.double() @ weights.T, x.double() @ weights.to(dtype).double().T
    if with_bias:
        expected, with_rounded_weights = expected + bias.double(), with_rounded_weights + bias.double()
    got = cpu.linear_dequantized(x, *operands, bias)
    # Weights, and the sum of product and bias, are rounded once each. The squares of independent errors add; 26,800
    # values leave a correlation of 0.006, half of that in the result at most: 2 % are six of its deviations. float32
    # sums add 2^-24 sqrt(K) at most.
    rounding = math.hypot(relative_rms(with_rounded_weights, expected), relative_rms(expected.to(dtype), expected))
    assert relative_rms(got, expected) < 1.02 * rounding + math.sqrt(256) * 2**-24


@needs_kernel
def test_with_amx_many_tokens_are_multiplied_by_torch(monkeypatch):
    operands = join([cpu.pack(*matrix(64, 128, 4), 4, 128)])
    calls = []
    monkeypatch.setattr(cpu, "_has_amx", lambda dtype: True)
    monkeypatch.setattr(cpu, "linear_dequantized", lambda x, *rest: calls.append(x.shape[0]))
    for tokens in (1, cpu.AMX_FROM_TOKENS - 1, cpu.AMX_FROM_TOKENS, 100):
        cpu.linear(activations(tokens, 128), *operands, None)
    assert calls == [cpu.AMX_FROM_TOKENS, 100]


def weights_in_planes(codes, scale, zero_point, bits, group_size):
    """The weights in float64 as torch's layout has them: additive zeros are rounded to the dtype of the scales."""
    rows = codes.shape[0]
    nibbles = codes if bits == 4 else torch.cat([codes >> 4, codes & 15], dim=1)
    scale_zeros = cpu_packing.pack_scale_zeros(scale, zero_point, bits)[:, :rows].double()
    scales, zeros = scale_zeros.repeat_interleave(group_size, 0).unbind(-1)
    weights = (nibbles.double() - 8) * scales.T + zeros.T
    return weights if bits == 4 else sum(weights.chunk(2, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("group_size", [128, 32])
def test_torchs_kernel_takes_over_where_nothing_can_be_compiled(dtype, tokens, group_size, monkeypatch):
    monkeypatch.setattr(cpu, "_library", lambda: None)
    bits, sizes = (4, 8, 4), (80, 20, 40)
    matrices = [
        matrix(n, 256, b, group_size, i % 2 == 0, dtype, seed=i)
        for i, (n, b) in enumerate(zip(sizes, bits, strict=True))
    ]
    operands = join([cpu.pack(*m, b, group_size) for m, b in zip(matrices, bits, strict=True)])
    x, bias = activations(tokens, 256, dtype=dtype), activations(sum(sizes), dtype=dtype)
    exact, used = [], []
    for m, b in zip(matrices, bits, strict=True):
        exact.append(weights_of(*m, b, group_size))
        blockwise = tokens >= cpu.BLOCKWISE_FROM_TOKENS[b]
        used.append(exact[-1].to(dtype).double() if blockwise else weights_in_planes(*m, b, group_size))
    exact, used = torch.cat(exact), torch.cat(used)
    expected = x.double() @ exact.T + bias.double()
    got = cpu.linear(x, *operands, bias)
    assert got.dtype == dtype
    # The product with the weights that are used, and its sum with the bias, are rounded once each. In float32 2 K
    # products (8 bits: two planes) add 2^-24 sqrt(2 K) at most, and unpacking 2^-24 of what a weight is summed from,
    # (nibble - 8) * s and an additive zero: each is up to 15 s, weights are about 6 s. Now and then that tips a
    # rounding the other way, whence 2 %.
    rounded = (x.double() @ used.T).to(dtype).double().add(bias.double()).to(dtype)
    assert relative_rms(got, expected) < 1.02 * relative_rms(rounded, expected) + (math.sqrt(512) + 15 / 6) * 2**-24
    assert cpu.kernel_name().startswith("torch int4")


def test_scales_of_another_dtype_than_the_activations_are_used_as_they_are(layout):
    codes, scale, zero_point = matrix(64, 256, 8, symmetric=False, dtype=torch.bfloat16)
    operands = join([cpu.pack(codes, scale, zero_point, 8, 128)])
    x = activations(3, 256, dtype=torch.float32)
    # bf16 scales and the two parts of a zero (torch's layout) are exact in float32, but their parts carry 16 bits.
    bound = 2**-16 if layout == "torch" else math.sqrt(256) * 2**-24
    expected = x.double() @ weights_of(codes, scale, zero_point, 8, 128).T
    assert relative_rms(cpu.linear(x, *operands, None), expected) < bound


def mapping_at(address):
    """The entry of /proc/self/smaps that an address lies in, None if there is none."""
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for entry in filter(None, entries):
        start, end = (int(bound, 16) for bound in entry.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return entry
    return None


@pytest.mark.parametrize("count", [100, 5_000_000])
def test_memory_in_huge_pages_is_all_there_and_given_back(count):
    tensor = cpu.empty_in_huge_pages(count, torch.bfloat16)
    tensor.fill_(3)
    assert tensor.shape == (count,)
    assert tensor.double().sum() == 3 * count
    assert tensor.untyped_storage().nbytes() == 2 * count
    if count == 100 or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        return
    address = tensor.data_ptr()
    assert address % 2**21 == 0
    assert re.search(r"^VmFlags:.* hg\b", mapping_at(address), re.MULTILINE)
    assert " hg" not in mapping_at(address + 2 * count - 1).rpartition("VmFlags:")[2]
    del tensor
    assert mapping_at(address) is None


@needs_kernel
def test_a_layer_of_many_pages_is_computed_as_a_small_one():
    matrices = [matrix(2500, 2048, bits, seed=bits) for bits in (4, 8)]
    operands = ops.join([ops.pack(*m, bits, 128) for m, bits in zip(matrices, (4, 8), strict=True)])
    weights = torch.cat([weights_of(*m, bits, 128) for m, bits in zip(matrices, (4, 8), strict=True)])
    x = activations(2, 2048)
    got = cpu.linear(x, operands.weights, operands.scales, None, operands.bits, operands.sizes, 128, None)
    assert_exact_up_to_rounding(got, x.double() @ weights.T, 0)


@needs_kernel
def test_an_instruction_set_that_does_not_fit_is_refused():
    operands = join([cpu.pack(*matrix(64, 128, 4), 4, 128)])
    with pytest.raises(ValueError, match="instruction set 3"):
        cpu.linear_with(cpu.ISAS["AVX-512 VNNI"], activations(1, 128, dtype=torch.float32), *operands, None)


@pytest.mark.parametrize("multiply", [cpu.linear, cpu.linear_dequantized])
@pytest.mark.parametrize("bits", [2, 16])
@needs_kernel
def test_bits_that_the_kernel_does_not_know_are_refused(multiply, bits):
    weights, scales, zero_points, _, sizes, group_size = join([cpu.pack(*matrix(64, 128, 8), 8, 128)])
    with pytest.raises(ValueError, match=rf"\[{bits}\] bits"):
        multiply(activations(1, 128), weights, scales, zero_points, [bits], sizes, group_size, None)


@needs_kernel
def test_calls_from_several_python_threads_do_not_disturb_each_other(one_thread_after):
    torch.set_num_threads(2)
    operands = join([cpu.pack(*matrix(256, 512, 4), 4, 128)])
    inputs = [activations(tokens, 512, seed=tokens) for tokens in (1, 3, 20, 60)]
    expected = [cpu.linear(x, *operands, None) for x in inputs]
    wrong = []

    def work(x, want):
        for _ in range(30):
            if not torch.equal(cpu.linear(x, *operands, None), want):
                wrong.append(x.shape[0])

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernel
def test_the_kernel_runs_on_torchs_own_openmp_threads():
    program = """
import torch
from taq_kernels import cpu
torch.set_num_threads(2)
shard = cpu.pack(torch.zeros(256, 128, dtype=torch.uint8), torch.ones(256, 1), None, 4, 128)
cpu.linear(torch.ones(2, 128), shard.weights, shard.scales, None, [4], [256], 128, None)
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}))
print(len([thread for thread in __import__("os").listdir("/proc/self/task")]))
torch.ones(512, 512) @ torch.ones(512, 512)
print(len([thread for thread in __import__("os").listdir("/proc/self/task")]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    runtimes, threads, threads_after_torch = map(int, done.stdout.split())
    assert runtimes == 1
    assert threads_after_torch == threads
