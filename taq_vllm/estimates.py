"""Means over calibration examples and how well they are known: what every score and cost of `scores.json` is."""

from torch import Tensor


def mean_and_stderr(values: Tensor) -> tuple[float, float]:
    """Over examples: the mean and its standard error.

    Args:
        values: [examples], two or more.
    """
    return values.mean().item(), (values.std(unbiased=True) / len(values) ** 0.5).item()


def ratio_and_stderr(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Over examples that count by their tokens: the mean per token and its standard error (the delta method's).

    Args:
        sums: [examples], over each example's tokens.
        counts: [examples], how many tokens those are.
    """
    ratio = (sums.sum() / counts.sum()).item()
    return ratio, mean_and_stderr((sums - ratio * counts) / counts.mean())[1]
