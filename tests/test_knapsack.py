import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taq_vllm import knapsack


@st.composite
def instances(draw, limits=None):
    """Small instances: costs with ties or without, uses that collide or hardly ever do, also negative ones."""
    units, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    limits = limits or draw(st.integers(1, 3))
    largest = draw(st.sampled_from([2, 20, 10**9]))
    cost = st.integers(0, 4).map(float) if draw(st.booleans()) else st.floats(0, 1)
    costs = np.array(draw(st.lists(cost, min_size=units * choices, max_size=units * choices)))
    count = units * choices * limits
    uses = np.array(draw(st.lists(st.integers(-1, largest), min_size=count, max_size=count)), dtype=np.int64)
    uses = uses.reshape(units, choices, limits)
    low, high = uses.min(axis=1).sum(axis=0), uses.max(axis=1).sum(axis=0)
    available = [draw(st.integers(int(a) - 1, int(b))) for a, b in zip(low, high, strict=True)]
    return costs.reshape(units, choices), uses, np.array(available)


def brute_force(costs, uses, limits):
    rows = np.arange(len(costs))
    fitting = [
        costs[rows, list(choices)].sum()
        for choices in itertools.product(range(costs.shape[1]), repeat=len(costs))
        if (uses[rows, list(choices)].sum(axis=0) <= limits).all()
    ]
    return min(fitting, default=None)


@given(instances())
@settings(max_examples=150, deadline=None)
def test_a_solution_equals_brute_force_and_keeps_every_limit(instance):
    costs, uses, limits = instance
    solution, best = knapsack.solve(*instance), brute_force(*instance)
    assert (solution is None) == (best is None)
    if solution is not None:
        rows = np.arange(len(costs))
        assert (uses[rows, solution.choices].sum(axis=0) <= limits).all()
        assert solution.cost == costs[rows, solution.choices].sum()
        # TOLERANCE, of a cost of at most 20.
        assert solution.cost == pytest.approx(best, abs=2e-8)
        assert solution.gap == 0


@given(instances())
@settings(max_examples=60, deadline=None)
def test_what_the_search_leaves_to_highs_equals_brute_force_too(instance):
    costs, uses, limits = instance
    if (uses.min(axis=1).sum(axis=0) > limits).any():
        return
    chosen, bound, excluded = knapsack._integer_program(knapsack._Problem(*instance), None)
    best = brute_force(*instance)
    assert (chosen is None) == (best is None) == excluded
    if best is not None:
        rows = np.arange(len(costs))
        assert (uses[rows, chosen].sum(axis=0) <= limits).all()
        assert costs[rows, chosen].sum() == pytest.approx(best, abs=1e-6)
        assert bound <= best + 1e-6


@given(instances(limits=1), st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_a_larger_limit_never_costs_more(instance, more):
    costs, uses, limits = instance
    small, large = knapsack.solve(costs, uses, limits), knapsack.solve(costs, uses, limits + more)
    if small is not None:
        assert large.cost <= small.cost + 2e-8


@given(instances(limits=1))
@settings(max_examples=60, deadline=None)
def test_every_point_of_the_curve_is_the_best_of_its_size(instance):
    costs, uses, _ = instance
    points = knapsack.curve(costs, uses[:, :, 0])
    assert points[0].use == uses.min(axis=1).sum()
    assert points[-1].cost == pytest.approx(costs.min(axis=1).sum())
    for point in points:
        assert point.cost == pytest.approx(brute_force(costs, uses, np.array([point.use])), abs=1e-9)
    assert all(a.use < b.use and a.cost >= b.cost for a, b in itertools.pairwise(points))
    slopes = [(a.cost - b.cost) / (b.use - a.use) for a, b in itertools.pairwise(points)]
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(slopes))


BITS = {3: (4, 8, 16), 8: (2, 3, 4, 5, 6, 7, 8, 16)}


def ten_thousand(choices, kind, units=10_000):
    """Sizes of real layers with sensitivities over four orders of magnitude, or costs that are almost the sizes."""
    random = np.random.default_rng(0)
    if kind == "layers":
        weights = random.choice([4096 * 4096, 1024 * 4096, 14336 * 4096], units)[:, None]
        bits = np.array(BITS[choices])
        uses = weights * bits // 8 + np.where(bits < 16, 16 + weights // 64, 0)
        costs = np.exp(random.normal(0, 2, units))[:, None] * 4.0**-bits * random.uniform(0.8, 1.2, (units, choices))
        costs[:, -1] = 0
    else:
        uses = np.sort(random.integers(1, 10**7, (units, choices)), axis=1)
        worth = uses + (random.integers(0, 1000, uses.shape) if kind == "almost sizes" else 0)
        costs = (worth.max() - worth).astype(float)
    return costs, uses[:, :, None]


@pytest.mark.parametrize("kind", ["layers", "almost sizes"])
@pytest.mark.parametrize("choices", [3, 8])
def test_ten_thousand_units_are_solved_to_proven_optimality_in_ten_seconds(choices, kind):
    """Processor time: other work on the machine is not the solver's."""
    costs, uses = ten_thousand(choices, kind)
    limit = np.array([int(0.6 * uses.min(axis=1).sum() + 0.4 * uses.max(axis=1).sum())])
    start = time.process_time()
    solution = knapsack.solve(costs, uses, limit)
    assert time.process_time() - start < 10
    assert solution.gap == 0
    assert uses[np.arange(len(costs)), solution.choices].sum() <= limit[0]


def test_costs_that_are_the_sizes_themselves_leave_a_gap_that_is_told():
    """The worst case: every choice is as good as any, and only whole numbers tell the answers apart."""
    costs, uses = ten_thousand(8, "sizes")
    limit = np.array([int(0.6 * uses.min(axis=1).sum() + 0.4 * uses.max(axis=1).sum())])
    start = time.process_time()
    solution = knapsack.solve(costs, uses, limit)
    assert time.process_time() - start < 10
    assert solution.gap <= 1e-7 * solution.cost
    assert uses[np.arange(len(costs)), solution.choices].sum() <= limit[0]


def test_two_limits_on_a_models_matrices_are_solved_to_proven_optimality():
    costs, uses = ten_thousand(3, "layers", units=225)
    time_us = (uses // 1000) * np.random.default_rng(1).uniform(0.8, 1.2, (225, 1, 1))
    both = np.concatenate([uses, time_us.astype(np.int64)], axis=2)
    limits = (0.6 * both.min(axis=1).sum(axis=0) + 0.4 * both.max(axis=1).sum(axis=0)).astype(np.int64)
    solution = knapsack.solve(costs, both, limits)
    assert solution.gap == 0
    assert (both[np.arange(225), solution.choices].sum(axis=0) <= limits).all()


@pytest.mark.parametrize("slack", [0.35, 0.9])
@pytest.mark.parametrize("choices", [3, 8])
def test_two_limits_at_ten_thousand_units_are_solved_in_ten_seconds(choices, slack):
    """One limit that binds harder than the other: proven. Processor time, as above."""
    costs, uses = ten_thousand(choices, "layers")
    time_us = ((uses // 1000) * np.random.default_rng(1).uniform(0.8, 1.2, (10_000, 1, 1))).astype(np.int64)
    both = np.concatenate([uses, time_us], axis=2)
    share = np.array([0.4, slack])
    limits = ((1 - share) * both.min(axis=1).sum(axis=0) + share * both.max(axis=1).sum(axis=0)).astype(np.int64)
    start = time.process_time()
    solution = knapsack.solve(costs, both, limits)
    assert time.process_time() - start < 10
    assert (both[np.arange(10_000), solution.choices].sum(axis=0) <= limits).all()
    assert solution.gap <= 1e-5 * solution.cost


def test_two_limits_that_bind_alike_end_in_time_with_a_gap_that_is_told():
    costs, uses = ten_thousand(3, "layers")
    time_us = ((uses // 1000) * np.random.default_rng(1).uniform(0.8, 1.2, (10_000, 1, 1))).astype(np.int64)
    both = np.concatenate([uses, time_us], axis=2)
    limits = (0.6 * both.min(axis=1).sum(axis=0) + 0.4 * both.max(axis=1).sum(axis=0)).astype(np.int64)
    start = time.process_time()
    solution = knapsack.solve(costs, both, limits, seconds=3)
    assert time.process_time() - start < 5  # of 3 s, HiGHS may end a little late
    assert (both[np.arange(10_000), solution.choices].sum(axis=0) <= limits).all()
    assert solution.gap <= 1e-3 * solution.cost


def test_no_time_is_not_told_as_no_answer():
    """Two limits that fight: the choice that keeps one exceeds the other, so only counting tells."""
    random = np.random.default_rng(0)
    first = random.integers(1, 10**6, (60, 3))
    uses = np.stack([first, 10**6 - first], axis=2)
    middle = first.sum(axis=0).mean().astype(np.int64)
    limits = np.array([middle, 60 * 10**6 - middle])
    with pytest.raises(ValueError, match=r"no plan was found within 0 s, and none was proven impossible"):
        knapsack.solve(random.uniform(0, 1, (60, 3)), uses, limits, seconds=0)


def test_nothing_of_highs_reaches_stdout(capfd):
    costs, uses = ten_thousand(3, "layers", units=300)
    limit = np.array([int(0.6 * uses.min(axis=1).sum() + 0.4 * uses.max(axis=1).sum())])
    knapsack._integer_program(knapsack._Problem(costs, uses, limit), None)
    assert capfd.readouterr().out == ""


def test_without_units_only_the_limits_decide():
    empty = np.zeros((0, 3)), np.zeros((0, 3, 1), np.int64)
    assert knapsack.solve(*empty, np.array([0])).cost == 0
    assert knapsack.solve(*empty, np.array([-1])) is None
