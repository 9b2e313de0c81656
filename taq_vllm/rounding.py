"""What scorers mean by quantizing a matrix: rounding to nearest, at which bitwidths, and of which matrices.

Calibrated methods (`methods/`) do better than rounding; scorers only compare units, and rounding needs nothing but the
weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from taq_vllm.plan import GROUP_SIZE, STUDY_BITS, SYMMETRIC
from taq_vllm.quantizer import quantize

LOWER_BITS = STUDY_BITS[:-1]


@dataclass(frozen=True)
class Rounding:
    """Weights rounded to nearest.

    Attributes:
        symmetric: None for what plans do at each bitwidth (`plan.SYMMETRIC`).
    """

    symmetric: bool | None = None

    def __call__(self, name: str, weight: Tensor, bits: int) -> Tensor:
        """The matrix `name` as `bits` would store it: [N, K] to [N, K]."""
        return quantize(weight, bits, self.is_symmetric(bits)).dequantize()

    def is_symmetric(self, bits: int) -> bool:
        """Whether codes of so many bits have no zero point."""
        return SYMMETRIC[bits] if self.symmetric is None else self.symmetric


def is_quantizable(in_features: int) -> bool:
    """Whether groups divide a matrix; others stay as they are at every bitwidth."""
    return in_features % GROUP_SIZE == 0


def check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """A scorer's bitwidths, ascending.

    Raises:
        ValueError: none, one twice, or one that is not below 16.
    """
    if not bits or len(set(bits)) < len(bits) or not set(bits) <= set(LOWER_BITS):
        raise ValueError(f"got bits {list(bits)}; needs one or more of {', '.join(map(str, LOWER_BITS))}, each once")
    return tuple(sorted(bits))
