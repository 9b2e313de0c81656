import itertools
import json
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny

from taq_vllm.allocate import Problem, Request, _costs_of, _monotone, allocate
from taq_vllm.budget import Shapes
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import ModelRef, ScorerRef, weight_bytes
from taq_vllm.scores import Scores, UnitScore
from taq_vllm.scoring import baseline
from taq_vllm.units import experts_of, layer_of, units_of

LAYERS = 6


def write_model(folder, layers=LAYERS, columns=256):
    """A model folder of zeros: allocation reads headers only."""
    tensors = {"model.embed_tokens.weight": [64, 256], "model.norm.weight": [256]}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = [columns]
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = [256, columns]
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = [256, 512]
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(offset))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))
    return ModelFiles(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def scores_of(files, values):
    return Scores(
        model=files.ref,
        task={"name": "t", "data_sha256": "0", "examples": 2},
        scorer=ScorerRef(name="taq"),
        units=tuple(UnitScore(unit=f"model.layers.{i}", score=v, stderr=0.1) for i, v in enumerate(values)),
        seconds=0,
        peak_memory_bytes=0,
    )


def bits_by_layer(plan):
    return [plan.matrices[f"model.layers.{layer}.self_attn.q_proj"].bits for layer in range(LAYERS)]


def layers_in_order(scores):
    return [layer_of(unit) for unit in scores.ranking]


values = st.lists(st.floats(-3, 3), min_size=LAYERS, max_size=LAYERS)
budgets = st.floats(4.2, 16.0)


@given(values, budgets)
@settings(max_examples=60, deadline=None)
def test_monotone_never_exceeds_its_budget_and_never_inverts_the_ranking(files, scores, budget):
    plan = allocate(files, scores_of(files, scores), Request(f"{budget}bits"))
    assert plan.budget.average_bits <= budget
    in_rank_order = [bits_by_layer(plan)[layer] for layer in layers_in_order(scores_of(files, scores))]
    assert in_rank_order == sorted(in_rank_order, reverse=True)


@given(values, budgets)
@settings(max_examples=25, deadline=None)
def test_monotone_equals_brute_force(files, scores, budget):
    made = scores_of(files, scores)
    plan = allocate(files, made, Request(f"{budget}bits"))
    ranking = layers_in_order(made)

    def worth(bits):
        return sum((LAYERS - ranking.index(layer)) * (1 - 4.0 ** (4 - b)) for layer, b in enumerate(bits))

    def average(bits):
        total = sum(
            weight_bytes(bits[layer_of(name)], shape, symmetric=bits[layer_of(name)] != 4)
            for name, shape in files.matrices.items()
        )
        return 8 * total / sum(rows * columns for rows, columns in files.matrices.values())

    feasible = [
        bits
        for bits in itertools.product((4, 8, 16), repeat=LAYERS)
        if average(bits) <= budget and all(bits[a] >= bits[b] for a, b in itertools.pairwise(ranking))
    ]
    assert worth(bits_by_layer(plan)) == pytest.approx(max(map(worth, feasible)), abs=1e-12)


@given(values, budgets, budgets)
@settings(max_examples=25, deadline=None)
def test_a_larger_budget_never_buys_less(files, scores, one, other):
    small, large = sorted((one, other))
    made = scores_of(files, scores)
    worth = [
        sum(
            (LAYERS - layers_in_order(made).index(layer)) * (1 - 4.0 ** (4 - b))
            for layer, b in enumerate(bits_by_layer(allocate(files, made, Request(f"{budget}bits"))))
        )
        for budget in (small, large)
    ]
    assert worth[0] <= worth[1] + 1e-12


def test_sixteen_bits_appear_only_when_every_layer_has_eight(files):
    plan = allocate(files, scores_of(files, range(LAYERS)), Request("8.0bits"))
    assert 16 not in bits_by_layer(plan)


def test_a_budget_in_bytes_counts_everything_on_disk(files):
    plan = allocate(files, scores_of(files, range(LAYERS)), Request("900kB"))
    assert plan.budget.disk_bytes <= 900_000
    assert plan.budget.disk_bytes == plan.budget.planned_bytes + files.bytes_beside(files.matrices)
    assert plan.budget.planned_bytes == sum(m.disk_bytes for m in plan.matrices.values())


def test_the_error_of_a_budget_too_small_names_one_that_works(files):
    made = scores_of(files, range(LAYERS))
    with pytest.raises(ValueError, match="below the smallest") as error:
        allocate(files, made, Request("4.0bits"))
    smallest = str(error.value).split(": ")[1].split()[0]
    assert set(bits_by_layer(allocate(files, made, Request(smallest)))) == {4}
    in_bytes = str(error.value).split(" or ")[1].split(".")[0]
    assert set(bits_by_layer(allocate(files, made, Request(in_bytes)))) == {4}


def test_a_budget_above_full_precision_is_refused(files):
    with pytest.raises(ValueError, match="above the full-precision model"):
        allocate(files, scores_of(files, range(LAYERS)), Request("16.5bits"))


def test_of_several_limits_only_all_together_can_be_above_full_precision(files):
    made = scores_of(files, range(LAYERS))
    for budget in ("6bits,100GiB", "100GiB,6bits"):
        assert allocate(files, made, Request(budget)).matrices == allocate(files, made, Request("6bits")).matrices
    with pytest.raises(ValueError, match="above the full-precision model"):
        allocate(files, made, Request("16.5bits,100GiB"))


@pytest.mark.parametrize("budget", ["5", "5 bit", "bits", "-1bits", "4.2GiBs", "1e3MB"])
def test_a_budget_without_a_known_unit_is_refused(files, budget):
    with pytest.raises(ValueError, match=r"5\.0bits"):
        allocate(files, scores_of(files, range(LAYERS)), Request(budget))


def test_paper_shares_are_fifteen_and_forty_five_percent_of_the_layers_that_are_not_edges(tmp_path):
    files = write_model(tmp_path, layers=32)
    made = Scores(**(scores_of(files, range(32)).model_dump()))
    plan = allocate(files, made, Request("10bits", allocation="paper", edges=2))
    bits = [plan.matrices[f"model.layers.{layer}.mlp.down_proj"].bits for layer in range(32)]
    assert bits[:2] == bits[-2:] == [16, 16]
    assert sorted(bits[2:-2]) == [4] * 11 + [8] * 13 + [16] * 4
    # 8.65 bits before scales: with them the shares of 4 and 8 bits cost 4.156 and 8.125
    assert plan.budget.average_bits == pytest.approx((8 * 16 + 13 * 8.125 + 11 * 4.15625) / 32, abs=0.01)


def test_paper_over_its_budget_is_an_error_not_a_larger_plan(files):
    with pytest.raises(ValueError, match="below the smallest"):
        allocate(files, scores_of(files, range(LAYERS)), Request("5bits", allocation="paper", edges=2))


def test_uniform_takes_the_most_bits_that_fit(files):
    assert set(bits_by_layer(allocate(files, None, Request("8.2bits", allocation="uniform")))) == {8}
    assert set(bits_by_layer(allocate(files, None, Request("8.0bits", allocation="uniform")))) == {4}
    assert {m.why for m in allocate(files, None, Request("8bits", allocation="uniform")).matrices.values()} == {
        "uniform"
    }


def test_edges_and_pins_win_over_scores_and_pins_over_edges(files):
    request = Request(
        "9bits", edges=1, edge_bits=8, pins=("layers.0=16", "layers.5.mlp.down_proj=4", "re:.*4.*q_proj=16")
    )
    plan = allocate(files, scores_of(files, [0] * LAYERS), request)
    matrices = plan.matrices
    assert matrices["model.layers.0.self_attn.q_proj"].bits == 16
    assert matrices["model.layers.0.self_attn.q_proj"].why == "pinned"
    assert matrices["model.layers.5.self_attn.q_proj"].bits == 8
    assert matrices["model.layers.5.self_attn.q_proj"].why == "edge"
    assert matrices["model.layers.5.mlp.down_proj"].bits == 4
    assert matrices["model.layers.4.self_attn.q_proj"].why == "pinned"


@pytest.mark.parametrize("pin", ["layers.0=5", "layers.0", "=8", "layers.99=8", "re:(=8", "layers.0=eight"])
def test_a_pin_that_is_malformed_or_matches_nothing_is_refused(files, pin):
    with pytest.raises(ValueError, match="pin"):
        allocate(files, scores_of(files, range(LAYERS)), Request("9bits", pins=(pin,)))


def test_experts_of_a_block_are_pinned_together(tmp_path):
    files = ModelFiles(make_tiny("qwen3_moe", tmp_path / "mixture", num_hidden_layers=2))
    request = Request("9bits", pins=("layers.0.mlp.experts.3.up_proj=8",))
    plan = allocate(files, baseline(files, "random"), request)
    plan.check_served("the plan")
    of_first = [entry for name, entry in plan.matrices.items() if experts_of(name) == "model.layers.0.mlp.experts"]
    assert len(of_first) == 3 * 8
    assert all((entry.bits, entry.why) == (8, "pinned") for entry in of_first)
    unlike = replace(request, pins=(*request.pins, "layers.0.mlp.experts.4.up_proj=4"))
    with pytest.raises(ValueError, match=r"one layer to a server: pin them alike$"):
        allocate(files, baseline(files, "random"), unlike)
    entry = of_first[0].model_copy(update={"bits": 4})
    edited = plan.model_copy(update={"matrices": plan.matrices | {"model.layers.0.mlp.experts.7.up_proj": entry}})
    with pytest.raises(ValueError, match="all experts of a block have one format"):
        edited.check_served("the plan")
    with pytest.raises(ValueError, match="budget in ms counts every matrix"):
        allocate(files, baseline(files, "random"), Request("9ms@batch=1"))


def test_a_pin_on_layer_1_does_not_catch_layer_10(tmp_path):
    files = write_model(tmp_path, layers=11)
    plan = allocate(files, baseline(files, "random"), Request("9bits", pins=("layers.1=16",)))
    pinned = {layer_of(name) for name, m in plan.matrices.items() if m.why == "pinned"}
    assert pinned == {1}


def test_matrices_that_do_not_divide_into_groups_stay_at_16_bits_and_say_so(tmp_path):
    files = write_model(tmp_path, columns=200)
    plan = allocate(files, baseline(files, "random"), Request("12bits"))
    assert {m.bits for n, m in plan.matrices.items() if "q_proj" in n} == {16}
    assert {m.why for n, m in plan.matrices.items() if "q_proj" in n} == {"shape"}
    with pytest.raises(ValueError, match="200 in-features, which 128 does not divide"):
        allocate(files, baseline(files, "random"), Request("12bits", pins=("q_proj=4",)))


def test_scores_of_another_model_are_refused(files):
    made = scores_of(files, range(LAYERS)).model_copy(update={"model": ModelRef(id="other", fingerprint="0")})
    with pytest.raises(ValueError, match="made for other"):
        allocate(files, made, Request("5bits"))


def test_random_depends_on_its_seed_alone_and_edges_starts_at_the_ends(files):
    assert baseline(files, "random", {"seed": 1}).ranking == baseline(files, "random", {"seed": 1}).ranking
    assert any(
        baseline(files, "random", {"seed": 0}).ranking != baseline(files, "random", {"seed": seed}).ranking
        for seed in range(1, 4)
    )
    assert layers_in_order(baseline(files, "edges")) == [0, 5, 1, 4, 2, 3]


def test_ties_and_noise_are_ordered_by_the_tiebreak():
    layers = [UnitScore(unit=f"model.layers.{i}", score=0.0, tiebreak=t) for i, t in enumerate([0.1, 0.3, 0.2])]
    layers += [
        UnitScore(unit="model.layers.3", score=0.9, from_zero=False),
        UnitScore(unit="model.layers.4", score=0.1),
    ]
    made = Scores(
        model=ModelRef(id="m", fingerprint="0"),
        task=None,
        scorer=ScorerRef(name="taqo"),
        units=tuple(layers),
        seconds=0,
        peak_memory_bytes=0,
    )
    assert layers_in_order(made) == [4, 1, 2, 0, 3]


def costed(files, granularity, **costs):
    """Scores with costs of a 4-bit unit by the order of units."""
    made = baseline(files, "random", granularity=granularity)
    units = tuple(
        entry.model_copy(update={"costs": {4: 1.0 + place} | costs}) for place, entry in enumerate(made.units)
    )
    return made.model_copy(update={"units": units, "cost_unit": "nats"})


@pytest.mark.parametrize(("scored", "planned"), list(itertools.product(("layer", "module"), repeat=2)))
def test_plans_of_any_granularity_are_made_from_scores_of_any(files, scored, planned):
    plan = allocate(files, costed(files, scored), Request("6bits", "knapsack", granularity=planned))
    assert plan.budget.average_bits <= 6
    assert plan.allocation.granularity == planned
    if planned == "layer":
        assert all(
            plan.matrices[f"model.layers.{i}.self_attn.q_proj"].bits
            == plan.matrices[f"model.layers.{i}.mlp.down_proj"].bits
            for i in range(LAYERS)
        )


def test_costs_are_completed_by_a_factor_of_four_a_bit_and_never_negative_or_rising():
    entry = UnitScore(unit="u", score=0, costs={4: 1.6, 8: -0.5})
    assert _costs_of(entry, (3, 4, 5, 8, 16)) == {16: 0.0, 8: 0.0, 5: 0.4, 4: 1.6, 3: 6.4}
    assert _costs_of(UnitScore(unit="u", score=0, costs={4: 0.1, 8: 0.2}), (4, 8)) == {8: 0.2, 4: 0.2}


@given(values, st.sampled_from([(3, 4, 8), (2, 4), (2, 3, 4, 8), (8,)]), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_any_menu_is_spent_in_rank_order_as_brute_force_does(files, scores, menu, share):
    """Budgets from the menu's smallest plan up to its largest."""
    made = scores_of(files, scores)
    ranking = layers_in_order(made)

    first = [shape for name, shape in files.matrices.items() if layer_of(name) == 0]  # layers are alike
    of_layer = {bits: sum(weight_bytes(bits, shape, symmetric=bits >= 8) for shape in first) for bits in menu}
    beside = files.bytes_beside(files.matrices)

    def size(bits):
        return beside + sum(of_layer[each] for each in bits)

    def worth(bits):
        return sum((LAYERS - ranking.index(layer)) * (1 - 4.0 ** (menu[0] - b)) for layer, b in enumerate(bits))

    low, high = size([menu[0]] * LAYERS), size([menu[-1]] * LAYERS)
    budget = low + int(share * (high - low))
    plan = allocate(files, made, Request(f"{budget}B", menu=menu))
    bits = bits_by_layer(plan)
    feasible = [
        each
        for each in itertools.product(menu, repeat=LAYERS)
        if all(each[a] >= each[b] for a, b in itertools.pairwise(ranking)) and size(each) <= budget
    ]
    assert plan.budget.disk_bytes == size(bits) <= budget
    assert worth(bits) == pytest.approx(max(map(worth, feasible)), abs=1e-12)
    if len(menu) == 2 and 0.2 < share < 0.8:  # of three, all may have the middle one
        assert len(set(bits)) > 1


def test_four_levels_of_a_large_models_matrices_take_a_second():
    """About 25 million cut points. Processor time, and ten times what it takes: the machine may be a slow one."""
    random = np.random.default_rng(0)
    uses = np.cumsum(random.integers(1, 10**6, (230, 4, 1)), axis=1)
    costs = np.arange(230, 0, -1.0)[:, None] * 4.0 ** -np.arange(4)
    limit = (0.5 * uses[:, 0].sum(axis=0) + 0.5 * uses[:, -1].sum(axis=0)).astype(np.int64)
    start = time.process_time()
    choices = _monotone(costs, uses, limit)
    assert time.process_time() - start < 10
    assert len(set(choices.tolist())) > 1


def attention(folder):
    return ModelFiles(make_tiny("qwen3", folder, num_hidden_layers=4))


@pytest.mark.parametrize("granularity", ["module", "fused"])
def test_uniform_fused_gives_a_fused_layer_one_bitwidth_also_where_a_part_is_pinned_or_at_an_edge(
    tmp_path, granularity
):
    files = attention(tmp_path)
    request = Request(
        "8bits",
        "knapsack",
        granularity=granularity,
        uniform_fused=True,
        edges=1,
        edge_bits=8,
        pins=("layers.0.self_attn.k_proj=16", "layers.2.mlp.up_proj=4"),
    )
    plan = allocate(files, baseline(files, "random", granularity="module"), request)
    for names in units_of(plan.matrices, "fused").values():
        assert len({plan.matrices[name].bits for name in names}) == 1, names
    assert plan.matrices["model.layers.0.self_attn.q_proj"].bits == 16
    assert plan.matrices["model.layers.0.mlp.up_proj"].bits == 8
    assert plan.matrices["model.layers.2.mlp.gate_proj"].bits == 4
    assert len({m.bits for m in plan.matrices.values() if m.why == "baseline"}) > 1
    unlike = replace(request, pins=("q_proj=16", "k_proj=8"))
    with pytest.raises(ValueError, match="one layer to a server: pin them alike"):
        allocate(files, baseline(files, "random", granularity="module"), unlike)


def with_costs(files, granularity, costs):
    """Scores whose units cost what `costs` says of their names."""
    made = baseline(files, "random", granularity=granularity)
    units = tuple(entry.model_copy(update={"costs": costs(entry.unit)}) for entry in made.units)
    return made.model_copy(update={"units": units, "cost_unit": "nats"})


def costs_of(files, scores, **request):
    problem = Problem(Shapes.of_files(files, head=False), scores, Request("16bits", "knapsack", **request))
    return {
        unit: dict(zip((4, 8, 16), row, strict=True)) for unit, row in zip(problem.free, problem.costs, strict=True)
    }


def test_costs_of_finer_scores_are_added_and_of_coarser_ones_shared_by_weights(files):
    # A layer has q_proj of 256 x 256 weights and down_proj of 256 x 512: a third and two thirds.
    fine = with_costs(files, "module", lambda unit: {4: 3.0, 8: 1.0} if "q_proj" in unit else {4: 6.0, 8: 0.5})
    assert costs_of(files, fine, granularity="layer")["model.layers.1"] == {4: 9.0, 8: 1.5, 16: 0.0}
    coarse = with_costs(files, "layer", lambda unit: {4: 9.0, 8: 1.5})
    shared = costs_of(files, coarse, granularity="module")
    assert shared["model.layers.1.self_attn.q_proj"] == pytest.approx({4: 3.0, 8: 0.5, 16: 0.0})
    assert shared["model.layers.1.mlp.down_proj"] == pytest.approx({4: 6.0, 8: 1.0, 16: 0.0})


def test_a_pinned_part_takes_its_costs_along(files):
    pins = ("layers.1.mlp.down_proj=16",)
    fine = with_costs(files, "module", lambda unit: {4: 3.0, 8: 1.0} if "q_proj" in unit else {4: 6.0, 8: 0.5})
    assert costs_of(files, fine, pins=pins, granularity="layer")["model.layers.1"] == {4: 3.0, 8: 1.0, 16: 0.0}
    coarse = with_costs(files, "layer", lambda unit: {4: 9.0, 8: 1.5})
    by_layer = costs_of(files, coarse, pins=pins, granularity="layer")
    assert by_layer["model.layers.1"] == pytest.approx({4: 3.0, 8: 0.5, 16: 0.0})
    assert by_layer["model.layers.2"] == {4: 9.0, 8: 1.5, 16: 0.0}


def test_what_is_not_asked_for_follows_from_the_scores(files):
    ranks = scores_of(files, range(LAYERS))
    measured = with_costs(files, "module", lambda unit: {4: 1.0})
    for scores, allocation in ((ranks, ("monotone", "layer")), (measured, ("knapsack", "module"))):
        made = allocate(files, scores, Request("9bits")).allocation
        assert (made.name, made.granularity) == allocation
        asked = allocate(files, scores, Request("9bits", "monotone", granularity="fused")).allocation
        assert (asked.name, asked.granularity) == ("monotone", "fused")


def test_uniform_with_scores_says_so_and_ranks_nobody(files):
    plan = allocate(files, scores_of(files, range(LAYERS)), Request("9bits", "uniform"))
    assert {(m.why, m.rank) for m in plan.matrices.values()} == {("uniform", None)}


def test_a_head_that_is_not_scored_is_refused_and_a_pinned_one_is_planned(files):
    with pytest.raises(ValueError, match=r"taq cannot score it: choose another scorer.*--pin lm_head=8"):
        allocate(files, scores_of(files, range(LAYERS)), Request("6bits", head=True))
    for pin in ("lm_head=8", "re:.*lm_head=8"):
        plan = allocate(files, scores_of(files, range(LAYERS)), Request("6bits", pins=(pin,)))
        assert (plan.matrices["lm_head"].bits, plan.matrices["lm_head"].why) == (8, "pinned")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("6bits", menu=(4, 9)), "got menu 4, 9"),
        (Request("6bits", menu=(2, 3, 4, 5, 8)), "--allocation knapsack"),
        (Request("6bits", "paper", menu=(3, 4, 8)), "'paper' gives 4, 8, 16"),
        (Request("6bits", granularity="row"), "got granularity 'row'"),
        (Request("6bits", edges=4), "4 edge layers"),
    ],
)
def test_requests_that_no_model_can_answer_are_refused(files, request_, said):
    with pytest.raises(ValueError, match=said):
        allocate(files, baseline(files, "edges"), request_)
