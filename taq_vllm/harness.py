"""Tasks of EleutherAI's lm-evaluation-harness, by name, as items that a plain JSONL file would hold.

`lm-eval:gsm8k` in place of a task file, or a header with `format: lm-eval`, `task: gsm8k` and, for tasks of one's own,
`include: FOLDER` with their YAML files. Prompts, targets, few-shot examples, stop strings and lengths are the
harness's; the metric is this project's nearest, so a value may differ from the harness's by normalisation and filters:

    exact_match, em -> math where every gold target has `#### N`, else em;  f1 -> f1;  pass_at_1, pass_at_k -> pass@1

Calibration examples are the training documents (else the validation documents, where there are test documents), the
first 1024; test examples are the test documents, else the validation documents. Few-shot examples are the first of the
harness's few-shot documents (the harness draws them anew for every item) and are missing in the calibration set and
in the test set, which `tasks.py` warns of.
Optional: needs `pip install lm-eval` and the task's data, on disk or from the Hugging Face hub.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from taq_vllm.readers import Record

PREFIX = "lm-eval:"

_CALIBRATION_DOCS = 1024  # twice the paper's; some training sets have 100,000
_DEFAULT_TOKENS = 256  # the harness's own default
_METRICS = {
    "exact_match": "em",
    "em": "em",
    "f1": "f1",
    "pass_at_1": "pass@1",
    "pass_at_k": "pass@1",
    "pass@1": "pass@1",
}


@dataclass(frozen=True)
class HarnessTask:
    """What a task of the harness says, in this project's terms.

    Attributes:
        metric: em, f1, math or pass@1.
        calibration: items; may be empty.
        test: items; may be empty.
        shots: completed examples before every prompt.
        description: text before everything.
        separator: between examples.
        stop: strings that end an output.
        max_new_tokens: longest output.
    """

    metric: str
    calibration: tuple[Record, ...]
    test: tuple[Record, ...]
    shots: tuple[Record, ...]
    description: str
    separator: str
    stop: tuple[str, ...]
    max_new_tokens: int


def load(name: str, include: str | None = None, metric: str | None = None, few_shot: int | None = None) -> HarnessTask:
    """Load a task of the harness and its data.

    Args:
        name: of one task, not a group.
        include: folder with further task files.
        metric: judges outputs, in place of what the task's own metric maps to.
        few_shot: number of examples, in place of the task's own.

    Raises:
        ValueError: lm-eval is not installed, there is no such task, its data cannot be had, or it is of a kind that
            cannot be taken over.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"task {PREFIX}{name} needs the lm-evaluation-harness ({error}): pip install 'lm-eval>=0.4.13,<0.5'"
        ) from error
    manager = TaskManager(include_path=include)
    if name not in manager.all_subtasks:
        what = "a group of tasks" if name in manager.all_tasks else "unknown to lm-eval"
        raise ValueError(f"task {PREFIX}{name} is {what}: name one task; `lm-eval ls subtasks` lists them")
    try:
        tasks = manager.load(name)["tasks"]
    except Exception as error:  # whatever the hub's client, a data set's builder or a task's own code raises
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"lm-eval cannot load {name} ({type(error).__name__}: {reason}): its data must be in the Hugging Face "
            'cache or reachable; `python -c "from lm_eval.tasks import TaskManager; '
            f"TaskManager().load('{name}')\"` fetches it"
        ) from error
    return adapt(tasks[name], name, metric, few_shot)


def adapt(task: Any, name: str, metric: str | None = None, few_shot: int | None = None) -> HarnessTask:
    """Take over a loaded task object.

    Args:
        task: an `lm_eval.api.task.ConfigurableTask`.
        name: its name.
        metric: see `load`.
        few_shot: see `load`.

    Raises:
        ValueError: a metric or kind of task that has no counterpart here, or fewer few-shot documents than asked for.
    """
    where = f"task {PREFIX}{name}"
    config = task.config
    if config.output_type != "generate_until":
        raise ValueError(
            f"{where} is judged by {config.output_type}, and only generated answers can be judged here: name a "
            "generating variant of it"
        )
    for unlike in ("gen_prefix", "doc_to_image", "doc_to_audio"):
        if getattr(config, unlike, None):
            raise ValueError(f"{where} uses {unlike}, which is not supported: name a plain variant of it")
    description = config.description or ""
    if not isinstance(description, str) or "{{" in description:
        raise ValueError(f"{where} has a description of its own for every item, which is not supported")
    separator = config.fewshot_delimiter
    shots = _shots(task, where, config.num_fewshot or 0 if few_shot is None else few_shot)
    training, testing = _documents(task)
    chosen = metric or _metric(task, where, testing or training)
    shown = {record.item["prompt"] for record in shots}
    # As many more as may be missing afterwards.
    calibration = _records(task, islice(training, _CALIBRATION_DOCS + len(shots)), name, "calibration", chosen)
    generation = config.generation_kwargs or {}
    until = generation.get("until", separator)
    return HarnessTask(
        metric=chosen,
        calibration=tuple(r for r in calibration if r.item["prompt"] not in shown)[:_CALIBRATION_DOCS],
        test=tuple(_records(task, testing, name, "test", chosen)),
        shots=tuple(shots),
        description=description,
        separator=separator,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        max_new_tokens=int(generation.get("max_gen_toks", _DEFAULT_TOKENS)),
    )


def _documents(task: Any) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    training = task.training_docs() if task.has_training_docs() else ()
    validation = task.validation_docs() if task.has_validation_docs() else ()
    if task.has_test_docs():
        return training or validation, task.test_docs()
    return training, validation


def _metric(task: Any, where: str, documents: Sequence[Mapping[str, Any]]) -> str:
    listed = [entry["metric"] for entry in task.config.metric_list or [{"metric": "exact_match"}]]
    names = [getattr(metric, "__name__", metric) for metric in listed]
    found = next((_METRICS[name] for name in names if name in _METRICS), None)
    if found is None:
        raise ValueError(
            f"{where} is judged by {', '.join(map(str, names))}; known here are {', '.join(_METRICS)}: choose the "
            "nearest of em, f1, math, pass@1 as `metric:` in a header with `format: lm-eval`"
        )
    if found == "em" and documents and all("####" in str(task.doc_to_target(doc)) for doc in documents):
        return "math"
    return found


def _shots(task: Any, where: str, count: int) -> list[Record]:
    if count == 0:
        return []
    documents = list(islice(task.fewshot_docs() or (), count))
    if len(documents) < count:
        raise ValueError(f"{where}: few_shot is {count} and it has {len(documents)} few-shot documents; ask for fewer")
    shots = []
    for place, document in enumerate(documents):
        prompt, target = _prompt(task, document, where), _targets(task, document, where)[0]
        item = {"id": f"shot-{place}", "prompt": prompt, "completion": task.config.target_delimiter + target}
        shots.append(Record(item, f"{where}, few-shot example {place}"))
    return shots


def _records(task: Any, documents: Iterable[Mapping[str, Any]], name: str, part: str, metric: str) -> list[Record]:
    records = []
    for place, document in enumerate(documents):
        where = f"task {PREFIX}{name}, {part} item {place}"
        targets = _targets(task, document, where)
        item: dict[str, Any] = {"id": f"{name}-{part}-{place}", "prompt": _prompt(task, document, where)}
        if metric == "pass@1":
            # Of code, the target is the tests; asked as for a few-shot example it is the solution, in some tasks.
            item["tests"] = ["\n".join(targets)]
            solution = _targets(task, {**document, "is_fewshot": True}, where)
            fields = [document[field] for field in ("canonical_solution", "code") if field in document]
            reference = solution[0] if solution != targets else fields[0] if fields else ""
            if reference:
                item["completion"] = task.config.target_delimiter * (solution != targets) + reference
            if document.get("entry_point"):
                item["entry_point"] = document["entry_point"]
        else:
            item |= {"answers": list(dict.fromkeys(targets)), "completion": task.config.target_delimiter + targets[0]}
        records.append(Record(item, where))
    return records


def _prompt(task: Any, document: Mapping[str, Any], where: str) -> str:
    prompt = task.doc_to_text(document)
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: its prompt is not a text but {type(prompt).__name__}, which is not supported")
    return prompt


def _targets(task: Any, document: Mapping[str, Any], where: str) -> list[str]:
    target = task.doc_to_target(document)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(document)[target]
    targets = [str(entry) for entry in (target if isinstance(target, (list, tuple)) else [target])]
    if not any(text.strip() for text in targets):
        raise ValueError(f"{where}: it has no gold answer, so nothing can be judged or teacher-forced on it")
    return [text for text in targets if text.strip()]
