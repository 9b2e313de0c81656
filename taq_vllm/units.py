"""What a bitwidth is decided for: a whole transformer block, a fused layer, or a single weight matrix.

A *unit* is a set of matrices that get the same bits. Its name is Hugging Face's or vLLM's name of what it is:

- `layer`: a transformer block, `model.layers.3` (the paper's unit, arXiv 2511.06516);
- `fused`: what a server loads as one matrix, `model.layers.3.self_attn.qkv_proj`, `model.layers.3.mlp.gate_up_proj`,
  beside `o_proj` and `down_proj`. Plans of this kind load in stock servers, unless pins give the parts of one of them
  different bits (`--uniform-fused` refuses those);
- `module`: each matrix for itself, `model.layers.3.self_attn.q_proj`.

All experts of a block are one unit, `model.layers.3.mlp.experts`, also where matrices are: a server runs them in one
kernel of one bitwidth. The head, `lm_head`, is a unit of its own at every granularity. Pure Python.
"""

import re
from collections.abc import Iterable
from typing import Literal, get_args

Granularity = Literal["layer", "fused", "module"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
"""Coarse to fine."""

HEAD = "lm_head"

_LAYER = re.compile(r"^model\.layers\.(\d+)(\.|$)")
_EXPERT = re.compile(r"^(model\.layers\.\d+\.mlp\.experts)\.\d+\.")
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def layer_of(name: str) -> int:
    """The index of the transformer block that a matrix or unit inside a block belongs to."""
    match = _LAYER.match(name)
    assert match, f"{name} is not inside a transformer block"
    return int(match.group(1))


def experts_of(matrix: str) -> str | None:
    """The experts that a matrix is one of, `model.layers.3.mlp.experts`; None for any other matrix."""
    match = _EXPERT.match(matrix)
    return match.group(1) if match else None


def unit_of(matrix: str, granularity: Granularity) -> str:
    """The unit that decides a matrix's bits."""
    if matrix == HEAD:
        return matrix
    if granularity == "layer":
        return f"model.layers.{layer_of(matrix)}"
    if experts := experts_of(matrix):
        return experts
    if granularity == "module":
        return matrix
    prefix, _, last = matrix.rpartition(".")
    return f"{prefix}.{_FUSED.get(last, last)}"


def units_of(matrices: Iterable[str], granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Matrices grouped by unit, both in the order given."""
    units: dict[str, list[str]] = {}
    for matrix in matrices:
        units.setdefault(unit_of(matrix, granularity), []).append(matrix)
    return {unit: tuple(names) for unit, names in units.items()}
