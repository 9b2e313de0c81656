"""`clip`: each group's range is the one that loses least on the task's inputs, sum_k E[x_k^2] (w_k - q_k)^2."""

from pydantic import BaseModel, ConfigDict

from taq_vllm.fitting import Block
from taq_vllm.quantizer import Quantized, search_clip

READS_INPUTS = True
READS_OUTPUTS = False


class Settings(BaseModel):
    """None."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def fit_block(block: Block, settings: Settings) -> dict[str, Quantized]:
    """The codes of every matrix below 16 bits."""
    energy = block.energy()
    return {
        name: search_clip(
            matrix.weight, block.entries[name].bits, block.entries[name].symmetric, energy[name], dtype=block.dtype
        )
        for name, matrix in block.matrices.items()
    }
