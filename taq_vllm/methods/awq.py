"""`awq`: input features that matter are made larger before rounding, and what feeds them smaller (arXiv 2306.00978).

Where a norm or a matrix feeds others feature by feature, s_k can move across: columns of the readers times s_k, the
producer's output over s_k. Pairs: input norm -> q, k, v; v -> o; post-attention norm -> gate, up; up -> down. With
s = mean|x|^a / mean|w|^(1-a) the a in [0, 1] is searched that loses least of the readers' outputs on a sample of the
task's tokens; leaving the weights alone (s = 1) is among the candidates. Then ranges are searched as in `clip`.

s is rounded to powers of two, so what is moved is moved exactly: the model at 16 bits stays the same function to the
bit. Where float16 is too narrow for that, in a tensor that stays at 16 bits, nothing is moved. Query heads that share
a key-value head share the scales of v -> o. The head and a mixture's experts get no scales, only `clip`, nor do those
that read one of Gemma's norms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from taq_vllm.distributed import total
from taq_vllm.fitting import Block
from taq_vllm.plan import MatrixPlan
from taq_vllm.quantizer import Quantized, search_clip
from taq_vllm.stream import matrices_of

READS_INPUTS = True
READS_OUTPUTS = False

_MOST_LOG2 = 8  # of s: float16 has 14 binary orders below 1 that are exact


class Settings(BaseModel):
    """How scales are searched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid: int = Field(default=20, ge=1)
    """Values of a that are tried."""
    tokens: int = Field(default=1024, ge=1)
    """Tokens on which a candidate's output error is measured, evenly spaced over the calibration set."""
    rows: int = Field(default=256, ge=1)
    """Output features of each matrix on which it is measured, evenly spaced."""


@dataclass(frozen=True)
class Pair:
    """Where scales can move.

    Attributes:
        readers: matrices whose input features are multiplied.
        producers: tensors whose first axis is divided: a norm's weight, or a matrix's rows and their biases.
        producer: that matrix's name; None for a norm.
        shared: [K] int64: which scale each input feature of the readers has; None: its own.
    """

    readers: tuple[str, ...]
    producers: tuple[Tensor, ...]
    producer: str | None = None
    shared: Tensor | None = None


def fit_block(block: Block, settings: Settings) -> dict[str, Quantized]:
    """The codes of every matrix below 16 bits; scales are moved in the block's weights."""
    groups = block.groups()
    samples, size, energy = _look(block, groups, settings.tokens)
    for pair in pairs_of(block.module):
        name = next((name for name in pair.readers if name in energy), None)
        if name is None:
            continue
        scales = _search(block, pair, samples[name], size[name], energy[name], settings)
        if scales is not None and move(block, pair, scales):
            of_inputs = scales if pair.shared is None else scales[pair.shared]
            for reader in pair.readers:
                if reader in energy:
                    energy[reader] = energy[reader] / of_inputs.double().square()
    return {
        name: search_clip(
            matrix.weight, block.entries[name].bits, block.entries[name].symmetric, energy[name], dtype=block.dtype
        )
        for name, matrix in block.matrices.items()
    }


def pairs_of(module: nn.Module) -> list[Pair]:
    """The pairs of a transformer block; none of anything else."""
    matrices = matrices_of(module)
    pairs = []
    # Gemma's norms multiply by 1 + weight, which does not stay exact when it is divided.
    is_gemma = hasattr(module, "pre_feedforward_layernorm")
    for norm, names in (
        ()
        if is_gemma
        else (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")),
        )
    ):
        readers = tuple(name for name in names if name in matrices)
        if readers:
            pairs.append(Pair(readers, (getattr(module, norm).weight.data,)))
    if "self_attn.o_proj" in matrices:
        features = matrices["self_attn.o_proj"].in_features
        producer = next(name for name in ("self_attn.v_proj", "self_attn.qkv_proj") if name in matrices)
        value = matrices[producer]
        # Fused rows are q, k, v; q has as many as o has inputs.
        rows = value.out_features if producer == "self_attn.v_proj" else (value.out_features - features) // 2
        head = module.self_attn.head_dim
        feature = torch.arange(features, device=value.weight.device)
        query_heads_per_value_head = features // rows
        shared = feature // (head * query_heads_per_value_head) * head + feature % head
        pairs.insert(1, Pair(("self_attn.o_proj",), _last_rows(value, rows), producer, shared))
    if "mlp.down_proj" in matrices:
        producer = next(name for name in ("mlp.up_proj", "mlp.gate_up_proj") if name in matrices)
        rows = matrices["mlp.down_proj"].in_features
        pairs.append(Pair(("mlp.down_proj",), _last_rows(matrices[producer], rows), producer))
    return pairs


def _last_rows(matrix: nn.Linear, rows: int) -> tuple[Tensor, ...]:
    tensors = [matrix.weight.data[-rows:]]
    if matrix.bias is not None:
        tensors.append(matrix.bias.data[-rows:])
    return tuple(tensors)


def move(block: Block, pair: Pair, scales: Tensor) -> bool:
    """Multiply the readers' input features and divide the producers, in place, if what stays at 16 bits stays exact.

    Args:
        block: its matrices at 16 bits, its norms and biases must hold their new values exactly in `block.dtype`.
        pair: where.
        scales: powers of two; one per output feature of the producers.

    Returns:
        Whether it was done.
    """
    matrices = matrices_of(block.module)
    of_inputs = scales if pair.shared is None else scales[pair.shared]
    changes: list[tuple[Tensor, Tensor, bool]] = []  # tensor, factor, whether it is stored as it is
    for name in pair.readers:
        changes.append((matrices[name].weight.data, of_inputs, block.entries[name].bits == 16))
    for tensor in pair.producers:
        if tensor.dim() == 1:
            changes.append((tensor, 1 / scales, True))
        else:
            changes.append((tensor, 1 / scales[:, None], block.entries[pair.producer].bits == 16))
    for tensor, factor, is_stored in changes:
        if not is_stored:
            continue
        stored = tensor.to(block.dtype).float()
        if not torch.equal((stored * factor).to(block.dtype).float() / factor, stored):
            return False
    for tensor, factor, _ in changes:
        tensor.mul_(factor.to(tensor.dtype))
    return True


def _look(
    block: Block, groups: list[tuple[str, ...]], most: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """By matrix: some tokens' inputs [tokens, K], mean |x_k| and E[x_k^2] over all tokens, [K] float64."""
    tokens = block.tokens()
    every = -(-tokens // most)
    samples: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    seen = dict.fromkeys((names[0] for names in groups), 0)

    def look(name: str, inputs: Tensor) -> None:
        inputs = inputs.float()
        both = torch.stack([inputs.abs().sum(0), inputs.square().sum(0)]).double()
        sums[name] = sums[name] + both if name in sums else both
        # Copied: a view would keep all inputs.
        samples.setdefault(name, []).append(inputs[-seen[name] % every :: every].clone())
        seen[name] += len(inputs)

    block.observe([names[0] for names in groups], look)
    found: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for names in groups:
        size, energy = total(sums[names[0]]) / tokens
        sample = torch.cat(samples[names[0]])
        for name in names:
            for where, value in zip(found, (sample, size, energy), strict=True):
                where[name] = value
    return found


def _search(
    block: Block, pair: Pair, sample: Tensor, size: Tensor, energy: Tensor, settings: Settings
) -> Tensor | None:
    """The scales that lose least, one per output feature of the producers; None where none is better than 1."""
    readers = {name: matrix for name, matrix in block.matrices.items() if name in pair.readers}
    count = int(pair.shared.max()) + 1 if pair.shared is not None else len(size)
    spread: Callable[[Tensor], Tensor] = (lambda s: s) if pair.shared is None else (lambda s: s[pair.shared])
    chosen = {
        name: matrix.weight.float()[:: -(-matrix.out_features // settings.rows)] for name, matrix in readers.items()
    }
    weights = sum(_relative_size(weight) for weight in chosen.values()) / len(chosen)
    log_inputs = _mean_over(size.float().clamp(min=1e-8).log2(), pair.shared, count)
    log_weights = _mean_over(weights.clamp(min=1e-8).log2(), pair.shared, count)
    candidates = [torch.zeros_like(log_inputs)]
    for step in range(settings.grid):
        a = step / max(1, settings.grid - 1)
        log2 = a * log_inputs - (1 - a) * log_weights
        candidates.append((log2 - (log2.max() + log2.min()) / 2).round().clamp(-_MOST_LOG2, _MOST_LOG2))
    losses = []
    for log2 in candidates:
        scales = spread(torch.exp2(log2))
        loss = torch.zeros((), dtype=torch.float64, device=sample.device)
        for name, weight in chosen.items():
            restored = _rounded(weight * scales, block.entries[name], energy / scales.square()) / scales
            loss += (sample @ (restored - weight).T).square().sum() * (len(readers[name].weight) / len(weight))
        losses.append(loss)
    best = int(total(torch.stack(losses)).argmin())
    return torch.exp2(candidates[best]) if best else None


def _rounded(weight: Tensor, entry: MatrixPlan, energy: Tensor) -> Tensor:
    return search_clip(weight, entry.bits, entry.symmetric, energy).dequantize()


def _relative_size(weight: Tensor) -> Tensor:
    """Mean over rows of |w| as a share of its group's largest: [N, K] to [K]."""
    groups = weight.abs().view(len(weight), -1, 128)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-8)).mean(0).flatten()


def _mean_over(values: Tensor, shared: Tensor | None, count: int) -> Tensor:
    if shared is None:
        return values
    sums = torch.zeros(count, device=values.device).index_add_(0, shared, values)
    return sums / (len(values) / count)
