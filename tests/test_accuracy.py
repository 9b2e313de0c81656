"""The study of scorers: its offline evaluator gives what plain decoding gives, and its lines say what was measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import accuracy
from benchmarks.accuracy import STUDIES, Contender, Journal, Planned, Study, make_lines, must_hold
from benchmarks.offline import Evaluator, FakeQuantized, Items, input_energy
from benchmarks.peers import make_awq_checkpoints
from taq_vllm.allocate import Request, allocate
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


def test_clip_loses_less_of_what_the_inputs_weigh(files, task):
    energy = input_energy(files, task, 8)
    name = "model.layers.1.mlp.up_proj"
    weight = files.read(f"{name}.weight").float()
    losses = {}
    for method, importance in (("rtn", None), ("clip", energy)):
        error = FakeQuantized(files, SYMMETRIC, importance)(name, 3) - weight
        losses[method] = (error.square() * energy[name]).sum().item()
    assert losses["clip"] < losses["rtn"]


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
    """Uniform loses 20 points; `loss` is better than the random plans, `taqo` is as good, `kl` worse."""
    study = Study("plain", "rtn", budgets=("5.0bits",))
    journal = Journal(tmp_path_factory.mktemp("lines") / "evaluations.jsonl", {"test": "here"})
    planned = []

    def add(contender, place, items):
        bits = {f"model.layers.{layer}.mlp.up_proj": 8 if layer == place else 4 for layer in range(12)}
        matrices = {name: SimpleNamespace(bits=width) for name, width in bits.items()}
        budget = SimpleNamespace(planned_bytes=1000, average_bits=4.8)
        plan = SimpleNamespace(matrices=matrices, budget=budget)
        journal.add(bits, items)
        planned.append(Planned(contender, "5.0bits", plan))
        return bits

    full = dict.fromkeys([f"model.layers.{layer}.mlp.up_proj" for layer in range(12)], 16)
    journal.add(full, _items(190, 0.1, 0))
    for seed in range(4):
        add(Contender("random", settings={"seed": seed}), seed, _items(160, 0.5 + 0.01 * seed, seed))
    lowest = add(Contender("uniform", "uniform"), -1, _items(150, 0.6, 5))
    add(Contender("loss"), 4, _items(180, 0.3, 6))
    add(Contender("taqo"), 5, _items(161, 0.515, 7))
    add(Contender("kl"), 6, _items(140, 0.7, 8))
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
    loss = _of(lines, "loss")
    assert loss["metric_to_random"][0] == pytest.approx(0.1)
    assert loss["metric_to_full"][0] == pytest.approx(-0.05)
    assert loss["metric_to_lowest"][0] == pytest.approx(0.15)
    for name in accuracy.QUANTITIES:
        assert accuracy.better(loss, name, "random") == 1
        assert accuracy.better(_of(lines, "taqo"), name, "random") == 0
        assert accuracy.better(_of(lines, "kl"), name, "random") == -1


def test_what_must_hold_names_the_winners_and_falls_without_them(lines):
    [sentence] = must_hold(lines)
    assert sentence.count("holds, loss*") == 3
    [sentence] = must_hold([line for line in lines if line["contender"] != "loss"])
    assert sentence.count("DOES NOT HOLD") == 3
    assert "taqo" not in sentence


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests_and_keeps_the_order():
    assert accuracy.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert accuracy.holm([0.5, 0.6]) == [1.0, 1.0]


def test_where_uniform_does_not_lose_nothing_must_hold(lines):
    uniform = _of(lines, "uniform")
    changed = [line | {"metric_to_full": [-0.01, -0.03, 0.01, 0.4]} if line is uniform else line for line in lines]
    [sentence] = must_hold(changed)
    assert "metric: uniform 4-bit does not lose" in sentence


def test_the_table_shows_every_contender_and_marks_who_beats_random(lines):
    console = Console(width=400, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(accuracy.render(json.loads(json.dumps(lines)), "5.0bits"))
    text = console.export_text()
    rows = {row.split("│")[1].strip(): row for row in text.splitlines() if row.count("│") > 3}
    assert {"random", "uniform", "loss", "taqo", "kl"} <= rows.keys()
    assert rows["loss"].count("**") == 6
    assert "**" not in rows["taqo"]
    assert rows["kl"].count("(-)") == 3
    assert "seeds 80.0 to 80.0" in rows["random"]


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
    assert study.results.stat().st_size < 500_000
    found = accuracy.read_lines(study.name)
    assert {line["n"] for line in found} == {500}
    assert {line["task"] for line in found} == set(accuracy.TASKS)
    assert {line["seeds"] for line in found if line["contender"] == "random"} == {accuracy.SEEDS}
    assert len(must_hold(found)) == len(accuracy.TASKS) * len(study.budgets)
    for line in found:
        assert {"commit", "processor", "versions", "time"} <= line.keys()
        if line["budget"]:
            assert line["average_bits"] <= float(line["budget"].removesuffix("bits"))


def test_awq_reads_equal_shares_of_every_task_or_the_task_alone():
    tasks = accuracy.LAB / "tasks"
    mixed = make_awq_checkpoints.texts_of("awq-mixed", tasks, 30)
    own = make_awq_checkpoints.texts_of("awq-ot-code", tasks, 30)
    assert len(mixed) == len(own) == 30
    assert mixed[20:] == own[:10]
    example: Example = load_task(tasks / "code").calibration[0]
    assert own[0] == example.prompt + example.completion
