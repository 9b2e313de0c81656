import itertools
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from taq_vllm.metrics import (
    bootstrap_interval,
    exact_match,
    f1,
    math_answer,
    math_match,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Eiffel Tower", 1.0),
        (" the  eiffel tower.\n", 1.0),
        ("An Eiffel-Tower", 0.0),  # the hyphen goes, the words run together, as in SQuAD's script
        ("La Tour Eiffel", 1.0),
        ("Eiffel", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_normalises_like_squad_and_takes_the_best_alias(prediction, expected):
    assert exact_match(prediction, ["The Eiffel Tower", "la tour Eiffel"]) == expected


def test_article_inside_a_word_stays():
    assert exact_match("theatre", ["atre"]) == 0.0


def test_f1_counts_common_words_of_the_best_alias():
    # 2 of 3 predicted words are in the 4 expected ones: 2 * 2 / (3 + 4).
    assert f1("red green blue", ["red blue black white"]) == pytest.approx(4 / 7)
    assert f1("red green blue", ["nothing", "blue red green"]) == 1.0
    assert f1("red", ["green"]) == 0.0


def test_f1_counts_a_repeated_word_as_often_as_both_have_it():
    assert f1("a red red red", ["red red"]) == pytest.approx(2 * 2 / 5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 * 6 = 18. #### 42", "42"),
        ("#### 42\nQuestion: what is 7?", "42"),
        ("####-5", "-5"),
        ("so she has 1,200.", "1200"),
        ("#### $1,234,567.50 in all", "1234567.50"),
        ("It is 18.", "18"),
        ("It is -7", "-7"),
        ("10 - 3 = 7", "7"),
        ("12-5", "5"),
        ("(3) -2", "2"),
        ("half is .5", "0.5"),
        ("1,2,3", "3"),
    ],
)
def test_math_answer_is_the_marked_number_else_the_last(text, number):
    assert math_answer(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "7 apples ####", "#### seven"])
def test_text_without_a_number_where_it_must_be_has_no_math_answer(text):
    assert math_answer(text) is None
    assert math_match(text, ["7"]) == 0.0


def test_math_match_compares_values_not_spellings():
    assert math_match("#### 1,200.00", ["7", "1200"]) == 1.0
    assert math_match("#### 0.1", ["0.10"]) == 1.0
    assert math_match("#### 0.1", ["0.1000000000000000055"]) == 0.0  # as floats the two would be equal


def test_wilson_interval_agrees_with_its_formula():
    successes, n, z = 482, 500, norm.ppf(0.975)
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson_interval(successes, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="needs 0 <= successes <= n"):
        wilson_interval(successes, n)


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=2000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    # 9,999 resamples give each end with a standard error of about 2% of the half width; 10% is five of them.
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_interval_repeats_with_its_seed_and_only_with_it():
    values = np.random.default_rng(0).random(100)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_weights_turn_the_mean_into_a_ratio_of_sums():
    tokens = np.array([1, 1, 98] * 20)
    low, high = bootstrap_interval(2.0 * tokens, tokens)
    assert (low, high) == (2.0, 2.0)  # every item has 2 nats per token, whatever is resampled


@pytest.mark.parametrize("values", [[], [float("nan")], [[1.0, 0.0]]])
def test_intervals_need_one_number_per_item(values):
    with pytest.raises(ValueError, match=r"at least one item|not a finite number"):
        bootstrap_interval(values)


def outcomes(both, better, worse, neither):
    first = [1] * both + [1] * better + [0] * worse + [0] * neither
    second = [1] * both + [0] * better + [1] * worse + [0] * neither
    return first, second


def test_right_against_wrong_uses_mcnemars_exact_test():
    result = paired_difference(*outcomes(36, 12, 2, 0))
    # Two-sided binomial of 2 in 14: 2 * (1 + 14 + 91) / 2^14.
    assert result.p_value == pytest.approx(2 * 106 / 2**14)
    assert (result.mean, result.better, result.worse, result.n) == (pytest.approx(0.2), 12, 2, 50)
    assert result.method.startswith("mcnemar-exact")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_tango_interval_ends_where_the_score_test_rejects(better, worse, rest):
    if better + worse + rest == 0:
        return
    n = better + worse + rest
    result = paired_difference(*outcomes(rest, better, worse, 0))
    assert -1 <= result.low <= result.mean <= result.high <= 1
    for end in (result.low, result.high):
        if abs(end) > 1 - 1e-6:
            continue
        # The nuisance parameter by brute force instead of the closed form: maximise the likelihood on a fine grid.
        grid = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = sum(
                count * np.log(share)
                for count, share in ((better, grid + end), (worse, grid), (rest, 1 - 2 * grid - end))
                if count
            )
        share = grid[np.nanargmax(likelihood)]
        statistic = (better - worse - n * end) / np.sqrt(n * (2 * share + end * (1 - end)))
        # The grid is 1e-6 fine, which moves the statistic by less than 0.01 at these sizes.
        assert abs(statistic) == pytest.approx(norm.ppf(0.975), abs=0.02)


def test_two_equal_systems_differ_by_nothing():
    result = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert (result.mean, result.p_value, result.significant) == (0.0, 1.0, False)
    assert result.low < 0 < result.high  # four equal items do not prove equality


def test_a_difference_is_significant_only_if_its_interval_excludes_zero():
    for better, worse in itertools.product(range(0, 16), repeat=2):
        result = paired_difference(*outcomes(80, better, worse, 10))
        if result.significant:
            assert result.low > 0 or result.high < 0
        assert result.significant <= (result.p_value < 0.05)
    assert paired_difference(*outcomes(80, 12, 1, 10)).significant


def test_swapping_the_systems_mirrors_the_result():
    first, second = outcomes(20, 9, 2, 5)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-8)
    assert one.p_value == other.p_value


def test_fractional_scores_use_the_paired_bootstrap():
    rng = np.random.default_rng(1)
    hardness = rng.random(400)
    first = np.clip(hardness + 0.02 + 0.05 * rng.normal(size=400), 0, 1)
    second = np.clip(hardness + 0.05 * rng.normal(size=400), 0, 1)
    result = paired_difference(first, second)
    assert result.method == "paired bootstrap"
    assert result.significant
    # Unpaired the same means could not be told apart: the spread between items is 10 times their difference.
    assert result.high - result.low < 0.03


def test_bootstrap_p_value_and_interval_agree_about_zero():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        result = paired_difference(rng.random(60) + 0.05 * (seed % 4), rng.random(60))
        outside = result.low > 0 or result.high < 0
        # At the edge both come from the same resamples, up to one of 9,999.
        assert outside == (result.p_value < 0.05) or abs(result.p_value - 0.05) < 0.001


def test_paired_comparison_needs_as_many_scores_of_both():
    with pytest.raises(ValueError, match="got 2 and 3 scores"):
        paired_difference([1, 0], [1, 0, 1])
