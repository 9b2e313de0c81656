"""TAQ (TAQ-IS): information and stability of a layer's hidden states on the task's prompts.

For block l with output hidden states X_l over all calibration tokens (arXiv 2511.06516, eq. 3-5):
- information H_l: entropy of the normalised eigenvalues of the Gram matrix of a centred reservoir of r tokens;
- stability S_l = -Var_l, the variance of the hidden states over tokens, per channel and then averaged;
- relevance R_l = alpha z(H_l) + beta z(S_l), z-scores taken across layers.
One forward pass, no labels. Hidden states are taken before the final norm.

Standard errors are the infinitesimal jackknife over examples: every example's first-order influence on H, Var and,
through the z-scores, on R. It is the limit of the bootstrap over examples at the cost of one eigendecomposition.

What the paper leaves open is a setting here: moments per channel or pooled, the sign of the stability term (variance
grows along the residual stream, so -Var favours early layers by construction), and variance relative to the block's
input instead of absolute. The paper's own are `stability_sign=-1` and `variance=absolute`. The defaults are others:
plans by relative variance with the sign +1 did least damage of the four, on average over tasks and budgets of the lab
models (benchmarks/results/README.md), though not in every case.

Each block's statistics are journalled, and the hidden states behind it are saved wherever that costs little: the same
command goes on there and ends with the same numbers. Several processes (`distributed.py`) draw one reservoir: which
tokens are in it depends on the lengths of all examples alone.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from taq_vllm import distributed, journal
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.progress import track
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.stream import Batch, StreamedModel, make_batches
from taq_vllm.tasks import TokenizedExample
from taq_vllm.units import HEAD

READS = "prompts"
GRANULARITIES = ("layer",)
COST_UNIT = None

# Values that are looked at together: fewer cost more in calls than in arithmetic, more leave the processor's cache
# (2 MB in float64; measured: four times as long per value from 8 MB on).
_CHUNK_VALUES = 1 << 18
# Most of the time that may go into saving hidden states; blocks that take no longer than their saving are run again.
_SAVE_SHARE = 0.05


class Settings(BaseModel):
    """The paper's, but for `stability_sign` and `variance`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(0.5, ge=0)
    beta: float = Field(0.5, ge=0)
    reservoir: int = Field(256, ge=2)
    max_examples: int = Field(256, ge=2)
    max_tokens: int = Field(512, ge=1)
    batch_size: int = Field(8, ge=1)
    moments: Literal["channel", "pooled"] = "channel"
    stability_sign: Literal[-1, 1] = 1
    """-1 is the paper's S = -Var; +1 gives layers of high variance more precision."""
    variance: Literal["absolute", "relative"] = "relative"
    """`relative` divides by the variance of the block's input, which takes out its growth with depth."""
    seed: int = 0

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> "Settings":
        if abs(self.alpha + self.beta - 1) > 1e-9:
            raise ValueError(f"got alpha {self.alpha} and beta {self.beta}; they must sum to 1")
        return self


@dataclass(frozen=True)
class Statistic:
    """A number per layer with every example's first-order influence on it."""

    value: Tensor
    """[] or [layers] float64"""
    influence: Tensor
    """[examples] or [examples, layers] float64; sums to about 0 over examples"""

    @property
    def stderr(self) -> Tensor:
        """Infinitesimal-jackknife standard error over examples."""
        examples = self.influence.shape[0]
        return (self.influence.square().sum(0) * examples / max(examples - 1, 1)).sqrt()


class Reservoir:
    """A uniform sample of tokens from a stream (Vitter's algorithm R), with the example that each came from."""

    def __init__(self, size: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._size = size
        self._seen = 0
        self._rows: Tensor | None = None
        self._examples = torch.empty(size, dtype=torch.long)

    def update(self, tokens: Tensor, examples: Tensor) -> None:
        """Offer token vectors [n, d] and their examples [n], in order."""
        if self._rows is None:
            self._rows = torch.empty(self._size, tokens.shape[1], dtype=tokens.dtype)
        place = torch.arange(self._seen, self._seen + len(tokens))
        draw = (torch.rand(len(tokens), generator=self._generator, dtype=torch.float64) * (place + 1)).long()
        slot = torch.where(place < self._size, place, draw)
        kept = (slot < self._size).nonzero()[:, 0]
        holders = dict(zip(slot[kept].tolist(), kept.tolist(), strict=True))  # a later token evicts an earlier one
        slots, sources = list(holders), list(holders.values())
        self._rows[slots] = tokens[sources]
        self._examples[slots] = examples[sources]
        self._seen += len(tokens)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Token vectors [min(size, seen), d] and their examples."""
        count = min(self._size, self._seen)
        return self._rows[:count], self._examples[:count]


class Moments:
    """First and second moments over tokens, kept per example in float64."""

    def __init__(self, examples: int) -> None:
        self._count = torch.zeros(examples, dtype=torch.float64)
        self._sum: Tensor | None = None
        self._square = torch.zeros(examples, dtype=torch.float64)

    def update(self, tokens: Tensor, examples: Tensor) -> None:
        """Add token vectors [n, d] of the given examples [n]."""
        if self._sum is None:
            self._sum = torch.zeros(len(self._count), tokens.shape[1], dtype=torch.float64)
        self._count.index_add_(0, examples, torch.ones(len(tokens), dtype=torch.float64))
        rows = max(1, _CHUNK_VALUES // tokens.shape[1])
        for chunk, owners in zip(tokens.split(rows), examples.split(rows), strict=True):
            chunk = chunk.double()
            self._sum.index_add_(0, owners, chunk)
            self._square.index_add_(0, owners, chunk.square().mean(1))

    def of_all_processes(self, dimension: int) -> "Moments":
        """The moments of every process's examples, in the order of the whole calibration set.

        Args:
            dimension: d; a process may have seen no token.
        """
        together = Moments(0)
        local = torch.zeros(len(self._count), dimension, dtype=torch.float64) if self._sum is None else self._sum
        together._count, together._sum, together._square = (
            distributed.gather(values) for values in (self._count, local, self._square)
        )
        return together

    def variance(self, moments: Literal["channel", "pooled"]) -> Statistic:
        """Var = S2 / n - (S1 / n)^2 (eq. 4), per channel and averaged, or over all channels together."""
        total = self._count.sum()
        mean = self._sum.sum(0) / total
        if moments == "pooled":
            mean = mean.mean().expand_as(mean)
        around_mean = self._square - 2 * (self._sum @ mean) / len(mean) + self._count * mean.square().mean()
        value = around_mean.sum() / total
        return Statistic(value, (around_mean - self._count * value) / total)


def matrix_entropy(tokens: Tensor, examples: Tensor, example_count: int) -> Statistic:
    """Entropy of the spectrum of the centred tokens' Gram matrix (eq. 3), natural log.

    Args:
        tokens: [r, d], the reservoir.
        examples: [r] int64, where each token came from.
        example_count: number of calibration examples.
    """
    centred = tokens.double()
    centred = centred - centred.mean(0)
    rows = len(centred)
    eigenvalues, vectors = torch.linalg.eigh(centred @ centred.T / rows)
    eigenvalues = eigenvalues.clamp(min=0)
    trace = eigenvalues.sum()
    influence = torch.zeros(example_count, dtype=torch.float64)
    if trace <= 0:  # all tokens alike: no information
        return Statistic(torch.zeros((), dtype=torch.float64), influence)
    shares = eigenvalues / trace
    logs = torch.where(shares > 0, shares, torch.ones_like(shares)).log()
    entropy = -(shares * logs).sum()
    # Giving token i more weight moves eigenvalue k by lambda_k (r U_ik^2 - 1), and the shares by that over the trace
    # less their part of the trace's own change.
    moved = shares * (rows * vectors.square() - 1)
    moved = moved - moved.sum(1, keepdim=True) * shares
    influence.index_add_(0, examples, -(moved * logs).sum(1) / rows)
    return Statistic(entropy, influence)


def z_score(statistic: Statistic) -> Statistic:
    """Standardise across layers; a constant statistic becomes zeros.

    Args:
        statistic: value [layers], influence [examples, layers].
    """
    centred = statistic.value - statistic.value.mean()
    spread = centred.square().mean().sqrt()
    if spread <= 1e-12 * statistic.value.abs().max():
        return Statistic(torch.zeros_like(centred), torch.zeros_like(statistic.influence))
    scores = centred / spread
    shift = statistic.influence.mean(1, keepdim=True)
    stretch = (statistic.influence * scores).mean(1, keepdim=True)
    return Statistic(scores, (statistic.influence - shift - scores * stretch) / spread)


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Score every block from its hidden states in one pass.

    Raises:
        ValueError: the head is to be scored, which has no hidden states of its own.
    """
    if HEAD in run.units:
        raise ValueError("scorer taq looks at hidden states of blocks and cannot score lm_head; leave --head out")
    model = run.model
    batches = make_batches(run.sequences, settings.batch_size, settings.max_tokens)
    draw = _draw(run.sequences, settings)
    groups = _groups(batches, draw, model.config.hidden_size)
    hidden, first, done = _resume(model, batches, run.journal)

    def record(layer: int) -> None:
        """Keep the statistics of what leaves a block; -1 is what enters the first one."""
        done[layer] = _statistics(groups, draw, hidden, settings)
        if distributed.world()[0] == 0:
            entropy, variance = map(_as_json, done[layer])
            journal.append(run.journal, {"layer": layer, "entropy": entropy, "variance": variance})

    if first == 0:
        hidden = model.embed(batches)
        if settings.variance == "relative":
            record(-1)
    saved, saving = time.monotonic(), 0.0
    for layer in track(range(first, model.layers), "taq: information and stability", model.layers - first):
        with model.block(layer) as block:
            hidden.replace(lambda states, layer=layer, block=block: model.run(layer, block, states))
        record(layer)
        now = time.monotonic()
        if distributed.first(lambda due=(now - saved) * _SAVE_SHARE >= saving: due):
            hidden.save(_hidden_file(run.journal), blocks=layer + 1)
            saved = time.monotonic()
            saving = saved - now
    entropies = [done[layer][0] for layer in range(model.layers)]
    variances = [done[layer][1] for layer in range(-1, model.layers) if layer in done]
    information = _stack(entropies)
    spread = _stack(variances[-model.layers :])
    if settings.variance == "relative":
        before = _stack(variances[:-1])
        ratio = spread.value / before.value
        spread = Statistic(ratio, (spread.influence - ratio * before.influence) / before.value)
    stability = Statistic(settings.stability_sign * spread.value, settings.stability_sign * spread.influence)
    z_information, z_stability = z_score(information), z_score(stability)
    relevance = Statistic(
        settings.alpha * z_information.value + settings.beta * z_stability.value,
        settings.alpha * z_information.influence + settings.beta * z_stability.influence,
    )
    columns = {
        "information": information,
        "stability": stability,
        "z_information": z_information,
        "z_stability": z_stability,
    }
    return [
        UnitScore(
            unit=unit,
            score=relevance.value[layer].item(),
            stderr=relevance.stderr[layer].item(),
            details={name: column.value[layer].item() for name, column in columns.items()}
            | {f"{name}_stderr": column.stderr[layer].item() for name, column in columns.items()},
        )
        for layer, unit in enumerate(run.units)
    ]


def _recorded(file: Path, blocks: int) -> dict[int, tuple[Statistic, Statistic]]:
    """What an earlier run recorded of the first blocks (-1: not even of what enters them); the rest is dropped."""
    entries = [entry for entry in journal.read(file) if entry["layer"] < blocks]
    if file.is_file():
        journal.replace(file, entries)
    return {entry["layer"]: (_from_json(entry["entropy"]), _from_json(entry["variance"])) for entry in entries}


def _as_json(statistic: Statistic) -> dict[str, Any]:
    """Python writes the shortest decimals that are read back as the same float64."""
    return {"value": statistic.value.item(), "influence": statistic.influence.tolist()}


def _from_json(record: dict[str, Any]) -> Statistic:
    value, influence = record["value"], record["influence"]
    return Statistic(torch.tensor(value, dtype=torch.float64), torch.tensor(influence, dtype=torch.float64))


def _hidden_file(journal: Path) -> Path:
    """Each process saves its own examples' hidden states."""
    rank, size = distributed.world()
    return journal.with_name(f"{journal.name}.hidden" + (f"-{rank}-of-{size}" if size > 1 else ""))


def _resume(
    model: StreamedModel, batches: Sequence[Batch], file: Path
) -> tuple[HiddenStates | None, int, dict[int, tuple[Statistic, Statistic]]]:
    """Hidden states, number of the blocks behind them, and their statistics; 0 where there is nothing to go on with."""
    hidden, blocks = model.resume(_hidden_file(file)) or (None, 0)
    # A kill between two processes' saves leaves them at different blocks.
    together = distributed.gather(torch.tensor([blocks]))
    if hidden is None or together.unique().numel() > 1 or len(hidden) != len(batches):
        blocks = 0
    blocks = int(distributed.gather(torch.tensor([blocks])).min())
    done = distributed.first(lambda: _recorded(file, blocks))
    if blocks == 0 or len(done.keys() - {-1}) < blocks:
        return None, 0, distributed.first(lambda: _recorded(file, -1))
    return hidden, blocks, done


@dataclass(frozen=True)
class _Draw:
    """The reservoir's tokens among those of the whole calibration set.

    The set's tokens are numbered example by example, in the order in which one process would see them.

    Attributes:
        starts: [examples] int64, the number of each example's first token.
        numbers: [r] int64, the drawn tokens, ascending.
        owners: [r] int64, the example of each.
    """

    starts: Tensor
    numbers: Tensor
    owners: Tensor


def _draw(sequences: Sequence[TokenizedExample], settings: Settings) -> _Draw:
    """Draw the reservoir once, for all layers and alike in all processes."""
    lengths = distributed.gather(torch.tensor([len(sequence.input_ids) for sequence in sequences], dtype=torch.long))
    order = lengths.argsort(stable=True)
    ends = lengths.clamp(max=settings.max_tokens)[order].cumsum(0)
    starts = torch.empty_like(lengths)
    starts[order] = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    reservoir = Reservoir(settings.reservoir, settings.seed)
    count = int(ends[-1])
    reservoir.update(torch.arange(count)[:, None], torch.repeat_interleave(order, ends.diff(prepend=ends.new_zeros(1))))
    numbers, owners = reservoir.sample()
    numbers, places = numbers[:, 0].sort()
    return _Draw(starts, numbers, owners[places])


@dataclass(frozen=True)
class _Group:
    """Neighbouring batches that are looked at together, and the reservoir's draw among their tokens.

    Attributes:
        batches: their places.
        places: [n] int64, the real tokens' places in the batches' [B * T] vectors below each other.
        owners: [n] int64, the example of each among this process's.
        drawn: [m] int64, those of the n tokens that are in the reservoir.
        slots: [m] int64, their rows in it.
    """

    batches: range
    places: Tensor
    owners: Tensor
    drawn: Tensor
    slots: Tensor


def _groups(batches: Sequence[Batch], draw: _Draw, dimension: int) -> list[_Group]:
    """Which tokens are looked at: the same for every layer."""
    starts = torch.tensor(distributed.share(draw.starts.tolist()), dtype=torch.long)
    groups: list[_Group] = []
    first = 0
    while first < len(batches):
        last, values = first, 0
        while last < len(batches) and values < _CHUNK_VALUES:
            values += batches[last].input_ids.numel() * dimension
            last += 1
        chosen = batches[first:last]
        is_token = [batch.is_token for batch in chosen]
        numbers = torch.cat(
            [
                (starts[batch.examples][:, None] + torch.arange(batch.input_ids.shape[1]))[mask]
                for batch, mask in zip(chosen, is_token, strict=True)
            ]
        )
        drawn = torch.isin(numbers, draw.numbers).nonzero()[:, 0]
        groups.append(
            _Group(
                range(first, last),
                places=torch.cat([mask.flatten() for mask in is_token]).nonzero()[:, 0],
                owners=torch.cat([batch.examples.repeat_interleave(batch.lengths) for batch in chosen]),
                drawn=drawn,
                slots=torch.searchsorted(draw.numbers, numbers[drawn]),
            )
        )
        first = last
    return groups


def _statistics(
    groups: Sequence[_Group], draw: _Draw, hidden: HiddenStates, settings: Settings
) -> tuple[Statistic, Statistic]:
    """Entropy and variance of the hidden states [B, T, d] of all batches of all processes, padding left out."""
    examples = len(draw.starts)
    dimension = hidden[0].shape[-1]
    moments = Moments(len(distributed.share(range(examples))))
    reservoir = torch.zeros(len(draw.numbers), dimension)
    for group in groups:
        states = [states.flatten(0, 1) for states in (hidden[batch] for batch in group.batches)]
        below_each_other = states[0] if len(states) == 1 else torch.cat(states)
        tokens = below_each_other.index_select(0, group.places.to(below_each_other.device)).float().cpu()
        moments.update(tokens, group.owners)
        reservoir[group.slots] = tokens[group.drawn]
    # Every row is in one process and zero in the others: the sum is exact.
    entropy = matrix_entropy(distributed.total(reservoir), draw.owners, examples)
    return entropy, moments.of_all_processes(dimension).variance(settings.moments)


def _stack(statistics: Sequence[Statistic]) -> Statistic:
    return Statistic(torch.stack([s.value for s in statistics]), torch.stack([s.influence for s in statistics], dim=1))
