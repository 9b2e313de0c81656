import hashlib
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from taq_vllm.tasks import Example, load_task, render, require_labels, tokenize

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
    assert (task.name, task.metric, len(task.calibration), task.test, task.test_sha256) == ("test", None, 1, (), None)


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
        (header(format="squad"), "format: got 'squad'; there are jsonl, gsm8k, mbpp, humaneval, triviaqa, lm-eval"),
        (header(system="Be brief."), "a system message needs `chat_template: true`"),
        (header(few_shot=-1), "few_shot: got -1"),
        (header(few_shot=2), "few_shot is 2 and .*calibration.jsonl has 1 examples; ask for fewer"),
        (header(few_shot_file="test.jsonl"), "few_shot_file without a number; add `few_shot: N`"),
        (header(few_shot=1, few_shot_file="no.jsonl"), "few_shot_file: there is no file .*no.jsonl"),
        (header(calibration=None, few_shot=1), "few_shot 1 has no file to come from; add `few_shot_file: FILE`"),
        (header(task="gsm8k"), "task belongs to `format: lm-eval`, got format jsonl"),
        (header(format="lm-eval"), "format lm-eval needs `task: NAME`"),
        (header(format="lm-eval", task="gsm8k"), "calibration is the lm-eval task's own affair; remove it"),
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


def ends(tokenizer, folder, completion, **changes):
    """How the completion of a task is tokenized, as text."""
    shown = [shot(3), shot(4)] if changes.get("few_shot") else None
    content = header(**changes) if shown else header(calibration=None, **changes)
    task = load_task(write(folder, content, shown, [ITEM | {"completion": completion}]))
    (tokens,) = tokenize(task.test, tokenizer, task, with_completion=True, max_length=99)
    ids = tokens.input_ids[tokens.prompt_len :]
    text = tokenizer.decode(ids)
    if not changes.get("chat_template"):
        assert ids == tokenizer(text, add_special_tokens=False).input_ids  # of one piece
    return text


def test_a_plain_completion_ends_with_the_first_stop_string_where_there_are_any(tokenizer, tmp_path):
    end = tokenizer.eos_token
    assert ends(tokenizer, tmp_path, " 2") == f" 2{end}"
    assert ends(tokenizer, tmp_path, " 2", stop=["\n", "Q:"]) == " 2\n"
    assert ends(tokenizer, tmp_path, " 2.\n[DONE]", stop=["\n", "[DONE]"]) == " 2.\n[DONE]"
    assert ends(tokenizer, tmp_path, " 2", stop=["\n"], chat_template=True) == f"2{end}"


def test_few_shot_examples_show_how_a_completion_ends(tokenizer, tmp_path):
    assert ends(tokenizer, tmp_path, " 2", stop=["\n"], few_shot=1) == " 2\n\n"
    assert ends(tokenizer, tmp_path, " 2", stop=["Q:"], few_shot=1) == " 2\n\nQ:"
    assert ends(tokenizer, tmp_path, " 2", stop=["\n\nQ"], few_shot=1) == " 2\n\nQ"
    for never_shown in (";", "?"):  # not at all, and inside of the next question
        assert ends(tokenizer, tmp_path, " 2", stop=[never_shown], few_shot=1) == f" 2{never_shown}"


def test_a_tokenizer_without_an_end_token_does_for_tasks_with_stop_strings(tmp_path):
    bare = AutoTokenizer.from_pretrained(LAB / "model")
    bare.eos_token = None
    assert ends(bare, tmp_path, " 2", stop=["\n"]) == " 2\n"
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        ends(bare, tmp_path, " 2")


def test_stop_strings_change_the_hashes_of_plain_prompts_alone(tmp_path):
    def sha256(**changes):
        return load_task(write(tmp_path, header(calibration=None, **changes))).test_sha256

    assert len({sha256(), sha256(stop=["\n"]), sha256(stop=["Q:", "\n"])}) == 3
    assert sha256(stop=[]) == sha256()
    assert sha256(chat_template=True, stop=["\n"]) == sha256(chat_template=True)


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


def shot(number, **fields):
    return {"id": f"s{number}", "prompt": f"Q: {number}?\nA:", "answers": [str(number)]} | fields


def test_prompts_without_answers_are_a_calibration_set(tokenizer, tmp_path):
    bare = [{"id": "a", "prompt": "Tell me."}, ITEM | {"id": "b"}]
    alone = load_task(write(tmp_path, test=bare).with_name("test.jsonl"))
    beside = load_task(write(tmp_path, header(), bare, [shot(3)]))
    for task in (alone, beside):
        assert [(e.answers, e.completion) for e in task.calibration] == [((), ""), (("2", "two"), " 2")]
        prompts = tokenize(task.calibration, tokenizer, task, with_completion=False, max_length=64)
        mixed = tokenize(task.calibration, tokenizer, task, with_completion="if present", max_length=64)
        assert mixed[0].input_ids == prompts[0].input_ids
        assert len(mixed[1].input_ids) > mixed[1].prompt_len == len(prompts[1].input_ids)
        with pytest.raises(ValueError, match=r"example a has no answers and no completion \(1 of 2 .* teacher forcing"):
            tokenize(task.calibration, tokenizer, task, with_completion=True, max_length=64)


def test_who_needs_labels_says_so_and_names_the_example(tmp_path):
    task = load_task(write(tmp_path, header(), [{"id": "a", "prompt": "Tell me."}, ITEM | {"id": "b"}], [shot(3)]))
    require_labels(task, task.calibration[1:], "scorer taqo", judged=True)
    with pytest.raises(ValueError, match=r"task.yaml: example a has no .*which scorer taqo needs: add .* taq or kl"):
        require_labels(task, task.calibration, "scorer taqo")
    told = load_task(write(tmp_path, header(metric="pass@1", test=None), [ITEM]))
    require_labels(told, told.calibration, "scorer taqo")
    with pytest.raises(ValueError, match="example 1: metric pass@1 needs tests"):
        require_labels(told, told.calibration, "scorer taqo", judged=True)
    bare = load_task(tmp_path / "calibration.jsonl")
    with pytest.raises(ValueError, match="has no metric and scorer taqo judges outputs: add `metric:`"):
        require_labels(bare, bare.calibration, "scorer taqo", judged=True)


def test_few_shot_examples_stand_completed_before_every_prompt(tokenizer, tmp_path):
    path = write(tmp_path, header(few_shot=2, separator="\n--\n"), [shot(3), shot(4, target=" four"), shot(5)])
    task = load_task(path)
    assert [e.id for e in task.shots] == ["s3", "s4"]
    assert [e.id for e in task.calibration] == ["s5"]
    text = "Q: 3?\nA: 3\n--\nQ: 4?\nA: four\n--\nQ: 1+1?\nA:"
    assert render(task.test[0], task) == text
    (tokens,) = tokenize(task.test, tokenizer, task, with_completion=True, max_length=99)
    assert tokens.input_ids[: tokens.prompt_len] == tokenizer(text).input_ids
    assert tokens.input_ids.count(tokenizer.bos_token_id) == 1
    assert task.test[0].prompt == ITEM["prompt"]
    with pytest.raises(ValueError, match=r"has \d+ tokens \(2 few-shot examples included\), the model takes 20"):
        tokenize(task.test, tokenizer, task, with_completion=False, max_length=20)


def test_few_shot_examples_of_their_own_file_leave_the_calibration_set_whole(tmp_path):
    (tmp_path / "shots.jsonl").write_text(json.dumps(shot(7)) + "\n" + json.dumps(shot(8)) + "\n")
    task = load_task(write(tmp_path, header(few_shot=1, few_shot_file="shots.jsonl"), [shot(3)]))
    assert ([e.id for e in task.shots], [e.id for e in task.calibration]) == (["s7"], ["s3"])
    assert task.test_sha256 != load_task(write(tmp_path, header(), [shot(3)])).test_sha256


def test_every_few_shot_choice_changes_both_hashes(tmp_path):
    items = [shot(n) for n in range(3, 7)]
    choices = [{}, {"few_shot": 1}, {"few_shot": 2}, {"few_shot": 2, "separator": "\n"}]
    tasks = [load_task(write(tmp_path, header(**choice), items)) for choice in choices]
    assert len({task.test_sha256 for task in tasks}) == len({task.calibration_sha256 for task in tasks}) == 4


@pytest.mark.parametrize(
    ("shots", "calibration", "complaint"),
    [
        ([shot(1, prompt="q:  1+1? A:")], [shot(3)], r"1 test prompts are among the few-shot examples \(s1 = 1\)"),
        ([shot(3)], [shot(3)], r"1 calibration prompts are among .* leave few_shot_file out"),
        ([shot(4, answers=[])], [shot(3)], "few-shot example s4 has no answers and no completion to show"),
    ],
)
def test_few_shot_examples_that_give_answers_away_or_have_none_are_refused(tmp_path, shots, calibration, complaint):
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
    path = write(tmp_path, header(few_shot=1, few_shot_file="shots.jsonl"), calibration)
    with pytest.raises(ValueError, match=complaint):
        load_task(path)


CHAT = {"id": "1", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_a_chat_has_the_system_message_the_few_shot_turns_and_the_question(tokenizer, tmp_path):
    content = header(chat_template=True, system="Be brief.", few_shot=1)
    task = load_task(write(tmp_path, content, [shot(3), shot(4)]))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 3?\nA:"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": ITEM["prompt"]},
    ]
    assert render(task.test[0], task) == messages
    (tokens,) = tokenize(task.test, tokenizer, task, with_completion=True, max_length=200)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokens.input_ids[: tokens.prompt_len] == tokenizer(text, add_special_tokens=False).input_ids
    # The reply starts a line of its own: without the space that follows a plain prompt.
    reply = [*tokenizer("2", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert tokens.input_ids[tokens.prompt_len :] == reply


def test_a_conversation_is_a_prompt_and_its_last_reply_the_completion(tmp_path):
    own = {"id": "2", "messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Go"}]}
    path = write(tmp_path, header(test=None, chat_template=True, system="Be brief."), [CHAT, own])
    first, second = load_task(path).calibration
    assert (first.prompt, first.completion, first.messages) == ("Hi", "Hello", (("user", "Hi"),))
    assert second.completion == ""
    assert [m["content"] for m in render(first, load_task(path))] == ["Be brief.", "Hi"]
    assert [m["content"] for m in render(second, load_task(path))] == ["Rhyme.", "Go"]
    (tmp_path / "shots.jsonl").write_text(json.dumps({**own, "answers": ["ok"]}))
    content = header(test=None, chat_template=True, few_shot=1, few_shot_file="shots.jsonl")
    shown = load_task(write(tmp_path, content, [CHAT]))
    assert [m["content"] for m in render(shown.calibration[0], shown)] == ["Go", "ok", "Hi"]


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ({"messages": []}, r"messages: got a list, needs a list with at least one object of role and content"),
        ({"messages": "Hi"}, r"messages: got a string \('Hi'\)"),
        ({"messages": ["Hi"]}, r"messages\[0\]: got a string .* needs an object with role and content"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, r"messages\[0\], role: got 'bot'; there are system, user"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is missing; the item has role"),
        ({"messages": [CHAT["messages"][0], {"role": "system", "content": "x"}]}, "must be the first; move it"),
        ({"messages": [CHAT["messages"][1]]}, "no message of the user to answer at the end"),
        ({"prompt": "Hi"}, "the item has a prompt or question as well; keep one of them"),
        ({"target": "Hey"}, "got a target and a closing assistant message; keep one of them"),
    ],
)
def test_a_malformed_conversation_is_named(tmp_path, item, complaint):
    path = write(tmp_path, header(test=None, chat_template=True), [CHAT | item])
    with pytest.raises(ValueError, match=f"line 1.*{complaint}"):
        load_task(path)


def test_a_conversation_needs_a_chat_template(tmp_path):
    with pytest.raises(ValueError, match=r"line 1, messages: .* set `chat_template: true`"):
        load_task(write(tmp_path, header(test=None), [CHAT]))


def test_a_chat_template_that_refuses_a_role_is_told(tmp_path):
    strict = AutoTokenizer.from_pretrained(LAB / "model")
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    task = load_task(write(tmp_path, header(calibration=None, chat_template=True, system="x")))
    with pytest.raises(ValueError, match=r"example 1: .* refuses a conversation of system, user .*System role not"):
        tokenize(task.test, strict, task, with_completion=False, max_length=64)


def test_tests_may_be_shown_in_the_prompt_and_nothing_is_filled_in_twice(tmp_path):
    item = ITEM | {"question": "{tests} {x}", "tests": ["assert f()", "assert g()"]}
    content = header(calibration=None, metric="pass@1", template="{question}|{tests}")
    assert load_task(write(tmp_path, content, test=[item])).test[0].prompt == "{tests} {x}|assert f()\nassert g()"
    with pytest.raises(ValueError, match=r"the template shows {tests} and the item has no tests"):
        load_task(write(tmp_path, content, test=[item | {"tests": []}]))


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
