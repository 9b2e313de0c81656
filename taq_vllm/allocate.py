"""Scores and a budget become a plan. Pure Python: sizes are arithmetic, nothing is loaded.

Allocations (units are transformer blocks; arXiv 2511.06516, eq. 2 and section 4.1):
- `monotone`: precision never rises as the score falls. With three bitwidths that is two cut points in the ranking;
  all pairs are tried. A layer of rank r among n weighs n - r, and b bits keep 1 - 4^(4 - b) of it, since the error of
  rounding falls by 4 with every bit. So 8 bits are worth almost what 16 are, and 16 remain only where bytes are left.
- `paper`: the paper's shares: of the layers that are not edges, the first 15% by rank at 16 bits, the next 45% at 8.
- `uniform`: the same bits everywhere, the most that the budget allows.
In every one, pins win over edges and edges over scores. A budget is never exceeded.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import BITS_MENU, GROUP_SIZE, SYMMETRIC, Allocation, Budget, MatrixPlan, Plan, weight_bytes
from taq_vllm.scores import Scores
from taq_vllm.units import layer_of

ALLOCATIONS = ("monotone", "paper", "uniform")

PAPER_SHARE_16, PAPER_SHARE_8 = 0.15, 0.45

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(bits|" + "|".join(_UNITS) + r")\s*$")


@dataclass(frozen=True)
class Request:
    """What the user asks of a plan."""

    budget: str
    """`5.0bits` (average over planned weights, scales counted) or `4.2GiB` (all tensors on disk)."""
    allocation: str = "monotone"
    edges: int = 0
    """Layers protected at each end of the model."""
    edge_bits: int = 16
    pins: tuple[str, ...] = ()
    """`layers.0=16`, `layers.3.self_attn.q_proj=8`, `re:.*down_proj=8`; the last that matches wins."""
    symmetric: Mapping[int, bool] = field(default_factory=lambda: dict(SYMMETRIC))


def allocate(files: ModelFiles, scores: Scores | None, request: Request) -> Plan:
    """Make a plan within the budget.

    Args:
        files: the model's shapes.
        scores: who needs precision; None for `uniform`.
        request: budget, allocation, edges and pins.

    Raises:
        ValueError: scores of another model, an unknown allocation or pin, or a budget that cannot be met; the
            message names the smallest and largest that can.
    """
    files.check_plannable()
    if request.allocation not in ALLOCATIONS:
        raise ValueError(f"got allocation {request.allocation!r}; there are {', '.join(ALLOCATIONS)}")
    if scores is None and request.allocation != "uniform":
        raise ValueError(f"allocation {request.allocation!r} needs scores: give --scores FILE")
    if scores is not None and scores.model.fingerprint != files.ref.fingerprint:
        raise ValueError(
            f"the scores were made for {scores.model.id}, not for {files.id}: run `taq score` on {files.id}"
        )
    if request.edge_bits not in BITS_MENU:
        raise ValueError(f"got edge bits {request.edge_bits}, allowed are {', '.join(map(str, BITS_MENU))}")
    if not 0 <= 2 * request.edges <= files.layers:
        raise ValueError(f"got {request.edges} edge layers at each end of a model of {files.layers} layers")

    sizes = _Sizes(files, request)
    ranking = [layer_of(unit) for unit in scores.ranking] if scores else list(range(files.layers))
    free = [layer for layer in ranking if not sizes.is_edge(layer)]
    candidates = _candidates(request.allocation, free)
    smallest = min(candidates, key=sizes.total)
    largest = max(candidates, key=sizes.total)
    fitting = [bits for bits in candidates if sizes.total(bits) <= sizes.limit]
    if not fitting:
        raise ValueError(
            f"budget {request.budget} is below the smallest that {request.allocation!r} can meet here: "
            f"{sizes.describe(smallest)}. Ask for more, or protect fewer layers."
        )
    if sizes.limit > sizes.full:
        raise ValueError(
            f"budget {request.budget} is above the full-precision model: the largest plan is "
            f"{sizes.describe(largest)}. Ask for less, or serve the model as it is."
        )
    weights = {layer: len(free) - place for place, layer in enumerate(free)}
    best = max(fitting, key=lambda bits: (_benefit(bits, weights), sizes.total(bits)))
    return _plan(files, scores, request, sizes, ranking, best)


def _candidates(allocation: str, free: Sequence[int]) -> list[dict[int, int]]:
    """Bits per free layer, all that the allocation allows; `free` is in rank order."""
    count = len(free)
    if allocation == "uniform":
        return [dict.fromkeys(free, bits) for bits in BITS_MENU]
    if allocation == "paper":
        cuts = [(round(PAPER_SHARE_16 * count), round(PAPER_SHARE_8 * count))]
    else:
        cuts = [(at_16, at_8) for at_16 in range(count + 1) for at_8 in range(count + 1 - at_16)]
    return [
        dict(zip(free, [16] * at_16 + [8] * at_8 + [4] * (count - at_16 - at_8), strict=True)) for at_16, at_8 in cuts
    ]


def _benefit(bits: Mapping[int, int], weights: Mapping[int, int]) -> float:
    return sum(weights[layer] * (1 - 4.0 ** (4 - b)) for layer, b in bits.items())


class _Sizes:
    """Bytes of a model under a choice of bits per layer, edges and pins applied."""

    def __init__(self, files: ModelFiles, request: Request) -> None:
        self._files = files
        self._request = request
        self.pinned = _match_pins(files, request.pins)
        self._by_layer: dict[int, list[str]] = {}
        for name in files.matrices:
            self._by_layer.setdefault(layer_of(name), []).append(name)
        self._cache: dict[tuple[int, int], int] = {}
        self._weights = sum(rows * columns for rows, columns in files.matrices.values())
        self.full = 2 * self._weights
        """Bytes of the planned matrices in 16 bits."""
        amount, unit = _parse_budget(request.budget)
        self.asked = f"{amount:g}{unit}"
        self.limit = (
            amount * self._weights / 8 if unit == "bits" else amount * _UNITS[unit] - files.bytes_beside(files.matrices)
        )
        """The budget as bytes of the planned matrices."""

    def is_edge(self, layer: int) -> bool:
        return min(layer, self._files.layers - 1 - layer) < self._request.edges

    def matrix_bits(self, name: str, bits: Mapping[int, int]) -> tuple[int, str]:
        """What a matrix gets and why, from its layer's bits."""
        if name in self.pinned:
            return self.pinned[name], "pinned"
        if self._files.matrices[name][1] % GROUP_SIZE:
            return 16, "shape"
        layer = layer_of(name)
        if self.is_edge(layer):
            return self._request.edge_bits, "edge"
        return bits[layer], "score"

    def total(self, bits: Mapping[int, int]) -> int:
        """Bytes on disk of the planned matrices."""
        return sum(self._layer_total(layer, bits) for layer in self._by_layer)

    def _layer_total(self, layer: int, bits: Mapping[int, int]) -> int:
        key = (layer, bits.get(layer, 0))
        if key not in self._cache:
            self._cache[key] = 0
            for name in self._by_layer[layer]:
                chosen, _ = self.matrix_bits(name, bits)
                self._cache[key] += weight_bytes(chosen, self._files.matrices[name], self._request.symmetric[chosen])
        return self._cache[key]

    def describe(self, bits: Mapping[int, int]) -> str:
        planned = self.total(bits)
        # Rounded up, so that what is printed can be asked for.
        average = -(-8000 * planned // self._weights) / 1000
        return f"{average:.3f}bits or {planned + self.other_bytes}B"


def _parse_budget(budget: str) -> tuple[float, str]:
    match = _BUDGET.match(budget)
    if not match:
        raise ValueError(
            f"got budget {budget!r}; write it as 5.0bits, or in bytes as 4.2GiB (units: {', '.join(_UNITS)})"
        )
    return float(match.group(1)), match.group(2)


def _match_pins(files: ModelFiles, pins: Sequence[str]) -> dict[str, int]:
    pinned: dict[str, int] = {}
    for pin in pins:
        target, separator, value = pin.rpartition("=")
        if not separator or not target or not value.isdigit() or int(value) not in BITS_MENU:
            raise ValueError(
                f"got pin {pin!r}; write NAME=BITS with bits in {', '.join(map(str, BITS_MENU))}, "
                "as layers.0=16, layers.3.self_attn.q_proj=8 or re:.*down_proj=8"
            )
        if target.startswith("re:"):
            try:
                pattern = re.compile(target.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"got pin {pin!r}, whose pattern is not a regular expression: {error}") from error
            names = [name for name in files.matrices if pattern.fullmatch(name)]
        else:
            names = [name for name in files.matrices if f".{target}." in f".{name}."]
        if not names:
            example = next(iter(files.matrices))
            raise ValueError(f"pin {pin!r} matches no weight matrix of {files.id}; they are named like {example}")
        if int(value) < 16 and (odd := [name for name in names if files.matrices[name][1] % GROUP_SIZE]):
            raise ValueError(
                f"pin {pin!r} asks for {value} bits for {odd[0]} with {files.matrices[odd[0]][1]} in-features, "
                f"which {GROUP_SIZE} does not divide; leave it at 16"
            )
        pinned.update(dict.fromkeys(names, int(value)))
    return pinned


def _plan(
    files: ModelFiles,
    scores: Scores | None,
    request: Request,
    sizes: _Sizes,
    ranking: Sequence[int],
    bits: Mapping[int, int],
) -> Plan:
    values = {layer_of(s.unit): s.score for s in scores.units} if scores else {}
    ranks = {layer: rank for rank, layer in enumerate(ranking)} if scores else {}
    matrices = {}
    for name, shape in files.matrices.items():
        chosen, why = sizes.matrix_bits(name, bits)
        if why == "score" and (scores is None or scores.task is None):
            why = "baseline"
        layer = layer_of(name)
        matrices[name] = MatrixPlan(
            bits=chosen,
            symmetric=request.symmetric[chosen],
            shape=shape,
            why=why,
            score=values.get(layer),
            rank=ranks.get(layer),
        )
    settings: dict[str, Any] = {"edges": request.edges, "edge_bits": request.edge_bits, "pins": list(request.pins)}
    return Plan(
        base_model=files.ref,
        task=scores.task if scores else None,
        scorer=scores.scorer if scores else None,
        allocation=Allocation(name=request.allocation, settings=settings),
        budget=Budget.of(sizes.asked, matrices, files.bytes_beside(files.matrices)),
        matrices=matrices,
    )
