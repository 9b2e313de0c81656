import builtins
import json
from types import SimpleNamespace

import pytest

from taq_vllm import harness
from taq_vllm.tasks import load_task, render


class HarnessTask:
    """The surface of lm-eval's ConfigurableTask, over documents at hand."""

    def __init__(self, train=(), validation=(), test=(), shots=(), text=None, target=None, **config):
        defaults = {
            "output_type": "generate_until",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\n\n"]},
            "description": "",
            "fewshot_delimiter": "\n\n",
            "target_delimiter": " ",
            "num_fewshot": 0,
            "doc_to_choice": None,
        }
        self.config = SimpleNamespace(**defaults | config)
        self._parts = {"train": train, "validation": validation, "test": test}
        self._shots = shots
        self.doc_to_text = text or (lambda doc: f"Q: {doc['q']}\nA:")
        self.doc_to_target = target or (lambda doc: doc["a"])

    def has_training_docs(self):
        return bool(self._parts["train"])

    def has_validation_docs(self):
        return bool(self._parts["validation"])

    def has_test_docs(self):
        return bool(self._parts["test"])

    def training_docs(self):
        return self._parts["train"]

    def validation_docs(self):
        return self._parts["validation"]

    def test_docs(self):
        return self._parts["test"]

    def fewshot_docs(self):
        return self._shots

    def doc_to_choice(self, doc):
        return doc["choices"]


def docs(*numbers, answer="{}"):
    return [{"q": str(number), "a": answer.format(number)} for number in numbers]


def pass_at_k(references, predictions):
    """Stands for lm-eval's function of that name; only its name is read."""


def load(monkeypatch, task, name="made_up", **header):
    """The task through `load_task`, as if lm-eval had loaded it."""
    monkeypatch.setattr(harness, "load", lambda name, include, *choices: harness.adapt(task, name, *choices))
    return load_task(f"lm-eval:{name}")


def test_a_task_brings_its_prompts_answers_stops_and_lengths(monkeypatch):
    task = HarnessTask(
        train=docs(1, 2),
        test=docs(3),
        target=lambda doc: [doc["a"], f"alias {doc['a']}"],
        generation_kwargs={"until": "\n", "max_gen_toks": 9},
    )
    read = load(monkeypatch, task)
    assert (read.name, read.metric, read.stop, read.max_new_tokens) == ("made_up", "em", ("\n",), 9)
    assert [e.prompt for e in read.calibration] == ["Q: 1\nA:", "Q: 2\nA:"]
    assert (read.test[0].answers, read.test[0].completion) == (("3", "alias 3"), " 3")
    assert read.calibration_sha256 != read.test_sha256


def test_few_shot_documents_come_first_and_leave_the_calibration_set(monkeypatch):
    train = docs(1, 2, 3)
    task = HarnessTask(train=train, test=docs(4), shots=train, num_fewshot=2, description="Count.\n\n")
    read = load(monkeypatch, task)
    assert render(read.test[0], read) == "Count.\n\nQ: 1\nA: 1\n\nQ: 2\nA: 2\n\nQ: 4\nA:"
    assert [e.prompt for e in read.calibration] == ["Q: 3\nA:"]
    with pytest.raises(ValueError, match="few_shot is 4 and it has 3 few-shot documents; ask for fewer"):
        harness.adapt(task, "made_up", few_shot=4)


def test_few_shot_documents_leave_the_test_set_and_how_many_is_said(monkeypatch):
    test = docs(1, 2, 3)
    task = HarnessTask(test=test, shots=[{"q": " 1", "a": "1"}, *test[1:]], num_fewshot=2)
    with pytest.warns(UserWarning, match="lm-eval:made_up: 2 of 3 test examples are among the few-shot examples"):
        read = load(monkeypatch, task)
    assert [e.prompt for e in read.test] == ["Q: 3\nA:"]
    task = HarnessTask(test=test, shots=test, num_fewshot=3)
    with pytest.raises(ValueError, match=r"3 of 3 test examples .* use a smaller few_shot"):
        load(monkeypatch, task)


def test_calibration_falls_back_on_validation_and_never_overlaps_the_test_set(monkeypatch):
    read = load(monkeypatch, HarnessTask(validation=docs(1, 2), test=docs(2, 3)))
    assert [e.prompt for e in read.calibration] == ["Q: 1\nA:"]
    read = load(monkeypatch, HarnessTask(train=docs(1), validation=docs(2)))
    assert ([e.prompt for e in read.calibration], [e.prompt for e in read.test]) == (["Q: 1\nA:"], ["Q: 2\nA:"])


def test_a_large_training_set_is_cut_without_reading_all_of_it():
    def endless():
        yield from docs(*range(harness._CALIBRATION_DOCS + 1))
        raise AssertionError("one document too many was read")

    task = HarnessTask(train=[1], test=docs("t"))
    task.training_docs = endless
    assert len(harness.adapt(task, "made_up", metric="em").calibration) == harness._CALIBRATION_DOCS


@pytest.mark.parametrize(
    ("metric", "answer", "expected"),
    [("exact_match", "{}", "em"), ("exact_match", "so\n#### {}", "math"), ("f1", "{}", "f1"), ("em", "{}", "em")],
)
def test_metrics_map_to_ours(metric, answer, expected):
    task = HarnessTask(test=docs(3, 4, answer=answer), metric_list=[{"metric": "bleu"}, {"metric": metric}])
    assert harness.adapt(task, "made_up").metric == expected


def test_code_is_judged_by_its_target_and_completed_by_its_solution(monkeypatch):
    document = {"q": "double", "a": "def check(f):\n    assert f(2) == 4\ncheck(double)", "entry_point": "double"}
    metric = [{"metric": pass_at_k}]
    task = HarnessTask(test=[document | {"canonical_solution": "    return 2 * x"}], metric_list=metric)
    (example,) = load(monkeypatch, task).test
    assert (example.tests, example.entry_point) == ((document["a"],), "double")
    assert example.completion == "    return 2 * x"

    def target(doc):
        return "the code\n[DONE]" if "is_fewshot" in doc else "assert double(2) == 4"

    task = HarnessTask(test=[document], metric_list=metric, target=target, target_delimiter="")
    assert load(monkeypatch, task).test[0].completion == "the code\n[DONE]"


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"output_type": "multiple_choice"}, "is judged by multiple_choice, and only generated answers"),
        (
            {"metric_list": [{"metric": "bleu"}, {"metric": "ter"}]},
            "is judged by bleu, ter; known .* choose the nearest",
        ),
        ({"gen_prefix": "Sure"}, "uses gen_prefix, which is not supported"),
        ({"description": "About {{topic}}"}, "a description of its own for every item"),
        ({"target": lambda doc: ""}, "test item 0: it has no gold answer"),
        ({"text": lambda doc: 3}, "test item 0: its prompt is not a text but int"),
    ],
)
def test_what_cannot_be_taken_over_is_named(config, complaint):
    with pytest.raises(ValueError, match=f"task lm-eval:made_up.*{complaint}"):
        harness.adapt(HarnessTask(test=docs(1), **config), "made_up")


def test_a_header_can_choose_another_metric(tmp_path, monkeypatch):
    task = HarnessTask(test=docs(1), metric_list=[{"metric": "bleu"}])
    monkeypatch.setattr(harness, "load", lambda name, include, *choices: harness.adapt(task, name, *choices))
    header = {
        "format": "lm-eval",
        "task": "made_up",
        "metric": "f1",
        "stop": ["x"],
        "max_new_tokens": 3,
        "name": "mine",
    }
    (tmp_path / "task.json").write_text(json.dumps(header))
    read = load_task(tmp_path / "task.json")
    assert (read.name, read.metric, read.stop, read.max_new_tokens) == ("mine", "f1", ("x",), 3)


def test_without_lm_eval_the_package_is_named(monkeypatch):
    found = builtins.__import__

    def missing(name, *rest):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"task lm-eval:gsm8k needs .* pip install 'lm-eval>=0.4.13,<0.5'"):
        load_task("lm-eval:gsm8k")


TINY = """
task: tiny_math
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
description: "Answer with care.\\n\\n"
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_target: "{{{{a}}}}"
num_fewshot: 2
fewshot_config: {{sampler: first_n}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
generation_kwargs: {{until: ["Question:"]}}
"""


def test_prompts_are_those_that_lm_eval_makes(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval, which is optional, is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for part, numbers in (("train", range(5)), ("test", (100, 101))):
        items = docs(*numbers, answer="it is\n#### {}")
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tiny_math.yaml").write_text(TINY.format(folder=tmp_path))
    (tmp_path / "task.json").write_text('{"format": "lm-eval", "task": "tiny_math", "include": "."}')
    read = load_task(tmp_path / "task.json")
    assert (read.metric, len(read.calibration), len(read.test), read.stop) == ("math", 3, 2, ("Question:",))
    theirs = tasks.TaskManager(include_path=str(tmp_path)).load("tiny_math")["tasks"]["tiny_math"]
    for example, document in zip(read.test, theirs.test_docs(), strict=True):
        assert render(example, read) == theirs.fewshot_context(document, 2)


def test_an_unknown_name_and_a_group_are_told_apart():
    pytest.importorskip("lm_eval.tasks", reason="lm-eval, which is optional, is not installed")
    with pytest.raises(ValueError, match="task lm-eval:nonsense is unknown to lm-eval: name one task"):
        load_task("lm-eval:nonsense")
    with pytest.raises(ValueError, match="task lm-eval:mmlu is a group of tasks: name one task"):
        load_task("lm-eval:mmlu")
