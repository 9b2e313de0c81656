"""The GPU kernels compiled for every architecture they are meant for: what can be known of their speed without a GPU.

The counts are of Triton 3.7.1; a bound leaves them 5 %, or is what the design allows: at the speed of an H200's memory
4-bit weights leave 4.0 instructions each, 8-bit ones 7.9.
"""

import re
from dataclasses import replace

import pytest
from taq_kernels import gemm

from tests import sass

ARCHITECTURES = tuple(sass.MULTIPROCESSORS)
ALL_BITS = (4, 8, 16)

# Tokens of a program, symmetric: most instructions per 4-bit and per 8-bit weight. Where products are mma.sync's
# (sm_80, 86, 89, 120), its own share grows with the tokens: 0.25 at 16, 0.5 at 32.
MOST = {(16, True): (2.7, 3.8), (16, False): (2.7, 4.2), (32, True): (2.95, 3.95), (32, False): (3.15, 4.7)}
MOST_WGMMA = {(64, True): (3.1, 4.1), (64, False): (3.3, 4.9), (128, True): (4.4, 5.5), (128, False): (4.6, 6.2)}


def small_variants():
    for arch in ARCHITECTURES:
        for block_m, dtype, symmetric in (
            (16, "bf16", True),
            (16, "bf16", False),
            (16, "fp16", True),
            (16, "fp16", False),
            (32, "bf16", False),
            (32, "fp16", True),
        ):
            yield arch, block_m, dtype, symmetric


def check_resources(arch, config, compiled, bits):
    for loop in compiled.loops:
        assert not loop.keys() & {"I2F", "I2FP", "LDL", "STL"}, "a loop converts integers or reads spilled registers"
    assert compiled.shared_bytes <= sass.SHARED_KIB[arch] * 1024
    assert compiled.shared_bytes <= predicted_bytes(arch, config, bits)


def predicted_bytes(arch, config, bits):
    return max(
        gemm.shared_bytes(arch, b, config.stages(b), config.block_m, config.num_warps, config.wide) for b in bits
    )


@pytest.mark.parametrize(("arch", "block_m", "dtype", "symmetric"), list(small_variants()))
def test_few_tokens_take_few_instructions_and_spill_nothing(arch, block_m, dtype, symmetric):
    config, compiled, counts = sass.compile_gemm(arch, block_m, ALL_BITS, dtype, symmetric)
    assert config.block_m == block_m
    assert compiled.spill_bytes == 0
    check_resources(arch, config, compiled, ALL_BITS)
    most_4, most_8 = MOST[block_m, symmetric]
    assert counts[4] <= most_4
    assert counts[8] <= most_8


@pytest.mark.parametrize(("block_m", "symmetric"), [(64, False), (128, True)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_many_tokens_fit_and_spill_nothing_in_a_loop(arch, block_m, symmetric):
    config, compiled, counts = sass.compile_gemm(arch, block_m, ALL_BITS, "bf16", symmetric)
    check_resources(arch, config, compiled, ALL_BITS)
    assert compiled.spill_bytes <= 16
    if arch == 90:
        assert counts[4] <= MOST_WGMMA[block_m, symmetric][0]
        assert counts[8] <= MOST_WGMMA[block_m, symmetric][1]


@pytest.mark.parametrize("bits", [4, 8])
def test_hopper_multiplies_unpacked_weights_from_registers(bits):
    _, compiled, _ = sass.compile_gemm(90, 16, (bits,))
    products = re.findall(r"HGMMA\.(\S+) R\d+, (\S+?),", compiled.sass)
    assert len(products) >= 16
    assert all(shape == "64x16x16.F32.BF16" and re.fullmatch(r"R\d+", weights) for shape, weights in products)


@pytest.mark.parametrize(("bits", "num_warps", "stages"), [(8, 8, 4), (4, 8, 5), (8, 4, 4)])
def test_narrow_products_of_wgmma_take_the_shared_memory_that_is_predicted(bits, num_warps, stages):
    tuned = gemm.heuristic([(bits, 4096)], 4096, 90, sass.MULTIPROCESSORS[90], 64)
    tuned = replace(tuned, num_warps=num_warps, wide=False, stages_4=stages, stages_8=stages)
    _, compiled, _ = sass.compile_gemm(90, 64, (bits,), symmetric=False, config=tuned)
    assert compiled.shared_bytes <= predicted_bytes(90, tuned, (bits,)) <= compiled.shared_bytes + 1024


@pytest.mark.parametrize("group_size", [64, 32])
@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_smaller_groups_spill_nothing(arch, block_m, group_size):
    _, compiled, _ = sass.compile_gemm(arch, block_m, ALL_BITS, "bf16", False, group_size, columns=4096 + group_size)
    # With the two warps of that one the loop over 8-bit tiles spills two registers: 4 of its 1251 instructions.
    assert compiled.spill_bytes <= (8 if (arch, block_m, group_size) == (100, 16, 32) else 0)


@pytest.mark.parametrize("variant", [{"has_bias": False}, {"split": False}, {"scale_dtype": "fp32"}])
def test_other_variants_take_no_more_than_the_one_that_is_counted(variant):
    config, compiled, counts = sass.compile_gemm(90, 16, ALL_BITS, symmetric=False, **variant)
    assert compiled.spill_bytes == 0
    check_resources(90, config, compiled, ALL_BITS)
    most_4, most_8 = MOST[16, False]
    assert counts[4] <= most_4
    assert counts[8] <= most_8


@pytest.mark.parametrize(("arch", "bits"), [*((arch, 8) for arch in ARCHITECTURES), (90, 4), (90, 16)])
def test_dequantization_compiles_without_spilling(arch, bits):
    types = {"weights_ptr": "*i16", "scales_ptr": "*bf16", "zeros_ptr": "*u8", "out_ptr": "*bf16"}
    types |= {"rows": "i32", "K": "i32"}
    aligned = [name for name in types if name != "rows"]
    compiled = sass.compile_for(gemm.dequantize_kernel, types, {"BITS": bits, "GROUP_SIZE": 128}, arch, 4, aligned)
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= 48 * 1024  # two programs or more on every multiprocessor


def test_loops_are_found_where_code_waits_behind_the_programs_end():
    # As on sm_100: the block behind EXIT waits and goes back into the loop, which it must not seem to enclose.
    code = """
.L_x_0:
        /*0000*/ IADD3 R1, R1, 0x1, RZ ;
        /*0010*/ @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/ @P0 BRA `(.L_x_0) ;
        /*0040*/ FADD R1, R1, R2 ;
        /*0050*/ EXIT ;
.L_x_2:
        /*0060*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0070*/ @!P1 BRA `(.L_x_2) ;
        /*0080*/ BRA `(.L_x_1) ;
"""
    (loop,) = sass.matrix_loops(code)
    assert loop == {"IADD3": 1, "BRA": 5 - 1, "HMMA": 1, "SYNCS": 1}
