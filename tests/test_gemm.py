"""The GPU kernel: its arithmetic in Triton's interpreter and in an emulator of its assembly, its tables, and, where
there is a GPU, the compiled kernel itself. What it compiles to without one is in test_gemm_compile.py."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taq_kernels import gemm, ops, packing, reference
from taq_kernels.gemm import Config
from triton.runtime.interpreter import interpreter_builder

from tests import sass

MIXES = ((4,), (8,), (16,), (4, 8), (16, 8), (4, 8, 16))
ROWS = {4: 130, 8: 70, 16: 20}  # two tiles, the second of two rows; one ragged tile each
# By group size. Enough to be split at 32 tokens: 8, 8.5 and 7.75 blocks; else 3, 2.5 and 1.75.
SPLIT_COLUMNS = {128: 1024, 64: 1088, 32: 992}
WHOLE_COLUMNS = {128: 384, 64: 320, 32: 224}


@dataclass(frozen=True)
class Layer:
    """Random matrices, as the kernel takes them and as float32 weights."""

    weights: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: tuple[int, ...]
    sizes: tuple[int, ...]
    group_size: int
    dense: torch.Tensor  # [N, K] float32

    def operands(self, tables):
        return (
            self.weights,
            self.scales,
            self.zero_points,
            [table.to(self.weights.device) for table in tables.tables],
            tables.launches,
            self.bits,
            self.sizes,
            self.group_size,
        )

    @property
    def shapes(self):
        return tuple(zip(self.bits, self.sizes, strict=True))


def random_layer(shapes, columns, group_size, dtype, asymmetric, scale_dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(len(shapes) + columns)
    shards, dense = [], []
    for bits, rows in shapes:
        if bits == 16:
            weight = (torch.randn(rows, columns, generator=generator) / 20).to(dtype)
            shards.append(packing.pack_dense_tiles(weight, group_size))
            dense.append(weight.float())
            continue
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
        groups = (rows, columns // group_size)
        scale = (torch.rand(groups, generator=generator) / 2**bits).to(scale_dtype)
        zero_point = torch.randint(0, 2**bits, groups, dtype=torch.uint8, generator=generator) if asymmetric else None
        shards.append(packing.pack_tiles(codes, scale, zero_point, bits, group_size))
        dense.append(reference.dequantize(codes, scale, zero_point, bits, group_size))
    return Layer(
        weights=torch.cat([shard.weights for shard in shards]).to(device),
        scales=torch.cat([shard.scales.to(scale_dtype) for shard in shards]).to(device),
        zero_points=torch.cat([shard.zero_points for shard in shards if shard.bits < 16]).to(device)
        if asymmetric
        else None,
        bits=tuple(bits for bits, _ in shapes),
        sizes=tuple(rows for _, rows in shapes),
        group_size=group_size,
        dense=torch.cat(dense).to(device),
    )


def config(block_m=16, wide=True, programs_per_sm=1, dequantize=False, num_warps=4):
    return Config(
        block_m=block_m,
        num_warps=num_warps,
        stages_4=3,
        stages_8=2,
        stages_16=2,
        wide=wide,
        programs_per_sm=programs_per_sm,
        dequantize=dequantize,
    )


def assert_product(y, x, layer, bias, rounding, accumulation=2**-24):
    """`y` is x @ W^T + bias up to what float32 sums and one rounding of the result may do to it.

    A sum of n float32 products in any order is off by at most n * 2^-24 of the sum of their magnitudes (to first
    order); the codes times x are exact, each group's sum is multiplied by its scale once, and the groups' sums, at most
    K / 32 of them, the partial sums and the bias are added: n <= K + K / 32 + 2 K / 32.
    """
    exact = x.double() @ layer.dense.double().t()
    magnitude = x.double().abs() @ layer.dense.double().abs().t()
    if bias is not None:
        exact += bias.double()
        magnitude += bias.double().abs()
    terms = x.shape[1] * (1 + 3 / 32)
    bound = terms * accumulation * magnitude + rounding * exact.abs() + 2**-24  # 2^-24: fp16's subnormal step
    excess = (y.double() - exact).abs() - bound
    assert y.shape == exact.shape
    assert not y.isnan().any()
    assert excess.max() <= 0, f"off by {excess.max():.1e} more than rounding explains"


# The interpreter cuts bf16 results off (one step, 2^-7 of the value) and rounds fp16 ones (half a step, 2^-11).
INTERPRETED_ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 0.0}


def interpreted_cases():
    """Every mix of bits with every number of tokens, dtype and kind of zero point; the other properties in turn."""
    index = 0
    for bits in MIXES:
        for tokens in (1, 5, 16, 17, 33, 64):
            for dtype in (torch.bfloat16, torch.float16):
                for asymmetric in (False, True) if bits != (16,) else (False,):
                    group_size = (128, 64, 32)[index % 3]
                    split = index % 2 == 0
                    block_m = 16 if split and tokens == 33 else {1: 16, 5: 16, 16: 16, 17: 32, 33: 64, 64: 64}[tokens]
                    wide, bias = index % 4 < 2, index % 5 < 2
                    yield pytest.param(
                        bits, tokens, dtype, asymmetric, group_size, split, block_m, wide, bias,
                        id=f"{'+'.join(map(str, bits))}-M{tokens}-{str(dtype)[6:]}-{'asym' if asymmetric else 'sym'}"
                        f"-g{group_size}-{'split' if split else 'whole'}-bm{block_m}-{'wide' if wide else 'narrow'}"
                        f"{'-bias' if bias else ''}",
                    )  # fmt: skip
                    index += 1


@pytest.mark.parametrize(
    ("bits", "tokens", "dtype", "asymmetric", "group_size", "split", "block_m", "wide", "bias"),
    list(interpreted_cases()),
)
def test_interpreted_kernel_is_the_float32_product(
    interpreted, bits, tokens, dtype, asymmetric, group_size, split, block_m, wide, bias
):
    columns = (SPLIT_COLUMNS if split else WHOLE_COLUMNS)[group_size]
    layer = random_layer([(b, ROWS[b]) for b in bits], columns, group_size, dtype, asymmetric)
    # With 8 warps wide products load zero points late.
    launch = config(block_m, wide, programs_per_sm=64 if split else 1, num_warps=8 if bias else 4)
    tables = interpreted.build_tables(layer.shapes, columns, group_size, {64: launch}, num_sms=1)
    slots = dict(zip(gemm.LAUNCH, tables.launches, strict=True))["slots"]
    assert (slots > 0) == (split and block_m < 64)  # at 64 tokens a part needs 8 blocks: nothing to split here
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    b = torch.randn(sum(layer.sizes), generator=generator).to(dtype) if bias else None
    y = interpreted.linear(x, *layer.operands(tables), b)
    assert y.dtype == dtype
    assert_product(y, x, layer, b, INTERPRETED_ROUNDING[dtype])
    assert not tables.tables[-1].any(), "the counters of arrived parts are not zero again"


def test_result_does_not_depend_on_the_order_in_which_programs_run(interpreted, monkeypatch):
    layer = random_layer([(4, 140), (8, 40)], 1024, 128, torch.float16, False)
    tables = interpreted.build_tables(layer.shapes, 1024, 128, {64: config(programs_per_sm=64)}, num_sms=1)
    assert {item[gemm.ITEM.index("parts")] for item in tables.tables[0].tolist()} == {4}
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).half()
    expected = interpreted.linear(x, *layer.operands(tables))
    assert_product(expected, x, layer, None, INTERPRETED_ROUNDING[torch.float16])
    in_order = interpreter_builder.set_grid_idx
    programs = [(m_block, item) for m_block in range(4) for item in range(len(tables.tables[0]))]
    for seed in range(2):
        shuffled = dict(zip(programs, random.Random(seed).sample(programs, len(programs)), strict=True))
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, to=shuffled: in_order(*to[x, y], z))
        assert torch.equal(interpreted.linear(x, *layer.operands(tables)), expected)
        assert not tables.tables[-1].any()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_scales_keep_a_dtype_that_differs_from_the_activations(interpreted, scale_dtype):
    layer = random_layer([(4, 40), (8, 40)], 256, 128, torch.bfloat16, True, scale_dtype)
    tables = interpreted.build_tables(layer.shapes, 256, 128, {16: config()}, num_sms=1)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = interpreted.linear(x, *layer.operands(tables))
    assert_product(y, x, layer, None, INTERPRETED_ROUNDING[torch.bfloat16])


def test_no_tokens_give_no_rows(interpreted):
    layer = random_layer([(4, 40)], 128, 128, torch.bfloat16, False)
    tables = interpreted.build_tables(layer.shapes, 128, 128, {16: config()}, num_sms=1)
    assert interpreted.linear(torch.empty(0, 128).bfloat16(), *layer.operands(tables)).shape == (0, 40)


@pytest.mark.parametrize("group_size", packing.GROUP_SIZES)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantized_weights_are_the_references_rounded_once(interpreted, group_size, asymmetric, dtype):
    columns = WHOLE_COLUMNS[group_size]
    for bits in (4, 8):
        layer = random_layer([(bits, 130)], columns, group_size, dtype, asymmetric)
        out = torch.empty(130, columns, dtype=dtype)
        interpreted.dequantize(layer.weights, layer.scales, layer.zero_points, bits, columns, group_size, out)
        assert torch.equal(out, layer.dense.to(dtype))


@pytest.mark.parametrize(
    ("bits", "tokens", "dtype", "reason"),
    [
        ((4, 8, 16), 40, torch.float16, "more tokens than the largest bucket"),
        ((4, 8, 16), 8, torch.float16, "the configuration says so"),
        ((4, 8), 4, torch.float32, "float32 activations"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_vendor_product_of_dequantized_slabs_is_the_float32_product(
    interpreted, monkeypatch, bits, tokens, dtype, reason, bias
):
    monkeypatch.setattr(interpreted, "_SCRATCH_BYTES", 128 * 992 * dtype.itemsize)  # slabs of one tile
    layer = random_layer([(b, ROWS[b]) for b in bits], 992, 32, dtype, True)
    configs = {8: config(dequantize=True), 32: config(block_m=32)}
    tables = interpreted.build_tables(layer.shapes, 992, 32, configs, num_sms=1)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 992, generator=generator).to(dtype)
    b = torch.randn(sum(layer.sizes), generator=generator).to(dtype) if bias else None
    y = interpreted.linear(x, *layer.operands(tables), b)
    weights = layer.dense.to(dtype).double()  # rounded once, before the product
    assert_product(y, x, replace(layer, dense=weights), b, INTERPRETED_ROUNDING[dtype])


def test_activations_that_require_a_gradient_are_multiplied_without(interpreted):
    layer = random_layer([(4, 40)], 128, 128, torch.float16, False)
    tables = interpreted.build_tables(layer.shapes, 128, 128, {16: config()}, num_sms=1)
    for tokens in (3, 17):  # by the kernel; dequantized
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0)).half()
        y = interpreted.linear(x.clone().requires_grad_(), *layer.operands(tables))
        assert not y.requires_grad
        assert torch.equal(y, interpreted.linear(x, *layer.operands(tables)))


def test_warm_up_launches_every_bucket_and_what_is_above_them(interpreted, monkeypatch):
    layer = random_layer([(4, 40)], 128, 128, torch.float16, False)
    tables = interpreted.build_tables(layer.shapes, 128, 128, {16: config(), 64: config(32)}, num_sms=1)
    reached = []
    monkeypatch.setattr(
        interpreted, "linear", lambda x, *_: reached.append(interpreted._launch(tables.launches, x.shape[0]))
    )
    interpreted.warm_up(128, torch.float16, *layer.operands(tables))
    assert [launch and launch["index"] for launch in reached] == [0, 1, None]


def test_float32_activations_beside_16_bit_tiles_are_refused(interpreted):
    layer = random_layer([(4, 40), (16, 8)], 128, 128, torch.bfloat16, False)
    tables = interpreted.build_tables(layer.shapes, 128, 128, {16: config()}, num_sms=1)
    with pytest.raises(ValueError, match="x is float32"):
        interpreted.linear(torch.zeros(1, 128), *layer.operands(tables))


# ---- the assembly


def emulate(asm, registers):
    """Run a block of PTX on tensors that hold 32-bit registers as int64; $0 .. $3 are its results."""
    registers = dict(registers)
    dtypes = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for line in asm.strip("{}\n").splitlines():
        opcode, arguments = line.rstrip(";").split(" ", 1)
        if opcode == ".reg":
            continue
        target, *operands = arguments.split(", ")
        a, b, c, *table = [value(operand) for operand in operands] + [0] * (3 - len(operands))
        if opcode == "mov.b32":
            result = a
        elif opcode in ("shl.b32", "shr.u32"):
            result = a << b if opcode == "shl.b32" else a >> b
        elif opcode == "lop3.b32":
            result = 0
            for index in range(8):  # bit `index` of the table: what becomes of bits (a, b, c) = index in binary
                if table[0] >> index & 1:
                    terms = [operand if index >> bit & 1 else ~operand for operand, bit in ((a, 2), (b, 1), (c, 0))]
                    result = result | terms[0] & terms[1] & terms[2]
        else:
            name, mode, dtype = opcode.split(".")
            assert (name, mode) == ("fma", "rn")
            (a_low, a_high), (b_low, b_high), (c_low, c_high) = (halves(x, dtypes[dtype]) for x in (a, b, c))
            result = whole(a_low * b_low + c_low, a_high * b_high + c_high, dtypes[dtype])
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${j}"] for j in range(4)]


def halves(register, dtype):
    """The two floats in a register, in float64."""
    register = torch.as_tensor(register)
    return [(register >> shift & 0xFFFF).to(torch.int16).view(dtype).double() for shift in (0, 16)]


def whole(low, high, dtype):
    low, high = (
        half.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF for half in torch.broadcast_tensors(low, high)
    )
    return low | high << 16


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_assembly_is_exact_for_every_code_and_zero_point_in_every_place(bits, symmetric, dtype):
    # Row r has code (r + column) mod 2^bits, so each of the 128 places of a block sees all codes.
    codes = ((torch.arange(2**bits)[:, None] + torch.arange(128)) % 2**bits).to(torch.uint8)
    scale = torch.ones(2**bits, 1)
    shard = packing.pack_tiles(codes, scale, None, bits, 128)
    tile_rows = min(2**bits, 128)
    planes = shard.weights.view(-1, bits // 4, tile_rows, 32).to(torch.int64) & 0xFFFF  # [tiles, planes, rows, words]
    pairs = (planes[..., 0::2] | planes[..., 1::2] << 16).transpose(0, 1).reshape(bits // 4, 2**bits, 16)
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16
    zero_points = torch.tensor([2 ** (bits - 1)]) if symmetric else torch.arange(2**bits)
    addend = (gemm.addend_base(bits, dtype) - zero_points).to(torch_dtype)
    assert torch.equal(addend.double(), (gemm.addend_base(bits, dtype) - zero_points).double())
    addends = whole(addend, addend, torch_dtype)[:, None, None]
    registers = {f"${4 + plane}": pairs[plane] for plane in range(bits // 4)}
    registers |= {f"${4 + bits // 4 + j}": addends for j in range(4)}
    for j, result in enumerate(emulate(gemm.unpack_asm(bits, dtype, symmetric), registers)):
        for half, values in enumerate(halves(result, torch_dtype)):
            expected = codes[:, 32 * j + half : 32 * j + 32 : 2].double() - zero_points.double()[:, None, None]
            assert torch.equal(values.expand_as(expected), expected)


def test_assembly_uses_only_instructions_of_compute_capability_8_0():
    for bits in (4, 8):
        for dtype in ("bf16", "fp16"):
            opcodes = set(re.findall(r"^([a-z0-9]+\.[a-z0-9.]+) ", gemm.unpack_asm(bits, dtype, False), re.MULTILINE))
            assert opcodes <= {"mov.b32", "shl.b32", "shr.u32", "lop3.b32", "fma.rn.bf16x2", "fma.rn.f16x2"}


# ---- the tables

SHAPES = st.lists(st.tuples(st.sampled_from([4, 8, 16]), st.integers(1, 700)), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    SHAPES,
    st.integers(1, 40),
    st.sampled_from(gemm.BLOCK_MS),
    st.integers(1, 8),
    st.integers(1, 150),
    st.integers(1, 300),
)
def test_every_table_computes_each_row_once(shapes, groups, block_m, programs, num_sms, bucket):
    # build_tables validates what it built; the costliest items come first, and K is cut into equal parts.
    tables = gemm.build_tables(shapes, 64 * groups, 64, {bucket: config(block_m, True, programs)}, num_sms)
    items = [dict(zip(gemm.ITEM, item, strict=True)) for item in tables.tables[0].tolist()]
    blocks = -(-64 * groups // 128)
    lengths = [(i["part"] + 1) * blocks // i["parts"] - i["part"] * blocks // i["parts"] for i in items]
    assert min(lengths) >= 1
    assert sum(length * item["rows"] for length, item in zip(lengths, items, strict=True)) == blocks * sum(
        rows for _, rows in shapes
    )
    costs = [max(i["bits"], block_m / 12) * i["rows"] * length for i, length in zip(items, lengths, strict=True)]
    assert costs == sorted(costs, reverse=True)


def test_counters_cover_every_bucket():
    configs = {16: config(16, programs_per_sm=8), 64: config(16, programs_per_sm=64)}
    tables = gemm.build_tables([(4, 256)], 4096, 128, configs, num_sms=8)
    assert len(tables.tables) == 3
    launches = [tables.launches[i : i + len(gemm.LAUNCH)] for i in range(0, len(tables.launches), len(gemm.LAUNCH))]
    slots = [dict(zip(gemm.LAUNCH, launch, strict=True))["slots"] for launch in launches]
    assert min(slots) > 0
    assert tables.tables[-1].numel() == max(slots[0] * 1, slots[1] * 4)
    assert not tables.tables[-1].any()


TWO_SHARDS = [(4, 130), (8, 40)]


def small_table():
    """Tiles of 128, 2 and 40 rows, each cut in two parts: items by cost; 6 slots."""
    return gemm.build_tables(TWO_SHARDS, 512, 128, {16: config(programs_per_sm=64)}, num_sms=1).tables[0]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("bits", 5, "has bits 5"),
        ("weights", 10**6, "reads .* words from 32000000 on"),
        ("weights", -1, "words from -32 on"),
        ("scales", 9, "groups of scales from 9 on; the store has 12"),
        ("row", 160, "rows from 160 on are not in 170"),
        ("row", -1, "rows from -1 on"),
        ("rows", 129, "129 rows"),
        ("rows", 0, "0 rows"),
        ("part", 2, "is part 2 of 2"),
        ("part", -1, "is part -1 of 2"),
        ("parts", 5, "of 5; K has 4 blocks"),
        ("slot", 5, "needs slots 5 and 1 more; there are 6"),
        ("slot", -1, "needs slots -1"),
        ("slot", 1, "1 of 2 parts"),
        ("part", 1, "again: part 1"),
        ("row", 1, "1 of 2 parts"),
    ],
)
def test_table_with_one_wrong_number_is_refused(column, value, message):
    table = small_table()
    gemm.validate_table(table, TWO_SHARDS, 512, 128, slots=6)
    first = next(i for i, item in enumerate(table.tolist()) if item[3] == 0 and item[5] == 0)
    table[first, gemm.ITEM.index(column)] = value
    with pytest.raises(ValueError, match=message):
        gemm.validate_table(table, TWO_SHARDS, 512, 128, slots=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[table[:, 3] != 0], "row 0 is computed nowhere"),
        (lambda table: table[table[:, 3] != 130], "row 130 is computed nowhere"),
        (lambda table: table[table[:, 3] != 128], "row 128 is computed nowhere"),
        (lambda table: table[:-1], "1 of 2 parts of K"),
        (lambda table: torch.where((table[:, 3:4] == 130) & (torch.arange(8) == 3), 100, table), "row 100 .*twice"),
        (lambda table: torch.where(torch.arange(8) == 7, 0, table), "slot 0 belongs to another tile"),
        (lambda table: table.long(), "int64"),
        (lambda table: table[:, :7], r"this is \[6, 7\]"),
    ],
)
def test_table_that_misses_or_repeats_rows_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gemm.validate_table(change(small_table()), TWO_SHARDS, 512, 128, slots=6)


def test_tokens_of_a_program_are_a_known_number():
    with pytest.raises(ValueError, match="block_m 24"):
        gemm.build_tables([(4, 128)], 128, 128, {16: config(block_m=24)}, num_sms=1)


# ---- the configurations


@pytest.mark.parametrize("arch", sass.SHARED_KIB)
@pytest.mark.parametrize("bucket", gemm.BUCKETS)
def test_candidates_fit_their_gpu_and_begin_with_the_heuristic(arch, bucket):
    shapes = ((4, 4096), (8, 1024), (16, 1024))
    candidates = gemm.candidates(shapes, 4096, arch, 132, bucket)
    assert candidates[0] == gemm.heuristic(shapes, 4096, arch, 132, bucket)
    assert len(set(candidates)) == len(candidates) > 5
    assert not [c for c in candidates if c.block_m == 128 and c.num_warps == 4]  # spills in its loop
    for candidate in candidates:
        assert Config(**json.loads(json.dumps(asdict(candidate)))) == candidate
        for bits, _ in shapes:
            needed = gemm.shared_bytes(
                arch, bits, candidate.stages(bits), candidate.block_m, candidate.num_warps, candidate.wide
            )
            assert needed <= sass.SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("shapes", [((4, 300),), ((4, 4096), (8, 1024), (16, 1024))])
@pytest.mark.parametrize("bucket", gemm.BUCKETS)
def test_candidates_all_launch_something_else(shapes, bucket):
    launched = set()
    candidates = gemm.candidates(shapes, 4096, 90, 132, bucket)
    for candidate in candidates:
        tables = gemm.build_tables(shapes, 4096, 128, {bucket: candidate}, 132)
        launched.add((tuple(tables.launches), tables.tables[0].numpy().tobytes()))
    assert len(launched) == len(candidates)


def test_gpus_before_compute_capability_8_0_are_refused():
    gemm.heuristic([(4, 128)], 128, ops.MIN_CAPABILITY, 40, 16)
    with pytest.raises(ValueError, match=r"capability 7\.9;"):
        gemm.heuristic([(4, 128)], 128, ops.MIN_CAPABILITY - 1, 40, 16)


def test_heuristic_splits_k_where_tiles_are_fewer_than_multiprocessors():
    one = gemm.heuristic([(4, 4096)], 4096, 90, 132, 16)
    few_tiles = gemm.build_tables([(4, 4096)], 4096, 128, {16: one}, 132).tables[0]
    assert few_tiles.shape[0] > 132  # 32 tiles


# ---- a GPU

# Results are rounded to nearest: half a step. A matrix instruction may cut off what it adds instead of rounding it, and
# keep fewer bits than float32 below the largest of its 16 products; 2^-22 a term allows for two.
GPU_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
GPU_SHAPES = ((4, 1024), (8, 400), (16, 130))


@pytest.fixture
def gpu_tables():
    """Tables of a layer with the configurations that the heuristic picks on this GPU."""

    def build(layer, columns):
        major, minor = torch.cuda.get_device_capability()
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        shapes = layer.shapes
        arch = 10 * major + minor
        configs = {b: gemm.heuristic(shapes, columns, arch, num_sms, b) for b in gemm.BUCKETS}
        return gemm.build_tables(shapes, columns, layer.group_size, configs, num_sms)

    return build


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("group_size", "columns"), [(128, 4096), (64, 1088), (32, 992)])
def test_gpu_product_is_the_float32_product(gpu_tables, dtype, asymmetric, group_size, columns):
    layer = random_layer(GPU_SHAPES, columns, group_size, dtype, asymmetric, device="cuda")
    operands = layer.operands(gpu_tables(layer, columns))
    bias = torch.randn(sum(layer.sizes), device="cuda").to(dtype)
    rounded = replace(layer, dense=layer.dense.to(dtype).double())
    for tokens in (1, 5, 16, 17, 33, 64, 100, 128, 200, 256, 300):
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        y = gemm.linear(x, *operands, bias)
        truth = layer if tokens <= gemm.BUCKETS[-1] else rounded
        assert_product(y, x, truth, bias, GPU_ROUNDING[dtype], accumulation=2**-22)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gpu_candidates_all_compute_the_product(bits):
    major, minor = torch.cuda.get_device_capability()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    layer = random_layer([(bits, 300)], 2048, 128, torch.bfloat16, bits < 16, device="cuda")
    for bucket in gemm.BUCKETS:
        x = torch.randn(bucket, 2048, device="cuda").bfloat16()
        for candidate in gemm.candidates(layer.shapes, 2048, 10 * major + minor, num_sms, bucket):
            tables = gemm.build_tables(layer.shapes, 2048, 128, {bucket: candidate}, num_sms)
            y = gemm.linear(x, *layer.operands(tables))
            truth = replace(layer, dense=layer.dense.bfloat16().double()) if candidate.dequantize else layer
            assert_product(y, x, truth, None, GPU_ROUNDING[torch.bfloat16], accumulation=2**-22)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 40, 256])
def test_gpu_repeats_are_equal_to_the_bit(gpu_tables, tokens):
    layer = random_layer(GPU_SHAPES, 4096, 128, torch.bfloat16, True, device="cuda")
    tables = gpu_tables(layer, 4096)
    assert tables.launches[gemm.LAUNCH.index("slots")] > 0  # parts arrive in any order
    operands = layer.operands(tables)
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    first = gemm.linear(x, *operands)
    for _ in range(99):
        assert torch.equal(gemm.linear(x, *operands), first)
    assert not operands[3][-1].any()


@pytest.mark.gpu
def test_gpu_row_does_not_depend_on_its_company(gpu_tables):
    layer = random_layer(GPU_SHAPES, 4096, 128, torch.bfloat16, False, device="cuda")
    operands = layer.operands(gpu_tables(layer, 4096))
    x = torch.randn(16, 4096, device="cuda").bfloat16()
    assert torch.equal(gemm.linear(x[:1], *operands), gemm.linear(x, *operands)[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_gpu_graph_replays_with_new_activations(gpu_tables, tokens):
    layer = random_layer(GPU_SHAPES, 4096, 128, torch.bfloat16, True, device="cuda")
    operands = layer.operands(gpu_tables(layer, 4096))
    gemm.warm_up(4096, torch.bfloat16, *operands)
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm.linear(x, *operands)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, gemm.linear(x, *operands))


SANITIZED = "test_gpu_product_is_the_float32_product[32-992-True-dtype0]"


@pytest.fixture(scope="module")
def sanitize():
    """Runs Python under a tool of compute-sanitizer, on a GPU whose kernels are compiled already."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed (it is part of the CUDA toolkit)")

    def run(tool, arguments):
        def call(*command):
            # Each tensor is then an allocation of its own: in a cached block, reads behind its end go unnoticed.
            env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)

        python = [sys.executable, *arguments]
        call(*python)  # fills Triton's cache: its compiler would take minutes under a sanitizer
        return call(sanitizer, "--tool", tool, "--error-exitcode", "1", *python)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_gpu_kernel_is_clean_under_compute_sanitizer(sanitize, tool):
    """Racecheck sees shared memory only: races over partial sums, in global memory, are left to the test of repeats."""
    done = sanitize(tool, ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{SANITIZED}"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1 passed" in done.stdout


# The last value of the store is missing. Allocations without a cache are as long as asked for, to memcheck.
OUT_OF_BOUNDS = """
import torch
from taq_kernels import gemm
config = gemm.Config(16, 4, 2, 2, 2, False, 1, False)
tables = gemm.build_tables([(4, 128)], 128, 128, {16: config}, num_sms=1)
weights = torch.zeros(128 * 32 - 1, dtype=torch.int16, device="cuda")
scales = torch.zeros(128, dtype=torch.bfloat16, device="cuda")
x = torch.zeros(1, 128, dtype=torch.bfloat16, device="cuda")
gemm.linear(x, weights, scales, None, [t.cuda() for t in tables.tables], tables.launches, [4], [128], 128)
torch.cuda.synchronize()
print("ended")
"""


@pytest.mark.gpu
def test_gpu_memcheck_sees_reads_behind_the_weights(sanitize):
    done = sanitize("memcheck", ["-c", OUT_OF_BOUNDS])
    assert done.returncode != 0
    assert "Invalid __global__ read" in done.stdout, done.stdout[-4000:]
