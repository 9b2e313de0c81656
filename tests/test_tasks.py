import hashlib
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from taq_vllm.tasks import Example, load_task, tokenize

LAB = Path(__file__).parents[1] / "benchmarks" / "lab"
ITEM = {"id": "1", "prompt": "Q: 1+1?\nA:", "answers": ["2", "two"]}


def write(folder, header=None, calibration=None, test=None, name="task.yaml"):
    """A task's files; items are objects, or strings for lines as they stand."""
    header = {"name": "t", "metric": "em", "test": "test.jsonl"} if header is None else header
    for part, items in (("calibration", calibration), ("test", [ITEM] if test is None else test)):
        if items is not None:
            lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
            (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / name).write_text(header if isinstance(header, str) else json.dumps(header))
    return folder / name


def header(**changes):
    return {"name": "t", "metric": "em", "calibration": "calibration.jsonl", "test": "test.jsonl"} | changes


def test_a_whole_task_is_read_with_its_settings(tmp_path):
    path = write(
        tmp_path,
        header(metric="f1", max_new_tokens=9, stop=["\n"], chat_template=True),
        calibration=[{"id": "c", "prompt": "Q: 3?\nA:", "answers": ["3"], "completion": " three", "source": "ours"}],
    )
    task = load_task(path)
    assert (task.name, task.metric, task.max_new_tokens, task.stop, task.chat_template) == ("t", "f1", 9, ("\n",), True)
    assert task.calibration == (Example("c", "Q: 3?\nA:", ("3",), " three"),)
    assert task.test == (Example("1", "Q: 1+1?\nA:", ("2", "two"), " 2"),)
    assert task.path == path


def test_a_folder_a_yaml_and_a_json_header_read_the_same(tmp_path):
    write(tmp_path, "name: t\nmetric: em # comment\ntest: test.jsonl\n")
    write(tmp_path, name="task.json")
    tasks = [load_task(tmp_path), load_task(tmp_path / "task.yaml"), load_task(str(tmp_path / "task.json"))]
    assert tasks[0].test == tasks[1].test == tasks[2].test


def test_a_bare_jsonl_is_a_calibration_set(tmp_path):
    write(tmp_path, test=[ITEM])
    task = load_task(tmp_path / "test.jsonl")
    assert (task.name, task.metric, len(task.calibration), task.test, task.test_sha256) == ("test", "em", 1, (), None)


def test_the_metric_can_be_overridden(tmp_path):
    assert load_task(write(tmp_path), metric="f1").metric == "f1"
    with pytest.raises(ValueError, match=r"got metric 'bleu'; there are em, f1, math, pass@1"):
        load_task(tmp_path, metric="bleu")


def test_a_template_takes_the_bare_question_and_leaves_braces_alone(tmp_path):
    item = {"id": "1", "question": "f({x})?", "prompt": "ready-made", "answers": ["1"]}
    task = load_task(write(tmp_path, header(calibration=None, template="Q {a}: {question}\nA:"), test=[item]))
    assert task.test[0].prompt == "Q {a}: f({x})?\nA:"


def test_without_a_template_the_prompt_is_used_as_it_stands(tmp_path):
    item = {"id": "1", "question": "why?", "prompt": " {question}", "answers": ["1"]}
    assert load_task(write(tmp_path, test=[item])).test[0].prompt == " {question}"


def test_target_is_another_name_of_completion(tmp_path):
    items = [ITEM | {"target": " worked"}, ITEM | {"id": "2", "prompt": "x", "target": "no", "completion": " yes"}]
    assert [e.completion for e in load_task(write(tmp_path, test=items)).test] == [" worked", " yes"]


def test_hashes_are_those_of_the_files_until_the_header_changes_the_prompts(tmp_path):
    plain = load_task(write(tmp_path)).test_sha256
    assert plain == hashlib.sha256((tmp_path / "test.jsonl").read_bytes()).hexdigest()
    changed = [header(calibration=None, template="Q: {question}"), header(calibration=None, chat_template=True)]
    assert len({plain, *(load_task(write(tmp_path, content)).test_sha256 for content in changed)}) == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"id": "2", "prompt": "x", "answers": ["y"]', r"line 2: not JSON \(.* at column \d+\)"),
        ("[1, 2]", "line 2: got a list; each line must be an object"),
        ('{"prompt": "x", "answers": ["y"]}', "line 2: id is missing; the item has prompt, answers"),
        ('{"id": "2", "answers": ["y"]}', "line 2: prompt or question is missing"),
        ('{"id": 2, "prompt": "x", "answers": ["y"]}', r"line 2, id: got a number \(2\), needs a string"),
        ('{"id": "2", "prompt": ["x"], "answers": ["y"]}', "line 2, prompt: got a list, needs a string"),
        ('{"id": "2", "prompt": " ", "answers": ["y"]}', "line 2, prompt: got an empty string"),
        ('{"id": "2", "prompt": "x", "answers": "y"}', r"line 2, answers: got a string \('y'\), needs a list"),
        ('{"id": "2", "prompt": "x", "answers": [7]}', r"line 2, answers: got a number \(7\) in the list"),
        ('{"id": "2", "prompt": "x", "answers": [""]}', "line 2, answers: got an empty string in the list"),
        ('{"id": "2", "prompt": "x", "answers": []}', "line 2: no answers; metric em needs"),
        ('{"id": "2", "prompt": "x"}', "line 2: no answers; metric em needs"),
        ('{"id": "2", "prompt": "x", "answers": ["y"], "completion": null}', "line 2, completion: got null"),
        ('{"id": "1", "prompt": "x", "answers": ["y"]}', "line 2: id '1' was already used on line 1"),
    ],
)
def test_a_malformed_item_is_named_by_file_and_line(tmp_path, line, complaint):
    with pytest.raises(ValueError, match=f"test.jsonl, {complaint}"):
        load_task(write(tmp_path, test=[ITEM, line]))


@pytest.mark.parametrize(
    ("metric", "fields", "complaint"),
    [
        ("pass@1", {}, "line 1: metric pass@1 needs tests"),
        ("pass@1", {"tests": "assert f()"}, "line 1, tests: got a string .* needs a list"),
        ("pass@1", {"tests": ["assert f( == 1"]}, "line 1, tests: got 'assert f.*which is not Python"),
        ("pass@1", {"tests": ["assert f()"], "answers": []}, "line 1: no completion and no answers"),
        ("pass@1", {"tests": ["assert f()"], "entry_point": 3}, "line 1, entry_point: got a number"),
        ("math", {"answers": ["7", "many"]}, "line 1, answers: got 'many', which holds no number"),
    ],
)
def test_an_item_that_its_metric_cannot_judge_is_refused(tmp_path, metric, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_task(write(tmp_path, header(calibration=None, metric=metric), test=[ITEM | fields]))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"metric": "em", "test": "test.jsonl"}, "task.yaml: name is missing"),
        ({"name": "t", "test": "test.jsonl"}, "task.yaml: metric is missing"),
        ({"name": "t", "metric": "em"}, "names neither a calibration nor a test file"),
        (header(metric="accuracy"), "metric: got 'accuracy'; there are em, f1, math, pass@1"),
        (header(max_tokens=3), "unknown key 'max_tokens'; a header has name, metric, .* max_new_tokens, stop"),
        (header(max_new_tokens=0), "max_new_tokens: got 0"),
        (header(max_new_tokens="64"), "max_new_tokens: got '64'"),
        (header(chat_template="yes"), "chat_template: got 'yes'"),
        (header(stop="\n"), r"stop: got '\\n'"),
        (header(stop=[""]), "empty stop string"),
        (header(template="Q: {}"), r"template: got 'Q: \{\}', which does not contain \{question\}"),
        (header(test="tests.jsonl"), "test: there is no file .*tests.jsonl; the name is relative"),
        ("- a\n- b\n", "got a list, a task's header is a mapping"),
        ("name: [t\n", "is not valid yaml"),
    ],
)
def test_a_malformed_header_says_what_is_needed(tmp_path, content, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_task(write(tmp_path, content, calibration=[ITEM | {"prompt": "another"}]))


def test_an_empty_file_holds_no_examples(tmp_path):
    with pytest.raises(ValueError, match=r"test.jsonl holds no examples; it needs one JSON object a line"):
        load_task(write(tmp_path, test=[]))


@pytest.mark.parametrize("name", ["nothing.yaml", "nothing"])
def test_a_missing_task_says_what_can_be_given(tmp_path, name):
    with pytest.raises(ValueError, match=r"no task at .*give a .yaml or .json header"):
        load_task(tmp_path / name)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "task.csv").write_text("id,prompt\n")
    with pytest.raises(ValueError, match=r"must end in .yaml, .yml, .json \(a header\) or .jsonl"):
        load_task(tmp_path / "task.csv")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = write(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl is not UTF-8 \(byte 11\)"):
        load_task(path)


def test_a_line_separator_inside_of_a_string_does_not_end_the_line(tmp_path):
    item = json.dumps(ITEM | {"prompt": "a\u2028b"}, ensure_ascii=False)
    assert load_task(write(tmp_path, test=[item])).test[0].prompt == "a\u2028b"


def test_a_test_prompt_in_the_calibration_set_is_found_through_case_and_spaces(tmp_path):
    path = write(
        tmp_path,
        header(),
        calibration=[ITEM | {"id": "c1", "prompt": "What IS  it\n"}, ITEM | {"id": "c2", "prompt": "other"}],
        test=[ITEM | {"id": "t1", "prompt": "What is it"}, ITEM | {"id": "t2", "prompt": "new"}],
    )
    with pytest.raises(ValueError, match=r"1 test prompts are in the calibration set \(c1 = t1\)"):
        load_task(path)


def test_prompts_that_differ_in_an_operator_or_a_digit_are_different(tmp_path):
    path = write(tmp_path, header(), calibration=[ITEM | {"prompt": "4-1?"}], test=[ITEM | {"prompt": "4+1?"}])
    assert len(load_task(path).test) == 1


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LAB / "model")


def test_tokens_are_the_prompts_the_completions_and_the_end(tokenizer, tmp_path):
    task = load_task(write(tmp_path))
    (tokens,) = tokenize(task.test, tokenizer, task, with_completion=True, max_length=64)
    prompt = tokenizer(ITEM["prompt"]).input_ids
    assert prompt[0] == tokenizer.bos_token_id
    assert tokens.input_ids[: tokens.prompt_len] == prompt
    assert tokens.input_ids[tokens.prompt_len :] == [
        *tokenizer(" 2", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]
    (alone,) = tokenize(task.test, tokenizer, task, with_completion=False, max_length=64)
    assert alone.input_ids == prompt


def test_the_chat_template_wraps_the_prompt_once(tokenizer, tmp_path):
    task = load_task(write(tmp_path, header(calibration=None, chat_template=True)))
    (tokens,) = tokenize(task.test, tokenizer, task, with_completion=False, max_length=64)
    message = [{"role": "user", "content": ITEM["prompt"]}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert tokens.input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert all(isinstance(token, int) for token in tokens.input_ids)


def test_a_chat_template_that_the_tokenizer_lacks_is_an_error(tmp_path):
    bare = AutoTokenizer.from_pretrained(LAB / "model")
    bare.chat_template = None
    task = load_task(write(tmp_path, header(calibration=None, chat_template=True)))
    with pytest.raises(ValueError, match="tokenizer has none: set chat_template: false"):
        tokenize(task.test, bare, task, with_completion=False, max_length=64)


def test_an_example_longer_than_the_model_is_named_with_both_lengths(tokenizer, tmp_path):
    task = load_task(write(tmp_path, test=[ITEM, ITEM | {"id": "long", "prompt": "word " * 50}]))
    with pytest.raises(ValueError, match=r"example long: its prompt has \d+ tokens, the model takes 32; shorten"):
        tokenize(task.test, tokenizer, task, with_completion=False, max_length=32)
    (short,) = tokenize(task.test[:1], tokenizer, task, with_completion=False, max_length=32)
    with pytest.raises(ValueError, match=r"example 1: its prompt of \d+ tokens and its completion of \d+ make \d+"):
        tokenize(task.test[:1], tokenizer, task, with_completion=True, max_length=short.prompt_len)


@pytest.mark.parametrize(("name", "metric"), [("trivia", "em"), ("math", "math"), ("code", "pass@1")])
def test_the_lab_tasks_are_whole(name, metric):
    task = load_task(LAB / "tasks" / name)
    assert (task.name, task.metric, len(task.calibration), len(task.test)) == (name, metric, 512, 500)


@pytest.mark.parametrize(
    ("name", "metric", "calibration", "test"),
    [("triviaqa", "f1", 512, 1000), ("gsm8k", "math", 512, 1000), ("mbpp", "pass@1", 470, 500)],
)
def test_the_papers_tasks_load_with_a_header_of_their_own(tmp_path, name, metric, calibration, test):
    if "TAQ_TASK_DATA" not in os.environ:
        pytest.skip(f"TAQ_TASK_DATA names no folder with {name}")
    folder = Path(os.environ["TAQ_TASK_DATA"], name)
    content = header(
        metric=metric,
        calibration=str(folder / "calibration.jsonl"),
        test=str(folder / "test.jsonl"),
        template="Question: {question}\nAnswer:",
    )
    task = load_task(write(tmp_path, content))
    assert (len(task.calibration), len(task.test)) == (calibration, test)
    assert task.test[0].prompt.startswith("Question: ")
    assert task.test[0].prompt.endswith("\nAnswer:")
