"""Is an output right, and how sure is that: metrics of single outputs, intervals, paired comparisons.

Metrics map an output and its allowed answers to [0, 1]. `exact_match` and `f1` follow SQuAD's evaluation (lower case,
no punctuation, no articles, single spaces; best over the answers); `math_match` compares the number after `####`, else
the last number. Every mean gets a 95% interval, and two systems are compared on the same items only: right against
wrong by McNemar's exact test with Tango's score interval of the difference (Tango 1998, Statistics in Medicine 17),
anything else by a paired bootstrap. Pure functions; scipy does what it has.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap, norm

CONFIDENCE = 0.95
RESAMPLES = 9999

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_MINUEND = re.compile(r"(?:[\d)\]]\s*|\w)$")
_BATCH_ELEMENTS = 2**23  # bootstrap resamples held at once, in array elements (64 MiB)


class Interval(NamedTuple):
    """A 95% confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedResult:
    """The difference of two systems on the same items: first minus second."""

    mean: float
    low: float
    """95% interval of the difference."""
    high: float
    p_value: float
    """Two-sided, of no difference."""
    method: Literal["mcnemar-exact, tango interval", "paired bootstrap"]
    n: int
    better: int
    """Items on which the first system scores higher."""
    worse: int

    @property
    def significant(self) -> bool:
        """The interval of the difference excludes zero, and the test agrees at 5%."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - CONFIDENCE


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals one of the normalised answers, else 0.0."""
    return float(_normalised(prediction) in {_normalised(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall of words over the answers, after normalisation."""
    return max(_word_f1(_normalised(prediction).split(), _normalised(answer).split()) for answer in answers)


def math_answer(text: str) -> Decimal | None:
    """The number after the first `####`, else the last number in the text; None where there is none.

    Thousands commas, decimals, a minus sign and a full stop behind the number are understood: "$1,200." is 1200. A
    minus is a sign except after a digit, a bracket or, without a space, a letter: "12 - 5" holds 12 and 5, "is -5" -5.
    """
    marked = text.split("####", 1)
    numbers = [match for part in marked[1:] or marked for match in _signed_numbers(part)]
    if not numbers:
        return None
    return Decimal((numbers[0] if len(marked) > 1 else numbers[-1]).replace(",", ""))


def math_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction's number equals the number of one of the answers, else 0.0."""
    number = math_answer(prediction)
    return float(number is not None and number in [math_answer(answer) for answer in answers])


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion.

    Raises:
        ValueError: `n` is not positive, or `successes` lies outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes of {n}; needs 0 <= successes <= n and at least one item")
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap_interval(values: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of a mean over items.

    Args:
        values: [n], one per item.
        weights: [n], and the mean becomes sum(values) / sum(weights): for example summed NLL and token counts per
            item, which give the NLL per token. Items are resampled whole.
        seed: of the resampling.

    Raises:
        ValueError: no items, lengths that differ, or a value that is not a number.
    """
    array, divisors = _checked(values, weights)
    _, interval = _resampled(array, divisors, seed)
    return interval


def paired_difference(
    first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0
) -> PairedResult:
    """Compare two systems that answered the same items, in the same order.

    Right against wrong (all values 0 or 1, no weights): McNemar's exact test and Tango's score interval. Otherwise a
    paired bootstrap over items, its p-value twice the smaller share of resampled differences on one side of zero.

    Args:
        first: [n], score of each item.
        second: [n], the same items.
        weights: [n], see `bootstrap_interval`.
        seed: of the resampling.

    Raises:
        ValueError: no items, lengths that differ, or a value that is not a number.
    """
    one, divisors = _checked(first, weights)
    other, _ = _checked(second, weights)
    if one.shape != other.shape:
        raise ValueError(f"got {one.size} and {other.size} scores; a paired comparison needs the same items in both")
    n, better, worse = one.size, int((one > other).sum()), int((one < other).sum())
    if weights is None and set(np.unique([one, other])) <= {0.0, 1.0}:
        low, high = _tango_interval(better, worse, n)
        p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
        method = "mcnemar-exact, tango interval"
    else:
        resampled, (low, high) = _resampled(one - other, divisors, seed)
        # +1: the sample at hand is one more draw, so no p-value is smaller than the resampling can show.
        tail = min((resampled <= 0).sum(), (resampled >= 0).sum()) + 1
        p_value = min(1.0, 2 * float(tail) / (resampled.size + 1))
        method = "paired bootstrap"
    return PairedResult(float((one - other).sum() / divisors.sum()), low, high, p_value, method, n, better, worse)


def _normalised(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _word_f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def _signed_numbers(text: str) -> list[str]:
    numbers = []
    for match in _NUMBER.finditer(text):
        number = match.group()
        before = text[: match.start()]
        if number.startswith("-") and _MINUEND.search(before):
            number = number[1:]
        numbers.append(number)
    return numbers


def _checked(values: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    array = np.asarray(values, dtype=np.float64)
    divisors = np.ones_like(array) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"got values of shape {array.shape}; needs one value per item and at least one item")
    if divisors.shape != array.shape:
        raise ValueError(f"got {array.size} values and {divisors.size} weights; needs as many of both")
    if not (np.isfinite(array).all() and np.isfinite(divisors).all() and (divisors > 0).all()):
        raise ValueError("got a value that is not a finite number, or a weight that is not positive")
    return array, divisors


def _resampled(
    values: NDArray[np.float64], weights: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], Interval]:
    """Bootstrap distribution [RESAMPLES] and percentile interval of sum(values) / sum(weights)."""
    if values.size == 1:
        # One item says nothing about the spread; scipy refuses it.
        point = float(values[0] / weights[0])
        return np.full(RESAMPLES, point), Interval(point, point)
    result = bootstrap(
        (values, weights),
        lambda v, w, axis: v.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH_ELEMENTS // values.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return result.bootstrap_distribution, Interval(float(interval.low), float(interval.high))


def _tango_interval(better: int, worse: int, n: int) -> Interval:
    """All differences that the score test of paired proportions does not reject (Tango 1998, eq. 5-7)."""
    critical = float(norm.ppf(0.5 + CONFIDENCE / 2))

    def excess(difference: float) -> float:
        """Score statistic at an assumed difference; falls as the difference grows."""
        linear = -better - worse + (2 * n - better + worse) * difference
        constant = -worse * difference * (1 - difference)
        # Probability of the second kind of discordant pair, maximum likelihood under the assumed difference.
        discordant = (np.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * discordant + difference * (1 - difference))
        return float((better - worse - n * difference) / np.sqrt(max(variance, 1e-300)))

    observed = (better - worse) / n
    low = -1.0 if observed <= -1 else brentq(lambda d: excess(d) - critical, -1 + 1e-12, observed, xtol=1e-10)
    high = 1.0 if observed >= 1 else brentq(lambda d: excess(d) + critical, observed, 1 - 1e-12, xtol=1e-10)
    return Interval(float(low), float(high))
