"""A Triton kernel that only reads: the floor under every kernel whose weights come from a GPU's memory.

Each program adds up its part of the words and stores one sum, so that no load can be left out. Which number of words
per program, loop iterations and warps is fastest depends on the size; `LAUNCHES` are the ones to try.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCHES = ((2048, 1, 4), (4096, 1, 8), (8192, 1, 8), (2048, 4, 4), (4096, 4, 8), (8192, 4, 8), (4096, 16, 8))
"""(words per load of a program, loads, warps)."""


@triton.jit
def _read_kernel(words_ptr, sums_ptr, count, BLOCK: tl.constexpr, LOADS: tl.constexpr):  # noqa: ANN001, ANN202
    program = tl.program_id(0)
    offs = program * (BLOCK * LOADS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for load in tl.static_range(LOADS):  # unrolled: all loads are under way before the first sum
        place = offs + load * BLOCK
        total += tl.load(words_ptr + place, mask=place < count, other=0)
    tl.store(sums_ptr + program, tl.sum(total))


def read(words: Tensor, block: int, loads: int, warps: int) -> Tensor:
    """Read all words.

    Args:
        words: [count] int32, contiguous, fewer than 2^31.
        block: words per load of a program, a power of two.
        loads: of each program.
        warps: of each program.

    Returns:
        Sum of each program's words [programs] int32, wrapping around.
    """
    programs = triton.cdiv(words.numel(), block * loads)
    sums = torch.empty(programs, dtype=torch.int32, device=words.device)
    _read_kernel[(programs,)](words, sums, words.numel(), BLOCK=block, LOADS=loads, num_warps=warps)
    return sums
