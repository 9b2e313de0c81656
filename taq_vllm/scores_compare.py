"""How alike scorers order the units of a model: Kendall's tau-b for every pair, with intervals, and where they differ.

Units are ordered as allocators do (`Scores.ranking`): by score, those that cannot be told from zero as zero, equal ones
by the tiebreak; units that are equal in both are ties. tau-b is 1 for the same order, -1 for the reverse, about 0 for
unrelated ones; with n units its standard deviation by chance is about sqrt(2 (2n + 5) / (9 n (n - 1))), 0.22 for 12.

The 95% interval is the percentile bootstrap over units: these units stand for others like them. Where both scorers give
standard errors, every resample also moves each score by them ("units and noise"): noise can only blur an order, so this
interval lies nearer to zero than the first, and may leave out tau itself. Tiebreaks are not moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

from taq_vllm.scores import Scores

RESAMPLES = 2000
_SHOWN = 5


@dataclass(frozen=True)
class Disagreement:
    """A unit that two scorers rank differently; 0 is the rank of the unit that needs precision most."""

    unit: str
    first_rank: float
    second_rank: float


@dataclass(frozen=True)
class Comparison:
    """Two scorers' orders of the same units."""

    first: str
    second: str
    units: int
    tau: float
    """Kendall's tau-b; not a number where one scorer finds all units equal."""
    low: float
    """95% interval."""
    high: float
    interval: Literal["units", "units and noise"]
    """What the interval covers."""
    p_value: float
    """Two-sided, of unrelated orders."""
    disagreements: tuple[Disagreement, ...]
    """Largest rank differences first; mean ranks where units tie."""


def compare_scores(scores: Mapping[str, Scores], resamples: int = RESAMPLES, seed: int = 0) -> list[Comparison]:
    """Compare every pair.

    Args:
        scores: two or more, by the name to call them.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two, or scores of different models, granularities or units.
    """
    if len(scores) < 2:
        raise ValueError(f"got {len(scores)} scores file; give two or more to compare")
    names = list(scores)
    reference = scores[names[0]]
    units = [entry.unit for entry in reference.units]
    if len(units) < 2:
        raise ValueError(f"{names[0]} scores {len(units)} unit; an order needs two or more")
    for name in names[1:]:
        other = scores[name]
        if other.model.fingerprint != reference.model.fingerprint:
            raise ValueError(
                f"{names[0]} and {name} cannot be compared: they score {reference.model.id} (fingerprint "
                f"{reference.model.fingerprint[:12]}) and {other.model.id} ({other.model.fingerprint[:12]}); score the "
                "same model with both"
            )
        if other.granularity != reference.granularity:
            raise ValueError(
                f"{names[0]} and {name} cannot be compared: one scores by {reference.granularity}, the other by "
                f"{other.granularity}; score both with the same --granularity"
            )
        if [entry.unit for entry in other.units] != units:
            alone = {entry.unit for entry in other.units} ^ set(units)
            raise ValueError(
                f"{names[0]} and {name} cannot be compared: only one of them scores {', '.join(sorted(alone)[:3])}; "
                "score both with or both without --head"
            )
    return [
        _compare(first, scores[first], second, scores[second], resamples, seed)
        for first, second in combinations(names, 2)
    ]


def _compare(first_name: str, first: Scores, second_name: str, second: Scores, resamples: int, seed: int) -> Comparison:
    one, other = _Order(first), _Order(second)
    result = kendalltau(one.places(), other.places())
    noisy = one.stderr is not None and other.stderr is not None
    generator = np.random.default_rng(seed)
    count = len(first.units)
    taus = []
    for _ in range(resamples):
        drawn = generator.integers(count, size=count)
        places = [order.places(generator if noisy else None)[drawn] for order in (one, other)]
        taus.append(_tau_b(*places))
    # A resample in which one of them finds all units equal has no tau.
    known = np.array(taus)[np.isfinite(taus)]
    low, high = np.quantile(known, [0.025, 0.975]) if known.size else (float("nan"), float("nan"))
    ranks = [rankdata(order.places(), method="average") - 1 for order in (one, other)]
    difference = np.abs(ranks[0] - ranks[1])
    largest = [int(i) for i in np.argsort(-difference, kind="stable")[:_SHOWN] if difference[i] > 0]
    return Comparison(
        first=first_name,
        second=second_name,
        units=count,
        tau=float(result.statistic),
        low=float(low),
        high=float(high),
        interval="units and noise" if noisy else "units",
        p_value=float(result.pvalue),
        disagreements=tuple(Disagreement(first.units[i].unit, float(ranks[0][i]), float(ranks[1][i])) for i in largest),
    )


def _tau_b(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """tau-b of two lists of places [units], by its definition: a hundredth of scipy's time for a few hundred units."""
    first, second = (np.sign(places[:, None] - places) for places in (one, other))
    untied = np.count_nonzero(first) * np.count_nonzero(second)
    return float((first * second).sum() / untied**0.5) if untied else float("nan")


class _Order:
    """One scorer's order, and how to draw it again."""

    def __init__(self, scores: Scores) -> None:
        self._score, self._tiebreak = np.array([entry.ranked for entry in scores.units]).T
        stderrs: Sequence[float | None] = [entry.stderr for entry in scores.units]
        self.stderr = None if None in stderrs else np.array(stderrs)
        self._moves = np.array([entry.from_zero for entry in scores.units])

    def places(self, generator: np.random.Generator | None = None) -> NDArray[np.int64]:
        """[units] dense ranks, 0 first; equal units have equal places. With a generator scores are moved by noise."""
        score = self._score
        if generator is not None:
            score = score + self._moves * self.stderr * generator.standard_normal(len(score))
        pairs = np.stack([-score, -self._tiebreak], axis=1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
