"""Kernels that are compared: each takes the same codes and scales, packs them its own way, and multiplies.

All weights are symmetric codes in groups of 128 with bf16 scales, or plain bf16; activations are bf16. A contender is
a function that packs a layer's weights and returns how to make a fresh copy of them, ready to be called. Packages that
are not installed are left out by name; what raises is the benchmark's to record. No code of theirs is in this project:
these are calls of their public functions.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from taq_kernels import reference
from taq_kernels.timing import random_codes
from torch import Tensor

GROUP_SIZE = 128

Product = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
"""x [M, K] bf16 to y [M, N] bf16, or to its parts by columns where they are computed one by one."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix.

    Attributes:
        bits: 4, 8 or 16.
        codes: [N, K] uint8, the zero point is 2^(bits - 1); None for 16 bits.
        scales: [N, K / GROUP_SIZE] bf16; None for 16 bits.
        dense: [N, K] bf16; None below 16 bits.
    """

    bits: int
    codes: Tensor | None
    scales: Tensor | None
    dense: Tensor | None

    def dequantized(self) -> Tensor:
        """What the matrix stands for, [N, K] fp32."""
        if self.dense is not None:
            return self.dense.float()
        return reference.dequantize(self.codes, self.scales, None, self.bits, GROUP_SIZE)


def random_matrix(bits: int, rows: int, columns: int, device: torch.device) -> Matrix:
    """A matrix whose products with inputs of unit variance have about unit variance."""
    if bits == 16:
        dense = torch.randn(rows, columns, device=device) * columns**-0.5
        return Matrix(bits, None, None, dense.to(torch.bfloat16))
    return Matrix(bits, *random_codes(bits, rows, columns, GROUP_SIZE, device), None)


@dataclass(frozen=True)
class Packed:
    """A contender's weights.

    Attributes:
        weight_bytes: of one copy; a call reads so many.
        fresh: makes a copy of its own and returns the product with it.
    """

    weight_bytes: int
    fresh: Callable[[], Product]


def of_tensors(product: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Packed:
    """Packed weights that are tensors alone.

    Args:
        product: called with x and a copy of the tensors.
        tensors: that are copied.
    """

    def fresh() -> Product:
        own = [tensor.clone() for tensor in tensors]
        return lambda x: product(x, *own)

    return Packed(sum(tensor.nbytes for tensor in tensors), fresh)


@dataclass(frozen=True)
class Contender:
    """A way to compute a layer.

    Attributes:
        name: in results.
        pack: makes its weights.
        plans: names of the plans that it can compute.
        devices: "cuda", "cpu" or both.
        module: that must be importable.
        distribution: whose version is recorded.
    """

    name: str
    pack: Callable[[Sequence[Matrix]], Packed]
    plans: tuple[str, ...]
    devices: tuple[str, ...]
    module: str
    distribution: str

    def installed(self) -> bool:
        """It can be imported here."""
        return importlib.util.find_spec(self.module) is not None

    def version(self) -> str:
        """Of what is installed."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "source tree"


# This project's kernels.


def pack_taq(matrices: Sequence[Matrix]) -> Packed:
    """All matrices in one launch."""
    from taq_kernels import ops

    ops.register()
    operands = ops.join(
        [
            ops.pack_dense(m.dense, GROUP_SIZE)
            if m.dense is not None
            else ops.pack(m.codes, m.scales, None, m.bits, GROUP_SIZE)
            for m in matrices
        ]
    )

    def fresh() -> Product:
        own = deepcopy(operands)  # with its tables: none of it is in the caches when a layer's turn comes
        arguments = [getattr(own, field.name) for field in fields(own)]
        return lambda x: torch.ops.taq.linear(x, *arguments)

    return Packed(operands.weights.nbytes + operands.scales.nbytes, fresh)


def pack_taq_one_by_one(matrices: Sequence[Matrix]) -> Packed:
    """A launch for each matrix; the parts are not joined, which would take one more."""
    parts = [pack_taq([matrix]) for matrix in matrices]

    def fresh() -> Product:
        products = [part.fresh() for part in parts]
        return lambda x: tuple(product(x) for product in products)

    return Packed(sum(part.weight_bytes for part in parts), fresh)


# What comes with torch.


def pack_torch(matrices: Sequence[Matrix]) -> Packed:
    """bf16: cuBLAS on a GPU, oneDNN on a CPU, weights as they are."""
    return of_tensors(torch.nn.functional.linear, [torch.cat([m.dense for m in matrices])])


def pack_tinygemm(matrices: Sequence[Matrix]) -> Packed:
    """aten's int4 product on CUDA: two codes a byte, the even column in the high half."""
    codes, scales = _joined(matrices)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    return of_tensors(
        lambda x, w, sz: torch.ops.aten._weight_int4pack_mm(x, w, GROUP_SIZE, sz), [packed, _scales_zeros(scales)]
    )


def pack_int4pack(matrices: Sequence[Matrix]) -> Packed:
    """aten's int4 product on a CPU."""
    codes, scales = _joined(matrices)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return of_tensors(
        lambda x, w, sz: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP_SIZE, sz),
        [packed, _scales_zeros(scales)],
    )


# vLLM on a CPU.


def pack_onednn(matrices: Sequence[Matrix]) -> Packed:
    """bf16 as vLLM's CPU engine serves it: oneDNN with weights in its own order."""
    from vllm import _custom_ops as ops

    weight = torch.cat([m.dense for m in matrices])

    def fresh() -> Product:
        handler = ops.create_onednn_mm(weight.t(), 32)
        return lambda x: ops.onednn_mm(handler, x, None)

    return Packed(weight.nbytes, fresh)


def pack_wna16(matrices: Sequence[Matrix]) -> Packed:
    """4 bits as vLLM's CPU engine serves them: 16 rows a block, eight codes a word along the rows."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint

    codes, scales = _joined(matrices)
    rows, columns = codes.shape
    words = _words(codes.t().contiguous(), 4)  # [K, N / 8]
    blocks = words.view(columns, rows // 16, 2).permute(1, 0, 2).reshape(rows // 16, columns * 2).contiguous()
    product = partial(ops.cpu_gemm_wna16, zeros=None, bias=None, pack_factor=8, isa_hint=_get_isa_hint(torch.bfloat16))
    return of_tensors(lambda x, w, s: product(x, w, s), [blocks, scales.t().contiguous()])


# Other projects' GPU kernels.


def pack_gemlite(matrices: Sequence[Matrix]) -> Packed:
    """GemLite (Triton). It finds its tuned table by the GPU's name; where there is none, H100's is the nearest."""
    import gemlite
    from gemlite.core import forward_functional, get_default_cache_config

    if get_default_cache_config() is None:
        gemlite.GemLiteLinear.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    codes, scales = _joined(matrices)
    rows, columns = codes.shape
    bits = matrices[0].bits
    layer = gemlite.GemLiteLinear(
        bits,
        group_size=GROUP_SIZE,
        in_features=columns,
        out_features=rows,
        input_dtype=gemlite.DType.BF16,
        output_dtype=gemlite.DType.BF16,
    )
    layer.pack(codes, scales, torch.full_like(scales, 2 ** (bits - 1)))
    meta = layer.get_meta_args()
    return of_tensors(lambda x, *tensors: forward_functional(x, None, list(tensors), meta), layer.get_tensor_args())


def pack_humming(matrices: Sequence[Matrix]) -> Packed:
    """Humming (CUDA, compiled when first used)."""
    from humming.forward import humming_forward
    from humming.layer import HummingLayer

    codes, scales = _joined(matrices)
    rows, columns = codes.shape
    bits = matrices[0].bits
    layer = HummingLayer(
        rows,
        columns,
        weight_config={"dtype": f"int{bits}", "group_size": GROUP_SIZE},
        torch_dtype=torch.bfloat16,
    ).to(codes.device)
    layer.load_from_tensors({"weight": _words(codes, bits), "weight_scale": scales})
    layer.transform()
    return of_tensors(
        lambda x, weight, scale: humming_forward(
            layer.humming_config, inputs=x, weight=weight, weight_scale=scale, locks=layer.locks
        ),
        [layer.weight.data, layer.weight_scale.data],
    )


def pack_fbgemm(matrices: Sequence[Matrix]) -> Packed:
    """FBGEMM-GenAI's bf16 x int4 (CUTLASS for Hopper, preshuffled): two codes a byte, the even column low, signed."""
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401  (registers the operators)

    codes, scales = _joined(matrices)
    packed = (codes[:, ::2] ^ 8) | ((codes[:, 1::2] ^ 8) << 4)
    weight, group_scale = torch.ops.fbgemm.preshuffle_i4(packed.view(torch.int8).contiguous(), scales.t().contiguous())
    return of_tensors(
        torch.ops.fbgemm.bf16i4bf16_shuffled, [weight, group_scale, torch.zeros_like(scales.t().contiguous())]
    )


def pack_conch(matrices: Sequence[Matrix]) -> Packed:
    """Conch (Triton): 32-bit words along K, scales [K / group, N]."""
    from conch.ops.quantization.gemm import mixed_precision_gemm

    codes, scales = _joined(matrices)
    bits = matrices[0].bits
    return of_tensors(
        lambda x, w, s: mixed_precision_gemm(x, w, s, None, bits, 2 ** (bits - 1), GROUP_SIZE),
        [_words(codes, bits).t().contiguous(), scales.t().contiguous()],
    )


CONTENDERS = (
    Contender("torch", pack_torch, ("16",), ("cuda", "cpu"), "torch", "torch"),
    Contender("onednn", pack_onednn, ("16",), ("cpu",), "vllm", "vllm"),
    Contender("taq", pack_taq, ("4", "8", "half", "4+8+16"), ("cuda",), "taq_kernels", "taq-vllm"),
    Contender("taq", pack_taq, ("4", "8", "half"), ("cpu",), "taq_kernels", "taq-vllm"),
    Contender("taq-one-by-one", pack_taq_one_by_one, ("4+8+16",), ("cuda",), "taq_kernels", "taq-vllm"),
    Contender("tinygemm", pack_tinygemm, ("4",), ("cuda",), "torch", "torch"),
    Contender("int4pack", pack_int4pack, ("4",), ("cpu",), "torch", "torch"),
    Contender("wna16", pack_wna16, ("4",), ("cpu",), "vllm", "vllm"),
    Contender("gemlite", pack_gemlite, ("4",), ("cuda",), "gemlite", "gemlite"),
    Contender("humming", pack_humming, ("4", "8"), ("cuda",), "humming", "humming-kernels"),
    Contender("fbgemm", pack_fbgemm, ("4",), ("cuda",), "fbgemm_gpu", "fbgemm-gpu-genai"),
    Contender("conch", pack_conch, ("4", "8"), ("cuda",), "conch", "conch-triton-kernels"),
)
"""In the order in which they run: GemLite leaves 8 bits in groups out, for which it has no tuned configuration."""


def _joined(matrices: Sequence[Matrix]) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, K / GROUP_SIZE] of matrices of one bitwidth, below each other."""
    return torch.cat([m.codes for m in matrices]), torch.cat([m.scales for m in matrices])


def _scales_zeros(scales: Tensor) -> Tensor:
    """[K / GROUP_SIZE, N, 2] bf16 for aten: weight = (code - 8) * scale + zero."""
    return torch.stack([scales.t(), torch.zeros_like(scales.t())], dim=-1).contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """32 / bits codes a word, the first in the lowest bits: [rows, columns] uint8 to [rows, columns * bits / 32]."""
    per_word = 32 // bits
    parts = codes.view(codes.shape[0], -1, per_word).to(torch.int64)
    words = (parts << (bits * torch.arange(per_word, device=codes.device))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
