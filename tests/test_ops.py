import math

import pytest
import torch
from taq_kernels import cpu, ops, packing, reference

# Relative RMS error of one rounding: half a spacing at most, a spacing / sqrt(12) on average, over mantissas m spread
# as they come (mean of m^2: 2.16), which is 0.79 of these values; the largest single error is twice these values.
EPSILON = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-25}

ops.register()


def shard(rows, columns, bits, dtype, group_size=128, symmetric=True, seed=0, order="blocks"):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = (rows, columns // group_size)
    scale = torch.rand(groups, generator=generator) * 0.01 + 0.001
    zero_point = None if symmetric else torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator)
    planes = packing.pack_planes(codes, bits, order)
    return planes, packing.pack_scale_zeros(scale, zero_point, bits, dtype)


def activations(*shape, dtype, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_rms(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def call(x, shards, bits, sizes, group_size=128, bias=None):
    planes, scale_zeros = (list(column) for column in zip(*shards, strict=True))
    return torch.ops.taq.linear(x, planes, scale_zeros, list(bits), list(sizes), group_size, bias)


# Few tokens: the int4 kernel sums float32 weights in float32, so what is left is the rounding of the output (EPSILON)
# and of the additive zero: up to 8 steps * EPSILON per weight, whose size is about 6 steps (uniform codes and zero
# points), hence another EPSILON. Many tokens: weights rounded once, output once. Float32 sums in another order differ
# by a few 2^-24 times the square root of K.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("group_size", packing.GROUP_SIZES)
def test_product_on_cpu_is_the_reference_up_to_rounding(dtype, bits, symmetric, tokens, group_size):
    planes, scale_zeros = shard(80, 384, bits, dtype, group_size, symmetric)
    x = activations(tokens, 384, dtype=dtype)
    got = cpu.linear(x, planes, scale_zeros, bits, group_size)
    expected = reference.linear_float32(x, planes, scale_zeros, bits, group_size, "blocks")
    summing = math.sqrt(384) * 2**-24
    assert got.dtype == dtype
    assert relative_rms(got, expected) < math.sqrt(2) * EPSILON[dtype] + 4 * summing


def test_asymmetric_8_bit_zeros_are_exact_also_where_their_errors_would_add_up():
    # Activations of one sign: an error of the additive zero, the same for a whole group, is not averaged away.
    planes, scale_zeros = shard(64, 512, 8, torch.bfloat16, symmetric=False)
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    got = cpu.linear(x, planes, scale_zeros, 8, 128)
    # The truth knows the integer zero points, in float32. What is left is the rounding of the output.
    expected = reference.linear_float32(x, planes, scale_zeros, 8, 128, "blocks")
    assert ((got.float() - expected).abs() <= 2.01 * EPSILON[torch.bfloat16] * expected.abs()).all()


@pytest.mark.parametrize("bits", packing.BITS)
def test_both_cpu_paths_are_taken_and_agree(bits, monkeypatch):
    planes, scale_zeros = shard(64, 256, bits, torch.float32)
    x = activations(8, 256, dtype=torch.float32)
    few = cpu.linear(x, planes, scale_zeros, bits, 128)
    monkeypatch.setitem(cpu.BLOCKWISE_FROM_TOKENS, bits, 1)
    calls = []
    blockwise = cpu._linear_blockwise
    monkeypatch.setattr(cpu, "_linear_blockwise", lambda *a: calls.append(a) or blockwise(*a))
    many = cpu.linear(x, planes, scale_zeros, bits, 128)
    assert calls
    assert relative_rms(many, few) < 1e-5


# What a GPU runs, computed on the CPU: rows order, weights and output rounded once each.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", packing.BITS)
def test_plain_product_in_rows_order_is_the_reference_up_to_rounding(dtype, bits, monkeypatch):
    monkeypatch.setattr(packing, "_SLAB_ROWS", 32)
    planes, scale_zeros = shard(80, 256, bits, dtype, symmetric=False, order="rows")
    x = activations(7, 256, dtype=dtype)
    got = reference.linear(x, planes, scale_zeros, bits, 128)
    expected = reference.linear_float32(x, planes, scale_zeros, bits, 128, "rows")
    assert got.shape == (7, 80)
    assert relative_rms(got, expected) < math.sqrt(2) * EPSILON[dtype] + 4 * math.sqrt(256) * 2**-24


def test_shards_of_different_bits_and_ragged_sizes_are_computed_side_by_side():
    dtype = torch.float32
    bits, sizes = (4, 8, 4), (64, 20, 36)
    shards = [shard(n, 256, b, dtype, seed=i) for i, (n, b) in enumerate(zip(sizes, bits, strict=True))]
    x = activations(3, 256, dtype=dtype)
    bias = activations(sum(sizes), dtype=dtype)
    parts = [
        reference.linear_float32(x, *s, b, 128, "blocks")[:, :n] for s, b, n in zip(shards, bits, sizes, strict=True)
    ]
    got = call(x, shards, bits, sizes, bias=bias)
    assert relative_rms(got, torch.cat(parts, 1) + bias) < 1e-5


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_is_kept(leading):
    one = shard(32, 128, 4, torch.bfloat16)
    out = call(activations(*leading, 128, dtype=torch.bfloat16), [one], [4], [32])
    assert out.shape == (*leading, 32)


def test_strides_of_the_input_do_not_matter():
    one = shard(32, 128, 8, torch.bfloat16)
    wide = activations(6, 256, dtype=torch.bfloat16)
    for x in (wide[:, 64:192], wide[:, ::2], activations(128, 6, dtype=torch.bfloat16).t()):
        assert not x.is_contiguous()
        assert torch.equal(call(x, [one], [8], [32]), call(x.contiguous(), [one], [8], [32]))


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("with_bias", [False, True])
def test_operator_keeps_torchs_contract(tokens, with_bias):
    dtype = torch.bfloat16
    shards = [shard(32, 128, 4, dtype), shard(20, 128, 8, dtype)]
    planes, scale_zeros = (list(column) for column in zip(*shards, strict=True))
    bias = activations(52, dtype=dtype) if with_bias else None
    x = activations(tokens, 128, dtype=dtype)
    torch.library.opcheck(torch.ops.taq.linear.default, (x, planes, scale_zeros, [4, 8], [32, 20], 128, bias))


def test_compiled_graph_holds_the_operator_whole_for_every_number_of_tokens():
    shards = [shard(32, 128, 4, torch.bfloat16), shard(20, 128, 8, torch.bfloat16)]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x):
        return call(x * 2, shards, [4, 8], [32, 20]) + 1

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 60, 200):
        x = activations(tokens, 128, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1
    assert [str(node.target) for node in graphs[0].graph.nodes].count("taq.linear") == 1


def test_registering_twice_is_harmless():
    ops.register()
    ops.register()
    one = shard(16, 128, 4, torch.bfloat16)
    assert call(activations(1, 128, dtype=torch.bfloat16), [one], [4], [16]).shape == (1, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", packing.BITS)
def test_product_on_a_gpu_is_the_reference_and_can_be_captured_in_a_graph(bits):
    planes, scale_zeros = shard(80, 256, bits, torch.bfloat16, symmetric=False, order="rows")
    x = activations(5, 256, dtype=torch.bfloat16)
    expected = reference.linear_float32(x, planes, scale_zeros, bits, 128, "rows")
    x, one = x.cuda(), (planes.cuda(), scale_zeros.cuda())
    assert relative_rms(call(x, [one], [bits], [80]).cpu(), expected) < math.sqrt(2) * EPSILON[torch.bfloat16]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, [one], [bits], [80])
    x.mul_(2)
    graph.replay()
    assert relative_rms(out.cpu(), 2 * expected) < math.sqrt(2) * EPSILON[torch.bfloat16]
