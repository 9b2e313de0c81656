"""Plans written by hand: bits per matrix for a model's folder."""

from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Allocation, Budget, MatrixPlan, Plan


def make_plan(folder, key_of):
    """A plan for a model; `key_of` maps a matrix name to (bits, symmetric)."""
    files = ModelFiles(folder)
    matrices = {
        name: MatrixPlan(bits=key_of(name)[0], symmetric=key_of(name)[1], shape=shape, why="pinned")
        for name, shape in files.matrices.items()
    }
    planned = sum(matrix.disk_bytes for matrix in matrices.values())
    weights = sum(rows * columns for rows, columns in files.matrices.values())
    resident = sum(matrix.resident_bytes for matrix in matrices.values()) + files.bytes_beside(files.matrices)
    budget = Budget(
        asked="by hand",
        average_bits=8 * planned / weights,
        planned_bytes=planned,
        disk_bytes=planned + files.bytes_beside(files.matrices),
        resident_bytes=resident,
    )
    return Plan(base_model=files.ref, allocation=Allocation(name="by hand"), budget=budget, matrices=matrices)


MIXED_BITS = {
    "q_proj": ((4, False), (8, True)),
    "k_proj": ((8, True), (4, False)),
    "v_proj": ((16, True), (16, True)),
    "o_proj": ((8, True), (4, True)),
    "gate_proj": ((4, False), (16, True)),
    "up_proj": ((8, True), (4, False)),
    "down_proj": ((16, True), (8, True)),
    "qkv_proj": ((4, False), (8, True)),
    "gate_up_proj": ((8, True), (4, False)),
}


def mixed(name):
    """Every bitwidth in every fused layer, other ones from layer to layer."""
    parts = name.split(".")
    return MIXED_BITS[parts[-1]][int(parts[2]) % 2]
