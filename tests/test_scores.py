"""Comparing scorers: the correlation, its interval, and what cannot be compared."""

import json

import numpy as np
import pytest
from scipy.stats import kendalltau
from typer.testing import CliRunner

from taq_vllm.cli import app
from taq_vllm.plan import ModelRef, ScorerRef
from taq_vllm.scores import Scores, UnitScore
from taq_vllm.scores_compare import _tau_b, compare_scores


def scores(values, stderr=None, fingerprint="f", granularity="layer", **units):
    entries = tuple(
        UnitScore(
            unit=f"model.layers.{i}",
            score=value,
            stderr=stderr,
            **{name: column[i] for name, column in units.items()},
        )
        for i, value in enumerate(values)
    )
    return Scores(
        model=ModelRef(id="m", fingerprint=fingerprint),
        task=None,
        scorer=ScorerRef(name="s"),
        granularity=granularity,
        units=entries,
        seconds=0.0,
        peak_memory_bytes=0,
    )


def compared(one, other):
    (comparison,) = compare_scores({"a": one, "b": other}, resamples=200)
    return comparison


def test_tau_is_scipys_on_scores_without_ties():
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 20))
    found = compared(scores(one), scores(other))
    assert found.tau == pytest.approx(kendalltau(one, other).statistic)
    assert found.low <= found.tau <= found.high
    assert found.interval == "units"


def test_resamples_have_scipys_tau_also_with_ties():
    generator = np.random.default_rng(0)
    for _ in range(20):
        one, other = generator.integers(5, size=(2, 12))
        assert _tau_b(one, other) == pytest.approx(kendalltau(one, other).statistic)
    assert np.isnan(_tau_b(np.zeros(4, int), np.arange(4)))


def test_the_same_order_agrees_and_the_reverse_does_not():
    values = [float(i) for i in range(12)]
    same, reverse = compared(scores(values), scores(values)), compared(scores(values), scores(values[::-1]))
    assert (same.tau, same.low, same.high) == pytest.approx((1, 1, 1))
    assert (reverse.tau, reverse.low, reverse.high) == pytest.approx((-1, -1, -1))
    assert same.disagreements == ()
    assert [d.unit for d in reverse.disagreements[:2]] == ["model.layers.0", "model.layers.11"]
    assert (reverse.disagreements[0].first_rank, reverse.disagreements[0].second_rank) == (11, 0)


def test_scores_that_cannot_be_told_from_zero_are_ordered_by_the_tiebreak():
    noise = scores([0.3, -0.2, 0.1], from_zero=[False] * 3, tiebreak=[1.0, 2.0, 3.0])
    assert compared(noise, scores([1.0, 2.0, 3.0])).tau == pytest.approx(1)
    ties = scores([0.3, -0.2, 0.1, 5.0], from_zero=[False, False, False, True])
    found = compared(ties, scores([1.0, 2.0, 3.0, 4.0]))
    assert found.tau == pytest.approx(kendalltau([0, 0, 0, 1], [1, 2, 3, 4]).statistic)
    # three units tie behind the first: their ranks are 1, 2 and 3, the mean 2
    assert {d.unit: d.first_rank for d in found.disagreements} == {"model.layers.0": 2, "model.layers.2": 2}


def test_standard_errors_widen_the_interval_where_both_have_them():
    values = [float(i) for i in range(12)]
    certain = compared(scores(values), scores(values, stderr=5.0))
    noisy = compared(scores(values, stderr=5.0), scores(values, stderr=5.0))
    assert (certain.interval, noisy.interval) == ("units", "units and noise")
    assert certain.low == pytest.approx(1)
    assert noisy.low < 0.6
    assert noisy.tau == pytest.approx(1)


def test_an_interval_of_unrelated_orders_holds_zero_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        found = compared(scores(generator.normal(size=24)), scores(generator.normal(size=24)))
        covered += found.low <= 0 <= found.high
    # 95% of 40 are 38, with a standard deviation of 1.4; a percentile bootstrap of 24 units covers a little less
    assert covered >= 33


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (scores([1.0, 2.0], fingerprint="g"), "score the same model"),
        (scores([1.0, 2.0], granularity="module"), "same --granularity"),
        (scores([1.0, 2.0, 3.0]), "only one of them scores model.layers.2"),
    ],
)
def test_what_cannot_be_compared_says_why(other, said):
    with pytest.raises(ValueError, match=said):
        compared(scores([1.0, 2.0]), other)


def test_one_file_is_nothing_to_compare():
    with pytest.raises(ValueError, match="two or more"):
        compare_scores({"a": scores([1.0, 2.0])})


def test_the_command_prints_every_pair_as_text_and_as_json(tmp_path):
    files = []
    for name, values in (("a", [1.0, 2.0, 3.0]), ("b", [3.0, 2.0, 1.0]), ("c", [1.0, 3.0, 2.0])):
        scores(values).save(tmp_path / f"{name}.json")
        files.append(str(tmp_path / f"{name}.json"))
    result = CliRunner().invoke(app, ["scores", "compare", *files])
    assert result.exit_code == 0
    assert "-1.00" in result.stdout
    assert "layers.0 (2, 0)" in result.stdout
    result = CliRunner().invoke(app, ["scores", "compare", *files, "--json"])
    comparisons = json.loads(result.stdout)["comparisons"]
    assert [(c["first"][-6], c["second"][-6]) for c in comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert comparisons[0]["tau"] == pytest.approx(-1)
