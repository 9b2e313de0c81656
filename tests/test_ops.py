import pytest
import torch
from taq_kernels import ops, packing, reference

ops.register()


def matrix(rows, columns, bits, symmetric=True, group_size=128, seed=0):
    """Arguments of `ops.pack` and of `reference.dequantize`."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    groups = (rows, columns // group_size)
    scale = (torch.rand(groups, generator=generator) * 0.01 + 0.001).bfloat16()
    zero_point = None if symmetric else torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator)
    return codes, scale, zero_point, bits, group_size


def operands(*matrices):
    return tuple(vars(ops.join([ops.pack(*one) for one in matrices])).values())


def activations(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_rms(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


MIXED = (matrix(64, 256, 4, seed=2), matrix(20, 256, 8, symmetric=False, seed=3), matrix(36, 256, 4, False, seed=4))


def summing(columns):
    """Relative RMS error of so many float32 additions, each of a partial sum."""
    return columns**0.5 * 2**-24


# The output is rounded, nothing else: a hundredth more than that is float32 sums landing across a boundary.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_matrices_of_different_bits_symmetry_and_ragged_rows_are_computed_in_one_call(dtype, tokens):
    x, bias = activations(tokens, 256, dtype=dtype), activations(120, dtype=dtype, seed=5)
    weights = torch.cat([reference.dequantize(*one) for one in MIXED])
    expected = x.double() @ weights.double().t() + bias.double()
    got = torch.ops.taq.linear(x, *operands(*MIXED), bias)
    assert got.dtype == dtype
    assert relative_rms(got, expected) < 1.01 * relative_rms(expected.to(dtype), expected) + summing(256)


@pytest.mark.parametrize("group_size", packing.GROUP_SIZES)
def test_every_group_size_reaches_the_kernel(group_size):
    one = matrix(48, 320 if group_size < 128 else 384, 4, symmetric=False, group_size=group_size)
    x = activations(3, one[0].shape[1], dtype=torch.float32)
    expected = reference.linear(x, *one)
    assert relative_rms(torch.ops.taq.linear(x, *operands(one)), expected) < summing(320)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape_is_kept(leading):
    out = torch.ops.taq.linear(activations(*leading, 128), *operands(matrix(32, 128, 4)))
    assert out.shape == (*leading, 32)


def test_strides_of_the_input_do_not_matter():
    packed = operands(matrix(32, 128, 8))
    wide = activations(6, 256)
    for x in (wide[:, 64:192], wide[:, ::2], activations(128, 6).t()):
        assert not x.is_contiguous()
        assert torch.equal(torch.ops.taq.linear(x, *packed), torch.ops.taq.linear(x.contiguous(), *packed))


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("with_bias", [False, True])
def test_operator_keeps_torchs_contract(tokens, with_bias):
    bias = activations(120) if with_bias else None
    torch.library.opcheck(torch.ops.taq.linear.default, (activations(tokens, 256), *operands(*MIXED), bias))


def test_compiled_graph_holds_the_operator_whole_for_every_number_of_tokens():
    packed = operands(*MIXED)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x):
        return torch.ops.taq.linear(x * 2, *packed) + 1

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (3, 60, 200):
        x = activations(tokens, 256)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1
    assert [str(node.target) for node in graphs[0].graph.nodes].count("taq.linear") == 1


def test_registering_twice_is_harmless():
    ops.register()
    ops.register()
    assert torch.ops.taq.linear(activations(1, 128), *operands(matrix(16, 128, 4))).shape == (1, 16)


# What is wrong is named, and nothing is read before it was checked.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(8, 128, dtype=torch.int32)}, "codes are torch.int32; uint8"),
        ({"codes": torch.zeros(8, 96, dtype=torch.uint8)}, r"\[8, 96\] cannot be cut into groups of 128"),
        ({"codes": torch.zeros(1024, dtype=torch.uint8)}, r"\[1024\] cannot be cut"),
        ({"scale": torch.ones(8, 2).bfloat16()}, r"scale is \[8, 2\].* need \[8, 1\]"),
        ({"scale": torch.ones(8, 1, dtype=torch.float64)}, "scale is torch.float64"),
        ({"zero_point": torch.zeros(7, 1, dtype=torch.uint8)}, r"zero_point is \[7, 1\]"),
        ({"zero_point": torch.zeros(8, 1)}, "zero_point is torch.float32; uint8"),
        ({"bits": 3}, "bits is 3"),
        ({"group_size": 96}, "group_size is 96"),
        ({"scale": torch.ones(8, 1, device="meta").bfloat16()}, "scale lies on meta and codes on cpu"),
    ],
)
def test_what_cannot_be_packed_is_named(change, message):
    arguments = dict(
        zip(("codes", "scale", "zero_point", "bits", "group_size"), matrix(8, 128, 4), strict=True),
    )
    with pytest.raises(ValueError, match=message):
        ops.pack(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": activations(3, 128, dtype=torch.float64)}, "x of torch.float64"),
        ({"x": activations(3, 128).to(torch.int8)}, "x of torch.int8"),
        ({"x": activations(3, 100)}, "100 columns in groups of 128"),
        ({"x": activations(3, 384)}, "384 columns in groups of 128, for x of torch.bfloat16, need"),
        (
            {"weights": torch.zeros(5, dtype=torch.uint8)},
            r"weights of .*uint8 and shape \[5\].*32 rows at \[4\] bits",
        ),
        ({"weights": torch.zeros(2048)}, "weights of torch.float32.* values of torch.uint8"),
        ({"scales": torch.zeros(31).bfloat16()}, r"scales of torch.bfloat16 and shape \[31\]"),
        ({"scales": torch.zeros(64, dtype=torch.float64)}, "scales of torch.float64"),
        ({"zero_points": torch.zeros(7, dtype=torch.uint8)}, r"zero_points of torch.uint8 and shape \[7\]"),
        ({"zero_points": torch.zeros(64, dtype=torch.int32)}, "zero_points of torch.int32"),
        ({"bias": torch.zeros(33).bfloat16()}, r"bias of torch.bfloat16 and shape \[33\]"),
        ({"bias": torch.zeros(32)}, "bias of torch.float32.* for x of torch.bfloat16"),
        ({"bits": [0]}, r"bits \[0\]; matrices on cpu have 4, 8 bits"),
        ({"bits": [16]}, r"bits \[16\]"),
        ({"x": torch.zeros(3, 0).bfloat16()}, "0 columns in groups of 128"),
        ({"group_size": 100}, "groups have 32, 64, 128 columns"),
        ({"sizes": [32, 32]}, r"bits \[4\] for matrices of \[32, 32\] rows"),
        ({"sizes": [0]}, r"matrices of \[0\] rows"),
        ({"sizes": [320]}, "320 rows"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, message):
    names = ("weights", "scales", "zero_points", "tables", "launches", "bits", "sizes", "group_size")
    packed = dict(zip(names, operands(matrix(32, 128, 4)), strict=True))
    with pytest.raises(ValueError, match=message):
        torch.ops.taq.linear(**{"x": activations(3, 128), "bias": None} | packed | change)


def test_matrices_that_cannot_share_a_call_are_refused():
    one = ops.pack(*matrix(16, 128, 4))
    with pytest.raises(ValueError, match=r"K=128 .* and K=256"):
        ops.join([one, ops.pack(*matrix(16, 256, 4))])
    codes, scale, *rest = matrix(16, 128, 4)
    with pytest.raises(ValueError, match=r"one dtype; got .*bfloat16.*float32"):
        ops.join([one, ops.pack(codes, scale.float(), *rest)])


def test_a_layer_needs_a_matrix():
    with pytest.raises(ValueError, match="no matrices"):
        ops.join([])


def test_16_bit_matrices_can_be_joined_without_quantized_ones(monkeypatch):
    monkeypatch.setattr(ops, "_launch_tables", lambda *arguments: ([], []))
    dense = packing.pack_dense_tiles(activations(16, 128), 128)
    joined = ops.join([dense, dense])
    assert (joined.bits, joined.sizes, joined.scales.numel(), joined.zero_points) == ([16, 16], [16, 16], 0, None)


def test_a_cpu_has_no_packed_form_of_16_bits():
    with pytest.raises(ValueError, match="on cpu; only 16-bit weights on a GPU"):
        ops.pack_dense(torch.zeros(16, 128).bfloat16(), 128)


# On a GPU, where 16-bit matrices stand in the same launch.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_a_gpu_computes_three_bitwidths_in_one_call_and_a_graph_can_replay_it(dtype, tokens):
    dense = activations(128, 256, dtype=dtype, seed=6)
    shards = [ops.pack(*(part.cuda() if torch.is_tensor(part) else part for part in one)) for one in MIXED]
    joined = ops.join([*shards, ops.pack_dense(dense.cuda(), 128)])
    ops.warm_up(joined, 256, dtype)
    packed = tuple(vars(joined).values())
    x = activations(tokens, 256, dtype=dtype)
    weights = torch.cat([*(reference.dequantize(*one) for one in MIXED), dense.float()])
    expected = x.double() @ weights.double().t()
    x = x.cuda()
    # Above the last bucket weights are rounded to the dtype of x as well: two errors of one size, side by side.
    bound = relative_rms(expected.to(dtype), expected) * (1.01 if tokens <= 256 else 1.5)
    assert relative_rms(torch.ops.taq.linear(x, *packed).cpu(), expected) < bound
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.taq.linear(x, *packed)
    x.mul_(2)
    graph.replay()
    assert relative_rms(out.cpu(), 2 * expected) < bound
