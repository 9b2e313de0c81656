"""The study of scorers: its offline evaluator gives what plain decoding gives, and its lines say what was measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import accuracy, accuracy_served, quantizers
from benchmarks.accuracy import STUDIES, Contender, Journal, Planned, Study, make_lines, must_hold
from benchmarks.offline import Evaluator, FakeQuantized, Items, input_moments
from benchmarks.peers import make_awq_checkpoints
from taq_vllm.allocate import Request, allocate
from taq_vllm.metrics import bootstrap_interval, paired_difference
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import SYMMETRIC
from taq_vllm.scoring import baseline
from taq_vllm.tasks import Example, load_task
from taq_vllm.units import layer_of
from tests.tiny_models import make_tiny

LAB_TASK = accuracy.LAB / "tasks" / "math"
NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """These tensors are small: a second thread costs more than it gives, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def task():
    """Prompts of different lengths. A random model's outputs are no reference completions."""
    lab = load_task(LAB_TASK)
    examples = tuple(
        replace(example, completion=example.completion[: 8 + 4 * i]) for i, example in enumerate(lab.test[:6])
    )
    return replace(lab, test=examples, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def evaluator(files, task):
    return Evaluator(files, task, FakeQuantized(files, SYMMETRIC))


def _plan(files, low, layers):
    return {name: low if layer_of(name) in layers else 16 for name in files.matrices}


def _naive_model(files, bits):
    """transformers' own model with the same weights."""
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    weights = FakeQuantized(files, SYMMETRIC)
    for name, width in bits.items():
        model.get_submodule(name).weight.data.copy_(weights(name, width))
    return model.eval(), AutoTokenizer.from_pretrained(files.path)


@pytest.mark.parametrize("low", [16, 8, 4, 3])
def test_outputs_are_those_of_plain_greedy_generation(files, task, evaluator, low):
    bits = _plan(files, low, {0, 2})
    model, tokenizer = _naive_model(files, bits)
    expected = []
    for example in task.test:
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        expected.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert evaluator.outputs(bits) == expected


@torch.inference_mode()
def test_nll_and_kl_are_those_of_plain_passes(files, task, evaluator):
    bits = _plan(files, 4, {1})
    (full, tokenizer), (model, _) = _naive_model(files, _plan(files, 16, set())), _naive_model(files, bits)
    found = evaluator(bits)
    for place, example in enumerate(task.test):
        prompt = tokenizer(example.prompt).input_ids
        answer = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        log_p, log_q = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (full, model))
        nll = -log_q[range(len(answer)), answer].sum().item()
        kl = (log_p.exp() * (log_p - log_q)).sum().item()
        # Both are float32; the passes differ in padding and in the order of sums.
        assert found.nll[place] == pytest.approx(nll, rel=1e-4)
        assert found.kl[place] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        assert evaluator.tokens[place] == len(answer)


def test_the_full_precision_model_generates_nothing_twice_and_has_no_divergence(evaluator):
    full = evaluator.full()
    assert full.generated == 0
    assert full.kl == pytest.approx([0.0] * 6, abs=1e-6)


def test_a_plan_that_shares_its_first_layers_with_the_last_gives_what_it_gives_alone(files, task, evaluator):
    plans = [_plan(files, 4, layers) for layers in ({0}, {0, 2}, {2}, {0})]
    in_turn = [evaluator(bits) for bits in plans]
    assert in_turn[0] == in_turn[3]
    alone = Evaluator(files, task, FakeQuantized(files, SYMMETRIC))(plans[1])
    assert in_turn[1] == alone


def test_gptq_loses_less_of_what_the_inputs_weigh(files, task):
    moments = input_moments(files, task, 8)
    name = "model.layers.1.mlp.up_proj"
    weight = files.read(f"{name}.weight").float()
    losses = {}
    for method, given in (("rtn", None), ("gptq", {name: moments[name].clone()})):
        error = FakeQuantized(files, SYMMETRIC, given)(name, 3) - weight
        losses[method] = ((error @ moments[name]) * error).sum().item()
    assert losses["gptq"] < losses["rtn"]


def test_gptq_here_gives_the_codes_of_the_method_on_full_precision_inputs(files, task, tmp_path):
    from taq_vllm.checkpoint import Calibration, quantize_model

    plan = allocate(files, None, Request("4.2bits", "uniform"))
    settings = {"sequential": False}
    calibration = Calibration(method="gptq", examples=8, inputs="full", settings=settings, batch_size=1)
    quantize_model(files, plan, tmp_path / "out", calibration, task, "cpu")
    weights = FakeQuantized(files, SYMMETRIC, input_moments(files, task, 8))
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    quantizers.load_weights(model, tmp_path / "out")
    for name in files.matrices:
        found = weights(name, 4)
        # Sums over tokens in another order: a few codes fall to the other side of a tie.
        assert (model.get_submodule(name).weight != found).float().mean() < 0.01


def test_a_task_with_stop_strings_is_refused(files, task):
    with pytest.raises(ValueError, match="no stop strings"):
        Evaluator(files, replace(task, stop=("\n",)), FakeQuantized(files, SYMMETRIC))


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [STUDIES["plain-rtn"], STUDIES["dense-rtn"]], ids=lambda study: study.name)
def test_plans_of_a_budget_have_the_same_bytes(study, tmp_path):
    lab = accuracy.model_of(study, tmp_path)
    for budget in study.budgets:
        sizes = []
        for granularity, allocation in (("layer", "monotone"), ("layer", "knapsack"), ("module", "knapsack")):
            scores = baseline(lab, "random", {"seed": 3}, granularity)
            request = Request(budget, allocation, granularity=granularity, menu=study.menu)
            sizes.append(allocate(lab, scores, request).budget.planned_bytes)
        assert sizes[0] == sizes[1]
        # Matrices fill what whole layers leave of the budget: less than one part in 300.
        assert sizes[0] * (1 - 1 / 300) < sizes[2] < sizes[0] * (1 + 1 / 300)


def test_every_scorer_stands_at_both_granularities_where_it_has_them():
    found = {(c.scorer, c.allocation, c.granularity) for c in accuracy.contenders(STUDIES["plain-rtn"])}
    for scorer in ("weight-error", *accuracy.PROOF):
        assert {(scorer, "monotone", "layer"), (scorer, "knapsack", "layer"), (scorer, "knapsack", "module")} <= found
    signs = {c.settings["stability_sign"] for c in accuracy.contenders(STUDIES["plain-rtn"]) if c.scorer == "taq"}
    assert signs == {-1, 1}


def test_names_of_contenders_are_all_different():
    study = STUDIES["dense-rtn"]
    everyone = accuracy.contenders(study) + accuracy.foreign_contenders(study, "math")
    assert len({contender.name for contender in everyone}) == len(everyone)


# Lines ---------------------------------------------------------------------------------------------------------------

N = 200


def _items(right, nll, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.01, N)
    return Items(
        metric=tuple((np.arange(N) < right).astype(float)),
        nll=tuple(nll + noise),
        kl=tuple(nll + np.abs(noise)),
        generated=0,
    )


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Uniform loses 20 points; `loss` is better than the random plans, `taqo` is as good, `kl` worse. Per matrix `loss`
    is worse than per layer, its plan for another task worst; taq's sign +1 is better than -1."""
    study = Study("plain", "rtn", budgets=("5.0bits",))
    journal = Journal(tmp_path_factory.mktemp("lines") / "evaluations.jsonl", {"test": "here"})
    planned = []

    def add(contender, place, items):
        bits = {f"model.layers.{layer}.mlp.up_proj": 8 if layer == place else 4 for layer in range(13)}
        matrices = {name: SimpleNamespace(bits=width) for name, width in bits.items()}
        budget = SimpleNamespace(planned_bytes=1000, average_bits=4.8)
        plan = SimpleNamespace(matrices=matrices, budget=budget)
        journal.add(bits, items)
        planned.append(Planned(contender, "5.0bits", plan))
        return bits

    full = dict.fromkeys([f"model.layers.{layer}.mlp.up_proj" for layer in range(13)], 16)
    journal.add(full, _items(190, 0.1, 0))
    for seed in range(4):
        add(Contender("random", settings={"seed": seed}), seed, _items(160, 0.5 + 0.01 * seed, seed))
    lowest = add(Contender("uniform", "uniform"), -1, _items(150, 0.6, 5))
    add(Contender("loss", "knapsack"), 4, _items(180, 0.3, 6))
    add(Contender("taqo", "knapsack"), 5, _items(161, 0.515, 7))
    add(Contender("kl", "knapsack"), 6, _items(140, 0.7, 8))
    add(Contender("loss", "knapsack", "module"), 7, _items(170, 0.4, 9))
    add(Contender("loss", "knapsack", task="code"), 8, _items(140, 0.6, 10))
    add(Contender("taq", settings={"stability_sign": -1}), 9, _items(150, 0.55, 11))
    add(Contender("taq", settings={"stability_sign": 1}), 10, _items(165, 0.45, 12))
    add(Contender("edges"), 11, _items(150, 0.6, 13))
    task = SimpleNamespace(name="math", metric="math")
    return make_lines(study, task, planned, journal, full, lowest, [2] * N)


def _of(lines, contender):
    [line] = [line for line in lines if line["contender"] == contender]
    return line


def test_lines_compare_with_the_mean_of_random_item_by_item(lines):
    random = _of(lines, "random")
    assert random["seeds"] == random["distinct_plans"] == 4
    assert random["metric"][0] == pytest.approx(0.8)
    # Two tokens an item: nats per token are half of the items' sums.
    assert random["nll"][0] == pytest.approx(0.515 / 2, abs=0.002)
    assert random["over_seeds"]["metric"] == [0.8] * 4
    loss = _of(lines, "loss (knapsack)")
    assert loss["metric_to_random"][0] == pytest.approx(0.1)
    assert loss["metric_to_full"][0] == pytest.approx(-0.05)
    assert loss["metric_to_lowest"][0] == pytest.approx(0.15)
    for name in accuracy.QUANTITIES:
        assert accuracy.better(loss, name, "random") == 1
        assert accuracy.better(_of(lines, "taqo (knapsack)"), name, "random") == 0
        assert accuracy.better(_of(lines, "kl (knapsack)"), name, "random") == -1


def test_what_must_hold_names_the_winners_and_falls_without_them(lines):
    [sentence] = must_hold(lines)
    assert sentence.count("holds, loss (knapsack) (1 of 1 variants better: loss (knapsack, per matrix))") == 3
    [sentence] = must_hold([line for line in lines if line["contender"] != "loss (knapsack)"])
    # A variant that wins does not make it hold.
    assert sentence.count("DOES NOT HOLD (1 of 1 variants better") == 3
    assert "taqo" not in sentence


def test_what_wins_alone_may_not_win_among_three(lines):
    """p 0.03 is below 0.05, and 0.09 is not."""
    raw = {"nll_to_random": [-0.1, -0.2, -0.01, 0.03]}
    changed = [line | raw if line["contender"] == "loss (knapsack)" else line for line in lines]
    assert accuracy.better(_of(changed, "loss (knapsack)"), "nll", "random") == 1
    [sentence] = must_hold(changed)
    assert "nll: DOES NOT HOLD" in sentence
    assert sentence.count("holds, loss (knapsack)") == 2


def test_every_contender_is_compared_with_what_it_is_a_variant_of(lines):
    per_matrix, foreign = _of(lines, "loss (knapsack, per matrix)"), _of(lines, "loss (knapsack, of code)")
    assert per_matrix["metric_to_layer"][0] == pytest.approx(-0.05)
    assert foreign["metric_to_own"][0] == pytest.approx(-0.2)
    assert _of(lines, "taq (stability_sign 1)")["metric_to_other_sign"][0] == pytest.approx(0.075)
    assert _of(lines, "kl (knapsack)")["metric_to_edges"][0] == pytest.approx(-0.05)
    assert not [key for key in _of(lines, "kl (knapsack)") if key.endswith(("_layer", "_own", "_other_sign"))]


def test_comparisons_say_who_is_better_by_how_much(lines):
    per_matrix, others, taq, signs = accuracy.comparisons(lines, "5.0bits")
    assert "per matrix against per layer" in per_matrix
    assert "metric: worse loss (knapsack, per matrix) -5.0 [" in per_matrix
    assert "metric: worse loss (knapsack, of code) -20.0 [" in others
    assert "better taq (stability_sign 1)" in taq
    assert "worse taq (stability_sign -1)" in taq
    assert "metric: better taq (stability_sign 1) +7.5 [" in signs
    same = [line | {"metric_to_layer": [0.0, -0.01, 0.01, 1.0]} for line in lines if "metric_to_layer" in line]
    assert "metric: 1 of 1 cannot be told" in accuracy.comparisons(same, "5.0bits")[0]


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests_and_keeps_the_order():
    assert accuracy.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert accuracy.holm([0.5, 0.6]) == [1.0, 1.0]


def test_where_uniform_does_not_lose_nothing_must_hold(lines):
    uniform = _of(lines, "uniform (the lowest bits)")
    changed = [line | {"metric_to_full": [-0.01, -0.03, 0.01, 0.4]} if line is uniform else line for line in lines]
    [sentence] = must_hold(changed)
    assert "metric: uniform 4-bit does not lose" in sentence
    assert "kl: holds" in sentence  # the NLL loses
    nothing = {"metric_to_full": [-0.01, -0.03, 0.01, 0.4], "nll_to_full": [0.01, -0.01, 0.03, 0.4]}
    [sentence] = must_hold([line | nothing if line is uniform else line for line in lines])
    # KL is above zero wherever anything changed: by itself it is no loss.
    assert uniform["kl"][1] > 0
    assert sentence.count("uniform 4-bit does not lose") == 3


def test_the_table_shows_every_contender_and_marks_who_beats_random(lines):
    console = Console(width=400, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(accuracy.render(json.loads(json.dumps(lines)), "5.0bits"))
    text = console.export_text()
    rows = {row.split("│")[1].strip(): row for row in text.splitlines() if row.count("│") > 3}
    knapsack = {name: rows[f"{name} (knapsack)"] for name in accuracy.PROOF}
    assert {"random", "edges", "taq (stability_sign 1)"} <= rows.keys()
    assert knapsack["loss"].count("**") == 6
    assert "**" not in knapsack["taqo"]
    assert knapsack["kl"].count("(-)") == 3
    assert "seeds 80.0 to 80.0" in rows["random"]


def test_marks_of_the_table_are_corrected_for_its_contenders(lines):
    judged = [line for line in lines if "scorer" in line]
    few = 0.04 / len(judged)
    for p, bold in ((few, True), (0.04, False)):
        raw, equal = {"nll_to_random": [-0.1, -0.2, -0.01, p]}, {"nll_to_random": [0.0, -0.1, 0.1, 1.0]}
        changed = [
            line | (raw if line["contender"] == "taqo (knapsack)" else equal) if line in judged else line
            for line in lines
        ]
        table = accuracy.render(changed, "5.0bits")
        cells = {str(column.header): list(column.cells) for column in table.columns}
        cell = cells["math NLL"][cells["contender"].index("taqo (knapsack)")]
        assert cell.startswith("**") == bold


def _bootstrap(n=300, seeds=20):
    return accuracy.Bootstrap([1] * n, seeds)


def test_one_level_is_the_bootstrap_over_items():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 9, 300)
    one, other = rng.gamma(2.0, size=300), rng.gamma(2.1, size=300)
    statistics = accuracy.Bootstrap(tokens, 20)
    measured = statistics.measure(one, "nll")
    expected = bootstrap_interval(one, tokens)
    # Both have 9999 draws of their own: limits differ by a few percent of the interval's width.
    assert measured.interval() == pytest.approx(expected, abs=0.05 * (expected.high - expected.low))
    paired = paired_difference(one, other, tokens)
    mean, low, high, p = measured.difference(statistics.measure(other, "nll"))
    assert mean == pytest.approx(paired.mean, rel=1e-4)
    assert (low, high) == pytest.approx((paired.low, paired.high), abs=0.05 * (paired.high - paired.low))
    assert p == pytest.approx(paired.p_value, abs=0.03)


@pytest.mark.parametrize(("of_seeds", "of_items"), [(0.3, 0.0), (0.0, 1.0), (0.1, 1.5), (0.3, 1.0)])
def test_two_levels_hold_the_variance_of_seeds_and_of_items(of_seeds, of_items):
    """Additive effects: the variance of the mean is s^2 / seeds + i^2 / items, which the draws must show."""
    rng = np.random.default_rng(1)
    seeds, n = 20, 300
    effects = rng.permutation(np.linspace(-1, 1, seeds)), rng.permutation(np.linspace(-1, 1, n))
    seed_effects, item_effects = (
        size * each / each.std() for size, each in zip((of_seeds, of_items), effects, strict=True)
    )
    values = seed_effects[:, None] + item_effects[None]
    measured = _bootstrap(n, seeds).measure(values, "nll")
    # 9999 draws know a variance to 1.4%, four times which is 6%.
    assert measured.draws.var() == pytest.approx(of_seeds**2 / seeds + of_items**2 / n, rel=0.06)
    assert measured.mean == pytest.approx(0, abs=1e-9)


def test_a_difference_that_every_item_shares_has_only_the_variance_of_seeds():
    rng = np.random.default_rng(2)
    items, seed_effects = rng.normal(0, 5, 300), np.linspace(-0.2, 0.2, 20)
    statistics = _bootstrap()
    random = statistics.measure(items + seed_effects[:, None], "nll")
    one = statistics.measure(items - 0.03, "nll")
    difference, low, high, p = one.difference(random)
    assert difference == pytest.approx(-0.03)
    spread = 1.96 * seed_effects.std() / 20**0.5
    assert (low, high) == pytest.approx((-0.03 - spread, -0.03 + spread), abs=0.1 * spread)
    assert p > 0.1  # 20 other seeds might have had a mean as low; resampling items alone would say p 0.0002


def _planned_random(seeds, widths):
    found = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(widths)
        bits = {f"model.layers.{layer}.mlp.{m}": int(b) for layer, b in enumerate(order) for m in ("up", "down")}
        matrices = {name: SimpleNamespace(bits=b) for name, b in bits.items()}
        plan = SimpleNamespace(matrices=matrices, budget=SimpleNamespace(planned_bytes=1, average_bits=4.5))
        found.append(Planned(Contender("random", settings={"seed": seed}), "4.5bits", plan))
    return found


def test_all_plans_of_random_are_the_arrangements_where_there_are_few():
    every = accuracy.all_of_random(_planned_random(20, [4] * 11 + [8]))
    assert len({tuple(bits.values()) for bits in every}) == len(every) == 12
    assert all(sorted(bits.values()) == [4] * 22 + [8] * 2 for bits in every)
    assert all(bits["model.layers.3.mlp.up"] == bits["model.layers.3.mlp.down"] for bits in every)
    assert {tuple(one.bits.values()) for one in _planned_random(20, [4] * 11 + [8])} <= {
        tuple(bits.values()) for bits in every
    }
    assert accuracy.all_of_random(_planned_random(20, [4] * 10 + [8] * 2)) == []  # 66
    assert accuracy.all_of_random(_planned_random(1, [4] * 7 + [8]) + _planned_random(1, [4] * 6 + [8] * 2)) == []


def test_the_exact_mean_stands_beside_the_seeds_and_is_compared_with(tmp_path):
    study = Study("plain", "rtn", budgets=("4.5bits",))
    planned = _planned_random(5, [4] * 11 + [8])
    journal = Journal(tmp_path / "evaluations.jsonl", {"test": "here"})
    names = list(planned[0].bits)
    full, lowest = dict.fromkeys(names, 16), dict.fromkeys(names, 4)
    for place, bits in enumerate([full, lowest, *accuracy.all_of_random(planned)]):
        journal.add(bits, _items(140 + place if place else 190, 0.1 * place, place))
    uniform = SimpleNamespace(
        matrices={name: SimpleNamespace(bits=4) for name in names},
        budget=SimpleNamespace(planned_bytes=0, average_bits=4.2),
    )
    planned.append(Planned(Contender("uniform", "uniform"), "4.5bits", uniform))
    task = SimpleNamespace(name="math", metric="math")
    made = make_lines(study, task, planned, journal, full, lowest, [1] * N)
    exact = _of(made, "random, all 12 plans")
    assert exact["plans"] == 12
    assert exact["metric"][0] == pytest.approx(np.mean([142 + i for i in range(12)]) / N, rel=1e-4)
    one = _of(made, "uniform (the lowest bits)")
    assert one["metric_to_all_random"][0] == pytest.approx(141 / N - exact["metric"][0], rel=1e-3)
    assert must_hold(made)[0].count("the exact mean, of all 12") == 1
    beaten = {f"{name}_to_all_random": [0.1 if name == "metric" else -0.1] * 3 + [1e-4] for name in accuracy.QUANTITIES}
    tied = {f"{name}_to_random": [0.0, -1.0, 1.0, 0.2] for name in accuracy.QUANTITIES}
    loss = one | beaten | tied | {"contender": "loss (knapsack)", "scorer": "loss", "allocation": "knapsack"}
    [sentence] = must_hold([*made, loss | {"planned_bytes": 1}])
    assert sentence.count("DOES NOT HOLD, but the exact mean is beaten by loss (knapsack)") == 3
    assert "random, all 12 plans" in list(accuracy.render(made, "4.5bits").columns[0].cells)


def test_without_studies_the_command_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["accuracy"])
    with pytest.raises(SystemExit) as stopped:
        accuracy.main()
    assert stopped.value.code == 2
    assert "conditioned-rtn" in capsys.readouterr().err.splitlines()[-1]


def test_a_journal_finds_what_it_holds_and_drops_half_a_line(tmp_path):
    path, bits = tmp_path / "evaluations.jsonl", {"a": 4, "b": 16}
    journal = Journal(path, {"test": "here"})
    journal.add(bits, _items(3, 0.1, 0))
    with path.open("a") as file:
        file.write('\n{"bits": "44", "met')
    again = Journal(path, {"test": "here"})
    assert again[bits] == _items(3, 0.1, 0)
    assert {"a": 4, "b": 4} not in again
    again.add({"a": 4, "b": 4}, _items(5, 0.2, 1))
    assert {"a": 4, "b": 4} in Journal(path, {"test": "here"})
    with pytest.raises(ValueError, match="delete it"):
        Journal(path, {"test": "elsewhere"})


@pytest.mark.parametrize("study", [study for study in STUDIES.values() if study.results.exists()], ids=lambda s: s.name)
def test_committed_lines_are_whole_and_small(study):
    assert study.results.stat().st_size < 700_000
    found = accuracy.read_lines(study.name)
    assert {line["n"] for line in found} == {500}
    assert {line["task"] for line in found} == set(accuracy.TASKS)
    assert {line["seeds"] for line in found if line["contender"] == "random"} == {accuracy.SEEDS}
    sentences = must_hold(found)
    assert len(sentences) == len(accuracy.TASKS) * len(study.budgets)
    print("\n".join(sentences))
    for line in found:
        assert {"commit", "aggregated_commit", "evaluations", "processor", "versions", "time"} <= line.keys()
        if line["budget"]:
            assert line["average_bits"] <= float(line["budget"].removesuffix("bits"))


def test_every_study_of_the_results_has_lines_and_its_verdict_stands_there():
    text = (accuracy.RESULTS / "README.md").read_text(encoding="utf-8")
    shown = {name for name in STUDIES if f"benchmarks.accuracy {name}`" in text or f"accuracy-{name}.jsonl" in text}
    for name in shown:
        assert STUDIES[name].results.exists(), f"results/README.md shows {name}, which has no committed lines"
        for sentence in must_hold(accuracy.read_lines(name)):
            assert sentence in text


def test_the_summary_divides_by_random_and_counts_who_beats_it(lines, monkeypatch):
    monkeypatch.setitem(STUDIES, "plain-rtn", Study("plain", "rtn", budgets=("4bits", "5.0bits")))
    monkeypatch.setattr(accuracy, "SUMMARY", ("loss (knapsack)", "kl (knapsack)", "not run"))
    monkeypatch.setattr(accuracy, "IN_POINTS", ("random", "loss (knapsack)", "not run"))
    shown = dict(zip(*(column.cells for column in accuracy.summary({"plain-rtn": lines}).columns), strict=True))
    ratio = _of(lines, "loss (knapsack)")["kl"][0] / _of(lines, "random")["kl"][0]
    assert shown["loss (knapsack)"] == f"{ratio:.2f} (1 below, 0 above)"
    assert shown["kl (knapsack)"].endswith("(0 below, 1 above)")
    assert shown["not run"] == "-"
    # 190 of 200 items are right in full precision, 160 with random, 180 with loss.
    lost = dict(zip(*(column.cells for column in accuracy.points({"plain-rtn": lines}).columns), strict=True))
    assert lost == {"random": "15.0", "loss (knapsack)": "5.0", "not run": "-"}


def test_the_summary_of_served_plans_marks_what_beats_its_rival_and_shows_gaps():
    head = {"benchmark": "accuracy-awq", "model": "plain", "n": 9, "weight_bytes": 1e6, "rival": None}
    full = [head | {"contender": accuracy_served.FULL, "task": task} for task in ("math", "code")]
    lost = {"metric_to_full": [-0.02, 0, 0, 0], "nll_to_full": [0.001, 0, 0, 0], "rival": "AWQ"}
    won = head | lost | {"contender": "ours", "task": "math", "nll_to_rival": [-0.1, -0.2, -0.05, 0]}
    table = accuracy_served.summary([*full, won])
    assert [list(column.cells) for column in table.columns] == [["ours"], ["1.00"], ["**2.0 / 1.00**"], ["-"]]


def test_the_summary_of_quantizers_is_of_one_number_of_examples():
    line = {"model": "lab", "task": "math", "bits": 4, "items": 9, "calibration_examples": 512}
    line |= {"closed": {"rtn": (0, 0, 0), "gptq": (0.61, 0.5, 0.7)}}
    table = quantizers.summary([line, line | {"calibration_examples": 128, "task": "code"}], 512)
    assert [column.header for column in table.columns] == ["method", "lab: math"]
    assert list(table.columns[1].cells) == ["61% [50, 70]"]


def test_a_plan_of_more_bytes_has_no_rival_among_the_baselines(monkeypatch, tmp_path):
    """Without quantizing: only labels, rivals and numbers of examples are looked at."""
    monkeypatch.setattr("taq_vllm.checkpoint.quantize_model", lambda *arguments, **settings: None)
    study = STUDIES["plain-rtn"]
    monkeypatch.setattr(accuracy_served, "scores_of", lambda _, files, *__: baseline(files, "random", {"seed": 0}))
    made = accuracy_served.make_ours(study, accuracy.model_of(study, tmp_path), "math", tmp_path)
    found = {served.label: (served.rival, served.examples) for served in made}
    assert found["kl per matrix, awq, own"] == (None, 128)
    assert found["uniform 4-bit, awq, own"] == ("AWQ-OT", 128)
    assert found["uniform 4-bit, awq, mixed"] == ("AWQ", 126)
    assert found["uniform 4-bit, rtn"] == ("AWQ-OT", None)


def test_a_quantizer_closes_half_by_estimate_and_by_its_interval():
    line = {"closed": {"rtn": (0.0, 0.0, 0.0), "gptq": (0.49, 0.4, 0.6), "learned": (0.55, 0.48, 0.6)}}
    assert quantizers.damage_holds(line) == {"gptq": (False, False), "learned": (True, False)}
    line = {"closed": {"rtn": (0.0, 0.0, 0.0), "gptq": (0.6, 0.5, 0.7)}}
    assert quantizers.damage_holds(line) == {"gptq": (True, True)}


def test_awq_reads_equal_shares_of_every_task_or_the_task_alone():
    tasks = accuracy.LAB / "tasks"
    mixed = make_awq_checkpoints.texts_of("awq-mixed", tasks, 30)
    own = make_awq_checkpoints.texts_of("awq-ot-code", tasks, 30)
    assert len(mixed) == len(own) == 30
    assert mixed[20:] == own[:10]
    example: Example = load_task(tasks / "code").calibration[0]
    assert own[0] == example.prompt + example.completion
    assert len(make_awq_checkpoints.texts_of("awq-mixed", tasks, 128)) == 126
