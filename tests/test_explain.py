import pytest
from tiny_models import make_tiny

from taq_vllm.allocate import Request, allocate
from taq_vllm.explain import diff, explain
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import MatrixPlan, ModelRef
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import baseline

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=5))


@pytest.fixture(scope="module")
def scores(files):
    return baseline(files, "random")


def bits_of(plan, unit):
    return {m.bits for name, m in plan.matrices.items() if name.startswith(unit)}


def test_a_diff_names_what_differs_and_nothing_else(files, scores):
    one, other = (allocate(files, scores, Request("6bits", pins=pins)) for pins in ((), ("layers.0.mlp.down_proj=16",)))
    differing = {n for n in one.matrices if one.matrices[n].bits != other.matrices[n].bits}
    found = diff(one, other)
    assert {each.name for each in found} == differing >= {"model.layers.0.mlp.down_proj"}
    assert sum(each.disk_bytes[1] - each.disk_bytes[0] for each in found) == (
        other.budget.disk_bytes - one.budget.disk_bytes
    )
    assert diff(one, one) == []
    with pytest.raises(ValueError, match="two models"):
        diff(one, one.model_copy(update={"base_model": ModelRef(id="other", fingerprint="0")}))


def test_a_diff_tells_symmetry_which_alone_changes_bytes(files, scores):
    one, other = (allocate(files, scores, Request("9bits", symmetric={8: symmetric})) for symmetric in (True, False))
    found = diff(one, other)
    assert {each.bits for each in found} == {(8, 8)}
    assert {each.symmetric for each in found} == {(True, False)}
    assert sum(each.disk_bytes[1] - each.disk_bytes[0] for each in found) == (
        other.budget.disk_bytes - one.budget.disk_bytes
    )


@pytest.mark.parametrize("allocation", ["monotone", "knapsack"])
def test_the_budget_that_gives_a_unit_more_does_and_a_byte_less_does_not(files, scores, allocation):
    plan = allocate(files, scores, Request("5.5bits", allocation))
    unit = scores.ranking[-1]
    [found] = explain(plan, unit)
    assert found.rank == files.layers - 1
    assert found.units == files.layers

    def at(size):
        return bits_of(allocate(files, scores, Request(f"{size}B", allocation)), unit)

    assert found.more_bits > max(found.matrices.values())
    assert at(found.more_bits_at) == {found.more_bits}
    assert at(found.more_bits_at - 1) == set(found.matrices.values())


def test_a_byte_less_changes_what_the_allocation_would_take_first(files, scores):
    plan = allocate(files, scores, Request("6.5bits"))
    smaller = allocate(files, scores, Request(f"{plan.budget.disk_bytes - 1}B"))
    changed = explain(plan, "1")[0].one_byte_less
    assert changed
    assert {unit: then for unit, _, then in changed} == {unit: max(bits_of(smaller, unit)) for unit, _, _ in changed}
    assert {n for each in diff(plan, smaller) for n in [each.name]} == {
        name for name in plan.matrices if any(name.startswith(f"{unit}.") for unit, _, _ in changed)
    }


def test_a_layer_of_a_finer_plan_is_all_its_units_and_a_matrix_is_its_unit(files):
    fine = baseline(files, "random", granularity="module")
    plan = allocate(files, fine, Request("6bits", "knapsack", granularity="module"))
    assert len(explain(plan, "1")) == 7
    assert [each.unit for each in explain(plan, "layers.1.mlp.down_proj")] == [f"{LAYER}.mlp.down_proj"]
    with pytest.raises(ValueError, match=r"no '9'.*named like model\.layers\.0"):
        explain(plan, "9")


def test_gains_are_the_scorers_own_costs_where_the_plan_was_made_from_them(files, scores):
    units = tuple(
        UnitScore(unit=entry.unit, score=place, stderr=0.5, costs={4: 1.0 + place, 8: 0.1})
        for place, entry in enumerate(scores.units)
    )
    costly = scores.model_copy(update={"units": units, "cost_unit": "nats"})
    plan = allocate(files, costly, Request("6bits", "knapsack"))
    [without] = explain(plan, "0")
    assert without.up is None
    assert "give --scores" in without.note
    [found] = explain(plan, "0", costly)
    assert (found.up.bits, found.up.cost) == (8, pytest.approx(-0.9))
    assert found.stderr == 0.5
    assert found.up.per_byte == pytest.approx(0.9 / found.up.disk_bytes)
    with pytest.raises(ValueError, match="give the file it was made from"):
        explain(plan, "0", baseline(files, "edges"))
    with pytest.raises(ValueError, match="by module, the plan was made from some by layer"):
        explain(plan, "0", costly.model_copy(update={"granularity": "module"}))


def test_a_measured_cost_stands_beside_the_one_that_was_used(files, scores):
    units = tuple(
        UnitScore(unit=entry.unit, score=0, costs={4: 1.0, 8: -0.2}, cost_stderrs={4: 0.1, 8: 0.3})
        for entry in scores.units
    )
    costly = scores.model_copy(update={"units": units, "cost_unit": "nats"})
    [found] = explain(allocate(files, costly, Request("6bits", "knapsack")), "0", costly)
    assert [(c.bits, c.used, c.measured, c.stderr) for c in found.costs] == [
        (4, 1.0, 1.0, 0.1),
        (8, 0.0, -0.2, 0.3),
        (16, 0.0, None, None),
    ]


def test_a_uniform_plan_with_scores_is_explained_without_a_rank(files, scores):
    [found] = explain(allocate(files, scores, Request("9bits", "uniform")), "0")
    assert (found.why, found.rank) == (("uniform",), None)


def test_a_plan_that_was_edited_is_not_explained_by_budgets(files, scores):
    plan = allocate(files, scores, Request("6bits"))
    name = next(iter(plan.matrices))
    entry = plan.matrices[name]
    edited = plan.model_copy(
        update={"matrices": {**plan.matrices, name: MatrixPlan(**entry.model_dump() | {"bits": 16, "symmetric": True})}}
    )._with_sizes()
    assert "edited" in explain(edited, "0")[0].note
