import gzip
import json
import os
from pathlib import Path

import pytest

from taq_vllm.readers import read_records
from taq_vllm.sandbox import Candidate, extract_code, run_all
from taq_vllm.tasks import load_task, render

GSM8K = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "She has 3+4=<<3+4=7>>7 pens.\n#### 7"},
    {"question": "A farm of 40 rows of 30 trees?", "answer": "40*30=<<40*30=1200>>1,200 trees\n#### 1,200"},
]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(a):\r\n    return a + {number} \r\n",
        "test_list": [f"assert add({n}) == {n + number}" for n in range(3)],
        "test_setup_code": "",
        "challenge_test_list": ["assert add(-1) == 7"],
    }
    for number in (2, 11, 601)
]
SANITIZED = [
    {
        "source_file": "x.ipynb",
        "task_id": 11,
        "prompt": "Write a function to halve.",
        "code": "def halve(a):\n    return a / 2",
        "test_imports": ["import math", "import os"],
        "test_list": ["assert math.isclose(halve(1), 0.5)", "assert halve(2) == 1", "assert halve(4) == 2"],
    }
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef last(values: List[int]) -> int:\n    """The last.\n    """\n',
        "canonical_solution": "    return values[-1]\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 2\n",
        "entry_point": "last",
    }
]
TRIVIAQA = [
    {
        "Question": "Which city has the Louvre?",
        "QuestionId": "tc_1",
        "QuestionSource": "x",
        "SearchResults": [{"Title": "y"}],
        "Answer": {
            "Value": "Paris",
            "Aliases": ["Paris", "City of Light"],
            "NormalizedAliases": ["paris", "city of light"],
            "NormalizedValue": "paris",
            "Type": "WikipediaEntity",
        },
    },
    {"Question": "Who wrote Emma?", "QuestionId": "tc_2", "Answer": {"Value": "Jane Austen", "Aliases": []}},
]
HUB_TRIVIAQA = [
    {
        "question": entry["Question"],
        "question_id": entry["QuestionId"],
        "answer": {"value": entry["Answer"]["Value"], "aliases": entry["Answer"]["Aliases"], "normalized_aliases": []},
    }
    for entry in TRIVIAQA
]


def lines(items):
    return "\n".join(map(json.dumps, items)) + "\n"


def task(folder, content, data, name="data.jsonl", key="test", **header):
    """A task whose test set (or the set named by `key`) is a native file of this content."""
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    (folder / "task.json").write_text(json.dumps({"name": "t", "format": content, key: name} | header))
    return load_task(folder / "task.json")


def test_gsm8k_has_a_worked_solution_without_calculator_marks_and_a_final_number(tmp_path):
    read = task(tmp_path, "gsm8k", lines(GSM8K), name="train.jsonl")
    first, second = read.test
    assert (read.metric, read.stop, read.max_new_tokens) == ("math", ("Question:",), 256)
    assert first.id == "train-0"
    assert first.prompt == "Question: Ann has 3 pens and buys 4. How many?\nAnswer:"
    assert first.completion == " She has 3+4=7 pens.\n#### 7"
    assert (first.answers, second.answers) == (("7",), ("1200",))


def test_mbpp_shows_its_three_assertions_and_ends_with_done(tmp_path):
    read = task(tmp_path, "mbpp", lines(MBPP))
    (only,) = read.test
    assert (read.metric, read.stop) == ("pass@1", ("[DONE]",))
    assert only.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to add 11. Your code should "
        "pass these tests:\n\nassert add(0) == 11\nassert add(1) == 12\nassert add(2) == 13\n[BEGIN]\n"
    )
    assert only.completion == "def add(a):\n    return a + 11\n[DONE]"
    assert only.tests == tuple(MBPP[1]["test_list"])


def test_one_mbpp_file_gives_the_published_test_set_and_the_rest_for_calibration(tmp_path):
    read = task(tmp_path, "mbpp", lines(MBPP), calibration="data.jsonl", few_shot=1)
    parts = (read.shots, read.calibration, read.test)
    assert [[example.id for example in part] for part in parts] == [["mbpp-2"], ["mbpp-601"], ["mbpp-11"]]
    shown = f"{read.shots[0].prompt}def add(a):\n    return a + 2\n[DONE]\n\n"
    assert render(read.test[0], read) == shown + read.test[0].prompt


def test_the_sanitized_mbpp_is_an_array_with_imports(tmp_path):
    (only,) = task(tmp_path, "mbpp", json.dumps(SANITIZED, indent=1), name="sanitized.json").test
    assert only.test_setup == "import math\nimport os"
    assert "here is your task: Write a function to halve. Your code should pass these tests:" in only.prompt


def test_a_question_that_mbpp_repeats_is_left_out_of_the_calibration_set(tmp_path):
    again = MBPP[2] | {"task_id": 602, "text": MBPP[1]["text"].upper()}
    read = task(tmp_path, "mbpp", lines([*MBPP, again]), calibration="data.jsonl")
    assert [example.id for example in read.calibration] == ["mbpp-2", "mbpp-601"]
    with pytest.raises(ValueError, match="all its items are in the test set as well; name another calibration file"):
        task(tmp_path, "mbpp", lines([MBPP[1], again]), calibration="data.jsonl")


def test_humaneval_calls_check_with_the_function(tmp_path):
    read = task(tmp_path, "humaneval", gzip.compress(lines(HUMANEVAL).encode()), name="HumanEval.jsonl.gz")
    (only,) = read.test
    assert (only.id, only.prompt, only.completion) == ("HumanEval/0", HUMANEVAL[0]["prompt"], "    return values[-1]")
    assert only.entry_point == "last"
    assert only.tests[0].endswith("\n\ncheck(last)\n")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("format", "items"), [("humaneval", HUMANEVAL), ("mbpp", MBPP), ("mbpp", SANITIZED)])
def test_reference_solutions_pass_and_others_fail_in_the_sandbox(tmp_path, format, items, chat):
    (example,) = task(tmp_path, format, lines(items), chat_template=chat).test
    stopped = example.completion.partition("[DONE]")[0]
    wrong = stopped.replace("values[-1]", "values[0]").replace("+ 11", "+ 12").replace("a / 2", "a / 3")
    codes = [extract_code(output, example.prompt, example.entry_point) for output in (stopped, wrong)]
    candidates = [Candidate(code, example.tests, example.test_setup, example.entry_point) for code in codes]
    assert [outcome.passed for outcome in run_all(candidates, allow=True)] == [True, False]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps({"Data": TRIVIAQA, "Domain": "Web", "Version": 1.0}),
        json.dumps({"Data": TRIVIAQA}, indent=4),
        lines(TRIVIAQA),
        lines(HUB_TRIVIAQA),
        gzip.compress(json.dumps(HUB_TRIVIAQA).encode()),
    ],
)
def test_both_layouts_of_triviaqa_give_every_alias_and_continue_with_the_value(tmp_path, data):
    read = task(tmp_path, "triviaqa", data, name="web.json")
    first, second = read.test
    assert (read.metric, read.stop, first.id) == ("em", ("\n",), "tc_1")
    assert first.prompt == "Question: Which city has the Louvre?\nAnswer:"
    assert first.answers[:2] == ("Paris", "City of Light")
    assert len(set(first.answers)) == len(first.answers)
    assert (second.answers, second.completion) == (("Jane Austen",), " Jane Austen")


def test_triviaqa_without_its_answers_can_calibrate_and_not_test(tmp_path):
    withheld = lines([{"Question": "Who?", "QuestionId": "q"}])
    assert task(tmp_path, "triviaqa", withheld, key="calibration").calibration[0].completion == ""
    with pytest.raises(ValueError, match="line 1: no answers; metric em needs"):
        task(tmp_path, "triviaqa", withheld)


@pytest.mark.parametrize(
    ("format", "items", "prompt", "completion"),
    [
        ("gsm8k", GSM8K, "Question: Ann has 3 pens and buys 4. How many?\nEnd with", "She has 3+4=7 pens.\n#### 7"),
        ("mbpp", MBPP, "You are an expert Python", "```python\ndef add(a):\n    return a + 11\n```"),
        ("humaneval", HUMANEVAL, "Write a solution", f"```python\n{HUMANEVAL[0]['prompt']}    return values[-1]\n```"),
        ("triviaqa", TRIVIAQA, "Which city has the Louvre?\nReply with", "Paris"),
    ],
)
def test_a_chat_model_gets_a_request_and_replies_without_stop_strings(tmp_path, format, items, prompt, completion):
    read = task(tmp_path, format, lines(items), chat_template=True)
    assert read.test[0].prompt.startswith(prompt)
    assert read.test[0].completion == completion
    assert read.stop == ()


def test_what_the_header_says_goes_before_the_format(tmp_path):
    told = {"metric": "f1", "template": "{question} =>", "stop": [], "max_new_tokens": 7}
    read = task(tmp_path, "triviaqa", lines(TRIVIAQA), **told)
    assert (read.metric, read.stop, read.max_new_tokens) == ("f1", (), 7)
    assert read.test[0].prompt == "Which city has the Louvre? =>"
    read = task(tmp_path, "mbpp", lines(MBPP), template="{question}\n")
    assert read.test[0].completion == "def add(a):\n    return a + 11"  # [DONE] belongs to the prompt with [BEGIN]


def test_the_format_and_the_prompt_are_part_of_the_hash(tmp_path):
    either = lines([{"id": "1", "answers": ["7"], **GSM8K[0]}])  # also a plain item
    choices = [{}, {"template": "{question}"}, {"chat_template": True}]
    hashes = {task(tmp_path, "gsm8k", either, **choice).test_sha256 for choice in choices}
    assert len(hashes | {task(tmp_path, "jsonl", either, metric="math").test_sha256}) == 4


@pytest.mark.parametrize(
    ("format", "item", "complaint"),
    [
        ("gsm8k", GSM8K[0] | {"answer": "7"}, r"line 1, answer: it must end with '#### N'.*got \.\.\.'7'"),
        ("gsm8k", {"question": "x"}, "line 1: answer is missing; the item has question"),
        ("gsm8k", MBPP[0], "question is missing; .*this looks like mbpp: write `format: mbpp`"),
        ("gsm8k", HUMANEVAL[0], "this looks like humaneval"),
        ("gsm8k", TRIVIAQA[0], "this looks like triviaqa"),
        ("mbpp", MBPP[1] | {"test_list": []}, "test_list: no tests; MBPP's items have three"),
        ("mbpp", MBPP[1] | {"task_id": "11"}, r"task_id: got a string \('11'\), needs MBPP's number"),
        ("mbpp", MBPP[1] | {"test_setup_code": None}, "test_setup_code: got null, needs a string"),
        ("mbpp", MBPP[1] | {"test_list": ["assert add( == 1"]}, "tests: got 'assert add.* which is not Python"),
        ("mbpp", MBPP[0], "all 1 items are outside of MBPP's test ids 11-510, so none is left for test"),
        ("mbpp", GSM8K[0], "text .* is missing; .*this looks like gsm8k"),
        ("humaneval", {k: v for k, v in HUMANEVAL[0].items() if k != "entry_point"}, "line 1: entry_point is missing"),
        ("humaneval", HUMANEVAL[0] | {"entry_point": "first"}, "got 'first', and the prompt defines no such function"),
        ("humaneval", HUMANEVAL[0] | {"test": "assert last([1]) == 1"}, r"test: it must define check\(candidate\)"),
        (
            "triviaqa",
            TRIVIAQA[0] | {"Answer": "Paris"},
            r"answer: got a string \('Paris'\), needs an object with value",
        ),
        ("triviaqa", TRIVIAQA[0] | {"Answer": {"Aliases": []}}, "line 1, answer: value is missing"),
        ("triviaqa", GSM8K[0], "question_id is missing; .*this looks like gsm8k"),
        ("jsonl", GSM8K[0], "line 1: this looks like gsm8k: write `format: gsm8k` in the task's header"),
        ("jsonl", HUB_TRIVIAQA[0], "line 1: this looks like triviaqa"),
        ("gsm8k", {"id": "1", "prompt": "x", "answers": ["1"]}, "question is missing.*this looks like jsonl"),
    ],
)
def test_a_record_of_another_format_is_named_and_told_what_it_looks_like(tmp_path, format, item, complaint):
    with pytest.raises(ValueError, match=f"data.jsonl.*{complaint}"):
        task(tmp_path, format, lines([item]), metric="em" if format == "jsonl" else None)


def test_a_file_that_mixes_formats_is_refused_at_the_first_stranger(tmp_path):
    with pytest.raises(ValueError, match=r"line 3: question is missing.*looks like mbpp"):
        task(tmp_path, "gsm8k", lines([*GSM8K, MBPP[0]]))
    with pytest.raises(ValueError, match="item 2: got a list; each line must be an object with the fields of gsm8k"):
        task(tmp_path, "gsm8k", json.dumps([GSM8K[0], [1]]))


def test_a_damaged_gzip_file_is_told(tmp_path):
    whole = gzip.compress(lines(HUMANEVAL).encode())
    for data in (whole[:-20], whole[:20] + b"????" + whole[24:]):
        with pytest.raises(ValueError, match=r"x.jsonl.gz is a damaged gzip file \(.*\): fetch it again"):
            task(tmp_path, "humaneval", data, name="x.jsonl.gz")
    with pytest.raises(ValueError, match=r"is named .gz and is not gzipped"):
        task(tmp_path, "humaneval", lines(HUMANEVAL), name="x.jsonl.gz")


def test_an_empty_or_broken_native_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no examples"):
        task(tmp_path, "gsm8k", "")
    with pytest.raises(ValueError, match="holds no examples"):
        task(tmp_path, "triviaqa", '{"Data": []}')
    with pytest.raises(ValueError, match=r"line 2: not JSON \(.*each line must be one whole object"):
        task(tmp_path, "gsm8k", lines(GSM8K[:1]) + '{"question": "x"')


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_the_real_problems_read_the_same_from_their_native_form(tmp_path, part):
    if "TAQ_TASK_DATA" not in os.environ:
        pytest.skip("TAQ_TASK_DATA names no folder with gsm8k and mbpp")
    folder = Path(os.environ["TAQ_TASK_DATA"])
    plain = {name: read_records(folder / name / f"{part}.jsonl", "jsonl", part) for name in ("gsm8k", "mbpp")}
    native = [{"question": r.item["question"], "answer": r.item["target"]} for r in plain["gsm8k"]]
    read = task(tmp_path, "gsm8k", lines(native), key=part)
    assert [e.answers for e in getattr(read, part)] == [tuple(r.item["answers"]) for r in plain["gsm8k"]]
    native = [
        {"task_id": int(r.item["id"].removeprefix("mbpp-")), "text": r.item["prompt"], "code": r.item["target"]}
        | {"test_list": r.item["tests"], "test_setup_code": r.item.get("test_setup", "")}
        for r in plain["mbpp"]
    ]
    read = task(tmp_path, "mbpp", lines(native), key=part)
    assert [e.tests for e in getattr(read, part)] == [tuple(r.item["tests"]) for r in plain["mbpp"]]
