"""What the compiler makes of the GPU kernels, on a machine that has no GPU: registers, spills, shared memory and
instructions per weight for each architecture. `python -m tests.sass` prints the table of kernels/README.md.

The number that matters is instructions per weight and lane in the main loop, warp instructions x 32 lanes x warps /
weights per iteration: it is the same on every machine that compiles, so a test can hold the kernel to it.
"""

import collections
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from taq_kernels import gemm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
MULTIPROCESSORS = {80: 108, 86: 82, 89: 142, 90: 132, 100: 148, 120: 170}  # of A100, A40, L40S, H200, B200, RTX 5090
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # that one program may ask for
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Compiled:
    """One compiled variant: what it takes of a multiprocessor, and the opcodes of each loop with a matrix product."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    sass: str
    loops: tuple[collections.Counter, ...]


def compile_gemm(
    arch,
    bucket,
    bits,
    dtype="bf16",
    symmetric=True,
    group_size=128,
    columns=4096,
    *,
    config=None,
    scale_dtype=None,
    has_bias=True,
    split=True,
):
    """`gemm.gemm_kernel` as the launcher would launch it for 4096 rows of each of `bits`.

    Without a configuration it is the untuned one; without a dtype scales have that of x.

    Returns:
        The configuration, what was compiled, and instructions per weight of the loop for each of `bits`.
    """
    config = config or gemm.heuristic([(b, 4096) for b in bits], columns, arch, MULTIPROCESSORS[arch], bucket)
    launch = asdict(config) | {"slots": int(split)}
    constants = gemm.kernel_constants(launch, dtype, bits, symmetric, columns, group_size, interpreted=False)
    types = {
        "x_ptr": f"*{dtype}",
        "weights_ptr": "*i16",
        "scales_ptr": f"*{scale_dtype or dtype}",
        "zeros_ptr": "*u8",
        "bias_ptr": f"*{dtype}",
        "items_ptr": "*i32",
        "y_ptr": f"*{dtype}",
        "partials_ptr": "*fp32",
        "arrivals_ptr": "*i32",
        "M": "i32",
        "K": "i32",
        "N": "i32",
    }
    if symmetric:
        constants["zeros_ptr"] = None
    if not has_bias:
        constants["bias_ptr"] = None
    aligned = [name for name in types if name != "M"]  # M is never specialised
    compiled = compile_for(gemm.gemm_kernel, types, constants, arch, config.num_warps, aligned)
    assert len(compiled.loops) == len(bits), f"{len(compiled.loops)} loops for {bits} bits"
    # 16 bits need no unpacking and 8 bits more of it than 4, whatever order the compiler puts the loops in.
    order = [b for b in (16, 4, 8) if b in bits]
    loops = dict(zip(order, sorted(compiled.loops, key=collections.Counter.total), strict=True))
    weights = {b: 128 * (64 if b == 16 else 128) for b in bits}
    return config, compiled, {b: loops[b].total() * 32 * config.num_warps / weights[b] for b in bits}


def compile_for(fn, types, constants, arch, num_warps, aligned):
    """Machine code of a Triton function, as a launch would compile it.

    Args:
        fn: the function.
        types: of its run-time arguments: "*bf16", "i32", ...
        constants: its constexpr arguments, and pointers that are None.
        arch: compute capability, 90 for 9.0.
        num_warps: per program.
        aligned: arguments that are multiples of 16, which a launch finds out by itself; without, nothing is vectorised.
    """
    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    # cuobjdump's own SHARED counts static memory only, and Triton's is dynamic.
    return Compiled(int(registers), int(stack), kernel.metadata.shared, sass, matrix_loops(sass))


def matrix_loops(sass):
    """Opcode counts of the innermost loops that hold a matrix instruction, in program order.

    A loop is a natural one, blocks that a back edge to their dominator encloses: machine code for sm_100 waits in
    blocks behind the end of the program, and a span between labels would count everything that lies between.
    """
    blocks, successors = _blocks(sass)
    dominators = _dominators(successors)
    loops = []
    for tail, heads in enumerate(successors):
        for head in heads:
            if head in dominators[tail]:
                inside, queue = {head}, [tail]
                while queue:
                    block = queue.pop()
                    if block not in inside:
                        inside.add(block)
                        queue += [other for other, targets in enumerate(successors) if block in targets]
                loops.append((head, inside))
    counted = []
    for head, inside in loops:
        count = collections.Counter(opcode.split(".")[0] for block in inside for opcode in blocks[block])
        if any(count[opcode] for opcode in MATRIX):
            counted.append((head, inside, count))
    innermost = [loop for loop in counted if not any(other < loop[1] for _, other, _ in counted)]
    return tuple(count for _, _, count in sorted(innermost, key=lambda loop: loop[0]))


def _blocks(sass):
    """Opcodes of each basic block, and the blocks that may follow it."""
    blocks, starts, jumps, falls = [[]], {}, [None], [True]

    def start_block():
        blocks.append([])
        jumps.append(None)
        falls.append(True)

    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            if blocks[-1]:
                start_block()
            starts[label[1]] = len(blocks) - 1
        elif instruction := _INSTRUCTION.match(line):
            predicate, opcode, operands = instruction.groups()
            blocks[-1].append(opcode)
            name = opcode.split(".")[0]
            if name in ("BRA", "EXIT", "RET"):
                if name == "BRA":
                    jumps[-1] = _TARGET.search(operands)[1]
                conditional = predicate or re.match(r"\s*!?U?P\d,", operands) or ".DIV" in opcode
                falls[-1] = bool(conditional)
                start_block()
    successors = []
    for index in range(len(blocks)):
        following = {index + 1} if falls[index] and index + 1 < len(blocks) else set()
        if jumps[index] is not None:
            following.add(starts[jumps[index]])
        successors.append(following)
    return blocks, successors


def _dominators(successors):
    """For each block, those that every path from the first one to it passes; all, where no path leads."""
    everything = set(range(len(successors)))
    predecessors = [{other for other, targets in enumerate(successors) if block in targets} for block in everything]
    dominators = [{0}] + [everything] * (len(successors) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            before = [dominators[other] for other in predecessors[block]]
            now = {block} | (set.intersection(*before) if before else everything)
            if now != dominators[block]:
                dominators[block], changed = now, True
    return dominators


def _run(tool, *arguments):
    return subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main():
    """Print the table."""
    print(f"Triton {triton.__version__}, one launch with 4-, 8- and 16-bit tiles, bf16, groups of 128, split K.")
    print("Instructions per weight: symmetric / with zero points.\n")
    head = "sm | tokens | warps | stages | registers | spilled B | shared KiB | 4 bits | 8 bits | 16 bits | product"
    print(f"| {head} |\n|" + "---|" * 11)
    for arch in MULTIPROCESSORS:
        for bucket in gemm.BLOCK_MS:
            config, plain, counts = compile_gemm(arch, bucket, (4, 8, 16))
            _, offset, offset_counts = compile_gemm(arch, bucket, (4, 8, 16), symmetric=False)
            pair = [max(getattr(plain, name), getattr(offset, name)) for name in ("registers", "spill_bytes")]
            cells = [
                arch,
                config.block_m,
                config.num_warps,
                f"{config.stages_4}, {config.stages_8}, {config.stages_16}",
                *pair,
                max(plain.shared_bytes, offset.shared_bytes) // 1024,
                f"{counts[4]:.2f} / {offset_counts[4]:.2f}",
                f"{counts[8]:.2f} / {offset_counts[8]:.2f}",
                f"{counts[16]:.2f}",
                next(opcode for opcode in MATRIX if plain.loops[0][opcode]),
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
