"""Plans written by hand: bits per matrix for a model's folder."""

from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Allocation, Budget, MatrixPlan, Plan
from taq_vllm.units import HEAD


def make_plan(folder, key_of, head=False):
    """A plan for a model; `key_of` maps a matrix name to (bits, symmetric), with `head` also `lm_head`."""
    files = ModelFiles(folder)
    shapes = {**files.matrices, **files.head} if head else files.matrices
    matrices = {
        name: MatrixPlan(
            bits=key_of(name)[0],
            symmetric=key_of(name)[1],
            shape=shape,
            why="pinned",
            tied=name == HEAD and files.tied,
        )
        for name, shape in shapes.items()
    }
    budget = Budget.of("by hand", matrices, files.bytes_beside(matrices))
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
    """Every bitwidth in every fused layer, other ones from layer to layer; 8 bits for the head."""
    if name == HEAD:
        return 8, True
    parts = name.split(".")
    return MIXED_BITS[parts[-1]][int(parts[2]) % 2]
