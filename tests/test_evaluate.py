import json
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import LAB_MODEL

from taq_vllm.evaluate import Engine, Result, append_result, compare, compare_labels, evaluate, read_results
from taq_vllm.tasks import load_task

TASKS = LAB_MODEL.parent / "tasks"
# float32, so that transformers and vLLM can be held against each other without bf16 noise.
ENGINE = {"enforce_eager": True, "dtype": "float32", "max_model_len": 384}


def result(label="a", scores=(1.0, 0.0, 1.0, 1.0), nll=(1.0, 2.0, 0.5, 4.0), **changes):
    n = len(scores)
    fields = {
        "key": f"key of {label}",
        "label": label,
        "model": "m",
        "model_sha256": "0",
        "plan_sha256": None,
        "average_bits": None,
        "weight_bytes": 10,
        "task": "trivia",
        "test_sha256": "1",
        "metric": "em",
        "n": n,
        "mean": sum(scores) / n,
        "low": 0.0,
        "high": 1.0,
        "interval": "wilson",
        "answer_nll": sum(nll) / (2 * n),
        "answer_nll_low": 0.0,
        "answer_nll_high": 5.0,
        "output_tokens": 7,
        "generation_s": 0.5,
        "output_tokens_per_s": 14.0,
        "settings": {
            "quantization": None,
            "engine_args": {"enforce_eager": True},
            "limit": None,
            "seed": 0,
            "max_new_tokens": 4,
            "stop": ("\n",),
            "chat_template": False,
        },
        "versions": {"vllm": "0"},
        "hardware": "none",
        "started_at": "2025-01-01T00:00:00+00:00",
        "item_ids": tuple(str(i) for i in range(n)),
        "item_scores": scores,
        "item_nll": nll,
        "item_tokens": (2,) * n,
        "outputs": tuple(f"output\n\u2028{i}" for i in range(n)),
    }
    return Result(**(fields | changes))


def test_results_come_back_from_the_file_as_they_were(tmp_path):
    file = tmp_path / "new" / "results.jsonl"
    written = [result("a"), result("b", scores=(0.25, 1 / 3, 0.0, 1.0), metric="f1")]
    for one in written:
        append_result(file, one)
    assert read_results(file) == written
    assert file.read_bytes().count(b"\n") == 2


def test_writers_at_the_same_time_do_not_mix_their_lines(tmp_path):
    file = tmp_path / "results.jsonl"
    long = result("long", outputs=("x" * 200_000, "", "", ""))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: append_result(file, long), range(16)))
    assert read_results(file) == [long] * 16


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_it(tmp_path):
    file = tmp_path / "results.jsonl"
    append_result(file, result("a"))
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="only 100 of"):
            append_result(file, result("b"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before


@pytest.mark.parametrize("line", ['{"version": 1, "key": "x"', '{"version": 1}', ""])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    file = tmp_path / "results.jsonl"
    append_result(file, result())
    with file.open("a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 2, .*remove the line, or name another"):
        read_results(file)


def test_compare_pairs_the_items():
    paired = compare(result("a", (1.0, 1.0, 1.0, 0.0)), result("b", (0.0, 0.0, 1.0, 1.0)))
    assert (paired.mean, paired.better, paired.worse, paired.n) == (0.25, 2, 1, 4)


def test_compare_of_nll_weighs_items_by_their_tokens():
    one = result("a", nll=(3.0, 1.0, 1.0, 1.0), item_tokens=(1, 1, 1, 3))
    other = result("b", nll=(1.0, 1.0, 1.0, 2.0), item_tokens=(1, 1, 1, 3))
    assert compare(one, other, "nll").mean == pytest.approx((6 - 5) / 6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "math"}, "a and b cannot be compared: task is 'trivia' in one and 'math' in the other"),
        ({"metric": "f1"}, "metric is 'em' in one and 'f1'"),
        ({"test_sha256": "2"}, "test_sha256 is '1' in one and '2'"),
        ({"item_ids": ("0", "1", "2", "9")}, "they answered 4 and 4 items, 3 of them the same"),
    ],
)
def test_results_on_different_items_cannot_be_compared(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        compare(result("a"), result("b", **changes))


def test_nll_per_token_of_different_tokens_cannot_be_compared():
    with pytest.raises(ValueError, match="split the answers into different tokens"):
        compare(result("a"), result("b", item_tokens=(2, 2, 2, 3)), "nll")


def test_what_cannot_be_evaluated_is_refused_before_an_engine_starts(tmp_path):
    trivia, code = load_task(TASKS / "trivia"), load_task(TASKS / "code")
    with pytest.raises(ValueError, match="--allow-code-execution"):
        evaluate(LAB_MODEL, code)
    with pytest.raises(ValueError, match="got limit 0; needs at least 1"):
        evaluate(LAB_MODEL, trivia, limit=0)
    with pytest.raises(ValueError, match="names no test set; add"):
        evaluate(LAB_MODEL, load_task(TASKS / "trivia" / "calibration.jsonl"))
    with pytest.raises(ValueError, match=r"config.json|no model at"):
        evaluate(tmp_path, trivia)
    file = tmp_path / "results.jsonl"
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        evaluate(LAB_MODEL, trivia, results=file)


LIMIT = 16


@pytest.fixture(scope="module")
def expected():
    """Per task and item: (NLL of the completion, its tokens, greedy text) by transformers in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # the model is tiny; a second thread only waits
    model = AutoModelForCausalLM.from_pretrained(LAB_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    found = {}
    for name in ("trivia", "math", "code"):
        task = load_task(TASKS / name)
        found[name] = []
        for place, example in enumerate(task.test[:LIMIT]):
            prompt = tokenizer(example.prompt, return_tensors="pt").input_ids
            completion = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.inference_mode():
                logits = model(torch.cat([prompt, torch.tensor([completion])], 1)).logits[0, prompt.shape[1] - 1 : -1]
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
            text = None
            if place < 3:
                output = model.generate(prompt, max_new_tokens=task.max_new_tokens, do_sample=False)
                text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            found[name].append((nll, len(completion), text))
    return found


@pytest.fixture(scope="module")
def measured(expected, tmp_path_factory):
    """The lab model on the first items of its three tasks, by one engine, and the results file.

    `expected` comes first: once an engine has started, vLLM holds torch's number of threads.
    """
    file = tmp_path_factory.mktemp("results") / "results.jsonl"
    found = {}
    with Engine(LAB_MODEL, engine_args=ENGINE) as engine:
        for name in ("trivia", "math", "code"):
            found[name], fresh = engine.evaluate(
                load_task(TASKS / name), limit=LIMIT, allow_code_execution=True, label="plain", results=file
            )
            assert fresh
    return found, file


@pytest.mark.engine
@pytest.mark.parametrize("name", ["trivia", "math", "code"])
def test_outputs_and_answer_nll_are_those_of_transformers(expected, measured, name):
    found = measured[0][name]
    for place, (nll, tokens, text) in enumerate(expected[name]):
        # Both sum float32 in different orders: about 1e-5 per token, at most 90 tokens.
        assert found.item_nll[place] == pytest.approx(nll, abs=2e-3)
        assert found.item_tokens[place] == tokens
        assert text is None or found.outputs[place] == text


@pytest.mark.engine
def test_a_trained_model_is_mostly_right_and_the_result_says_on_what(measured):
    found, file = measured
    # On all 500 items it is right 95 to 99 times of 100; among the first 16 of math are four of its mistakes.
    assert {name: one.mean for name, one in found.items()} == {"trivia": 1.0, "math": 0.75, "code": 1.0}
    trivia = found["trivia"]
    assert trivia.low < trivia.mean <= trivia.high <= 1
    assert (trivia.n, trivia.label, trivia.metric, trivia.interval) == (LIMIT, "plain", "em", "wilson")
    assert trivia.item_ids == tuple(example.id for example in load_task(TASKS / "trivia").test[:LIMIT])
    assert trivia.mean == sum(trivia.item_scores) / LIMIT
    assert trivia.answer_nll_low < trivia.answer_nll < trivia.answer_nll_high
    assert trivia.weight_bytes == (LAB_MODEL / "model.safetensors").stat().st_size
    assert trivia.settings.engine_args == ENGINE
    assert {"vllm", "torch", "transformers"} <= set(trivia.versions)
    assert trivia.output_tokens_per_s == pytest.approx(trivia.output_tokens / trivia.generation_s)
    assert read_results(file) == list(found.values())


@pytest.mark.engine
def test_a_finished_evaluation_is_returned_without_an_engine(measured):
    found, file = measured
    before = file.read_bytes()
    task = load_task(TASKS / "trivia")
    again, fresh = evaluate(LAB_MODEL, task, limit=LIMIT, engine_args=ENGINE, results=file)
    assert (again, fresh) == (found["trivia"], False)
    assert file.read_bytes() == before


@pytest.mark.engine
def test_a_new_label_is_a_new_line_but_not_a_new_evaluation(measured, tmp_path):
    found, file = measured
    copy = shutil.copy(file, tmp_path / "results.jsonl")
    task = load_task(TASKS / "trivia")
    named, fresh = evaluate(LAB_MODEL, task, limit=LIMIT, engine_args=ENGINE, results=copy, label="mine")
    assert (named, fresh) == (found["trivia"].model_copy(update={"label": "mine"}), False)
    lines = compare_labels(copy, "mine", found["trivia"].label)
    assert [(line["task"], line["quantity"], line["mean"]) for line in lines] == [
        ("trivia", "metric", 0.0),
        ("trivia", "nll", 0.0),
    ]
    with pytest.raises(ValueError, match="no results labelled 'nobody'"):
        compare_labels(copy, "mine", "nobody")


@pytest.mark.engine
def test_other_weights_of_the_same_shapes_are_another_evaluation(measured, tmp_path):
    found, file = measured
    model = tmp_path / "model"
    shutil.copytree(LAB_MODEL, model)
    weights = model / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    with weights.open("r+b") as stream:
        stream.seek(header + (weights.stat().st_size - header) // 2)
        stream.write(bytes(4000))
    other, fresh = evaluate(
        model, load_task(TASKS / "trivia"), limit=LIMIT, engine_args=ENGINE, results=file, label="damaged"
    )
    assert fresh
    assert other.model_sha256 != found["trivia"].model_sha256
    assert compare(found["trivia"], other).n == LIMIT


@pytest.mark.engine
def test_a_prompt_that_leaves_no_room_for_the_answer_is_an_error(tmp_path):
    item = {"id": "long", "prompt": "word " * 200, "answers": ["x"]}
    (tmp_path / "test.jsonl").write_text(json.dumps(item) + "\n")
    header = {"name": "t", "metric": "em", "test": "test.jsonl", "max_new_tokens": 300}
    Path(tmp_path / "task.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"example long: its prompt of \d+ tokens and max_new_tokens 300 exceed"):
        evaluate(LAB_MODEL, load_task(tmp_path / "task.json"), engine_args=ENGINE)
