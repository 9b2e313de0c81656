"""`rtn`: round to nearest over each group's full range. Reads no data."""

from pydantic import BaseModel, ConfigDict

from taq_vllm.fitting import Block
from taq_vllm.quantizer import Quantized, quantize

READS_INPUTS = False
READS_OUTPUTS = False


class Settings(BaseModel):
    """None."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def fit_block(block: Block, settings: Settings) -> dict[str, Quantized]:
    """The codes of every matrix below 16 bits."""
    return {
        name: quantize(matrix.weight, block.entries[name].bits, block.entries[name].symmetric, block.dtype)
        for name, matrix in block.matrices.items()
    }
