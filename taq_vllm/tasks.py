r"""A task: what a deployment is for, as calibration and test examples with a metric.

A task is a small YAML or JSON header that names data files, for example

    name: trivia
    metric: em                     # em | f1 | math | pass@1; what judges test outputs
    format: jsonl                  # jsonl | gsm8k | mbpp | humaneval | triviaqa (readers.py) | lm-eval (harness.py)
    calibration: calibration.jsonl # relative to the header
    test: test.jsonl
    template: "Question: {question}\nAnswer:"    # optional; {tests} stands for the item's tests
    chat_template: false           # true: the prompt is a user message of the tokenizer's chat template
    system: Answer briefly.        # optional, for chat: the system message
    few_shot: 0                    # completed examples before every prompt; the first of few_shot_file, or of the
    few_shot_file: shots.jsonl     # calibration file, where they are then missing
    separator: "\n\n"              # between them in a plain prompt; a chat has turns
    max_new_tokens: 64
    stop: []                       # of a plain prompt, the first is what completions are taken to end with

and an item of plain JSONL is one object a line: `id`, `prompt`, `question` or `messages` (role and content; a closing
assistant message is the completion), `answers` (any one is right), `completion` or `target` (what teacher forcing
continues with, leading space or newline included; by default a space and the first answer), and for code `tests`,
`entry_point`, `test_setup`. A native format brings its own metric, template, stop strings and length; what the header
says goes first.

Test items need what the metric judges by. Calibration items need a prompt only; whoever reads their answers says so
(`require_labels`). Calibration and test must not share a prompt; of native files, calibration items that are in the
test set as well are left out. Everything else is checked here, once, so that no step trips over an item later.
"""

import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from taq_vllm import harness
from taq_vllm.metrics import math_answer
from taq_vllm.readers import FORMATS, Format, Part, Record, kind, read_records, read_text, string, strings

Metric = Literal["em", "f1", "math", "pass@1"]
METRICS: tuple[str, ...] = get_args(Metric)

_QUESTION = "{question}"
_ROLES = ("system", "user", "assistant")
_SHOWN_OVERLAPS = 3


@dataclass(frozen=True)
class Example:
    """One item of a task."""

    id: str
    prompt: str
    """Text of the item alone: no examples before it, no chat template; of `messages`, the last one's."""
    answers: tuple[str, ...]
    """Any one is right; empty where there are no labels."""
    completion: str
    """What teacher forcing continues the prompt with; empty where there are no labels."""
    tests: tuple[str, ...] = ()
    """Python statements, run after the candidate's code; the candidate passes when none raises."""
    entry_point: str | None = None
    """The function that the tests call."""
    test_setup: str = ""
    """Python code between the candidate's and the tests."""
    messages: tuple[tuple[str, str], ...] = ()
    """Role and content of a conversation that ends with the user, in place of the prompt."""


@dataclass(frozen=True)
class Task:
    """Examples to calibrate on, examples to test on, and how an output is judged."""

    name: str
    metric: Metric | None
    """None where there is nothing to judge: no test set and no metric in the header."""
    calibration: tuple[Example, ...]
    test: tuple[Example, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    chat_template: bool
    path: Path
    """The header, or the bare JSONL file."""
    calibration_sha256: str | None
    """sha256 of the data file; where the header changes its prompts (template, chat, few-shot ...) or how completions
    end (stop), of all together."""
    test_sha256: str | None
    """The same of the test file."""
    system: str | None = None
    """Of a chat, the system message; of plain prompts, how they begin (tasks of lm-eval may have this)."""
    shots: tuple[Example, ...] = ()
    """Completed examples before every prompt."""
    separator: str = "\n\n"
    """Between them in a plain prompt."""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of one example: `input_ids[:prompt_len]` is the prompt, the rest what teacher forcing predicts."""

    input_ids: list[int]
    prompt_len: int


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str | None = Field(default=None, min_length=1)
    metric: Metric | None = None
    format: Literal["jsonl", "gsm8k", "mbpp", "humaneval", "triviaqa", "lm-eval"] = "jsonl"
    task: str | None = None
    include: str | None = None
    calibration: str | None = None
    test: str | None = None
    template: str | None = None
    chat_template: bool = False
    system: str | None = Field(default=None, min_length=1)
    few_shot: int | None = Field(default=None, ge=0)
    few_shot_file: str | None = None
    separator: str = "\n\n"
    max_new_tokens: int | None = Field(default=None, ge=1)
    stop: list[str] | None = None

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str] | None) -> list[str] | None:
        if stop and "" in stop:
            raise ValueError("an empty stop string would end every output at once; remove it")
        return stop

    @property
    def native(self) -> Format:
        """What the format says where the header is silent."""
        return FORMATS[self.format]

    @property
    def patterns(self) -> tuple[str | None, str]:
        """Template of the prompt (None: items' own prompts) and of the completion."""
        if self.chat_template:
            return self.template or self.native.chat_template, self.native.chat_completion
        closing = "" if self.template else self.native.closing
        return self.template or self.native.template, self.native.completion + closing


def load_task(path: str | Path) -> Task:
    """Read a task and check every item of it.

    Args:
        path: a .yaml, .yml or .json header, a folder that holds `task.yaml`, a bare .jsonl file of items, which
            becomes the calibration set of a task of that name without a metric, or `lm-eval:NAME`.

    Raises:
        ValueError: anything missing, malformed or contradictory; names the file, the line, what was got and what is
            needed. Also when a calibration prompt occurs in the test set.
    """
    if str(path).startswith(harness.PREFIX):
        name = str(path).removeprefix(harness.PREFIX)
        return _harness_task(_Header(format="lm-eval", task=name), Path(str(path)))
    path = Path(path)
    if path.is_dir():
        path = path / "task.yaml"
    if not path.is_file():
        raise ValueError(
            f"no task at {path}: give a .yaml or .json header, a folder with task.yaml, a .jsonl of examples, or "
            f"{harness.PREFIX}NAME"
        )
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        header = _Header(name=path.name.partition(".jsonl")[0], calibration=path.name)
    elif path.suffix in (".yaml", ".yml", ".json"):
        header = _read_header(path)
    else:
        raise ValueError(f"got task {path}; its name must end in .yaml, .yml, .json (a header) or .jsonl (examples)")
    if header.format == "lm-eval":
        return _harness_task(header, path)
    metric = header.metric or header.native.metric
    files = {part: path.parent / name for part, name in _parts(header).items()}
    records = {part: _read(file, part, header, path) for part, file in files.items()}
    if header.format != "jsonl" and {"calibration", "test"} <= records.keys():
        records["calibration"] = _without_test(records["calibration"], records["test"], files["calibration"])
    sets = {part: _examples(found, metric if part == "test" else None, header) for part, found in records.items()}
    calibration, test, shots = sets.get("calibration", ()), sets.get("test", ()), sets.get("few_shot", ())
    count = header.few_shot or 0
    if count and "few_shot" not in files:
        shots, calibration = _taken(count, calibration, files["calibration"], path), calibration[count:]
    elif count:
        shots = _taken(count, shots, files["few_shot"], path)
    _check_completed(shots, path)
    _check_disjoint(calibration, test, shots, path)
    stop = header.native.stop if not header.chat_template else ()
    stop = tuple(stop if header.stop is None else header.stop)
    hashes = {part: _sha256(file, header, shots, stop) for part, file in files.items()}
    return Task(
        name=header.name,
        metric=metric,
        calibration=calibration,
        test=test,
        max_new_tokens=header.max_new_tokens or header.native.max_new_tokens,
        stop=stop,
        chat_template=header.chat_template,
        path=path,
        calibration_sha256=hashes.get("calibration"),
        test_sha256=hashes.get("test"),
        system=header.system,
        shots=shots,
        separator=header.separator,
    )


def require_labels(task: Task, examples: Sequence[Example], who: str, *, judged: bool = False) -> None:
    """Check that examples have a completion to teacher-force.

    Args:
        task: theirs.
        examples: that are going to be read.
        who: needs the labels, for the message ("scorer taqo").
        judged: outputs are going to be judged as well: the task needs a metric, and the examples what it judges by.

    Raises:
        ValueError: one has none; names the first and how many lack it.
    """
    if judged and task.metric is None:
        raise ValueError(
            f"{task.path} has no metric and {who} judges outputs: add `metric:` to the header ({', '.join(METRICS)})"
        )
    bare = [example.id for example in examples if not example.completion]
    if bare:
        raise ValueError(
            f"{task.path}: example {bare[0]} has no answers and no completion ({len(bare)} of {len(examples)} have "
            f'none), which {who} needs: add "answers": ["..."] to the items; without labels use --scorer taq or kl'
        )
    if judged:
        for example in examples:
            _check_judged(example, task.metric, f"{task.path}, example {example.id}")


def render(example: Example, task: Task) -> str | list[dict[str, str]]:
    """What the model is given before its answer: a text, or with a chat template the messages of a conversation."""
    if not task.chat_template:
        shots = [shot.prompt + shot.completion for shot in task.shots]
        return (task.system or "") + task.separator.join([*shots, example.prompt])
    turns = [turn for shot in task.shots for turn in (*_turns(shot), ("assistant", shot.completion.lstrip()))]
    own = _turns(example)
    system = [("system", task.system)] if task.system else []
    if own[0][0] == "system":  # an item's own system message replaces the task's
        system, own = [own[0]], own[1:]
    turns = [turn for turn in turns if turn[0] != "system"]
    return [{"role": role, "content": content} for role, content in [*system, *turns, *own]]


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    task: Task,
    *,
    with_completion: bool | Literal["if present"],
    max_length: int,
) -> list[TokenizedExample]:
    """Turn examples into token ids, exactly as evaluation and scoring both need them.

    The prompt is what `render` gives, few-shot examples included. Special tokens come once: from the tokenizer for a
    text, from the chat template for a conversation. A completion is tokenized on its own; behind a chat template, which
    has begun the assistant's turn on a line of its own, it loses the white space that it begins with.

    What ends a completion is what ends an output: a chat's turn and the outputs of tasks without stop strings the
    end-of-sequence token, and a plain prompt's output, which a base model would run on behind, a stop string. This
    text is the first of `stop`, or what ends the few-shot examples if they do end so (a separator with a stop string,
    or one that the next prompt begins with); it is tokenized together with the completion, and missing where the
    completion ends with a stop string already.

    Args:
        examples: of `task`.
        tokenizer: of the model (transformers).
        task: says whether the chat template is used, and gives the few-shot examples.
        with_completion: append the completion's tokens and its end: True needs one in every example, "if present"
            leaves examples without labels as prompts.
        max_length: most tokens that the model takes.

    Raises:
        ValueError: an example longer than `max_length` or without the completion that is needed, or a tokenizer
            without a chat template or an end token where one is needed, or whose chat template takes no such roles.
    """
    if task.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{task.path} asks for a chat template and the model's tokenizer has none: set chat_template: false"
        )
    if with_completion is True:
        require_labels(task, examples, "teacher forcing")
    completed = [bool(with_completion and example.completion) for example in examples]
    ends_with_text = bool(task.stop) and not task.chat_template
    if any(completed) and not ends_with_text and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end-of-sequence token: add eos_token to tokenizer_config.json")
    tokenized = []
    for example, complete in zip(examples, completed, strict=True):
        prompt = _prompt_ids(example, tokenizer, task)
        if len(prompt) > max_length:
            shots = f" ({len(task.shots)} few-shot examples included)" if task.shots else ""
            raise ValueError(
                f"{task.path}, example {example.id}: its prompt has {len(prompt)} tokens{shots}, the model takes "
                f"{max_length}; shorten or remove it"
            )
        ids = list(prompt)
        if complete:
            completion = example.completion.lstrip() if task.chat_template else example.completion
            if ends_with_text and not completion.endswith(task.stop):
                completion += _ending(task)
            ids += tokenizer(completion, add_special_tokens=False).input_ids
            if not ends_with_text:
                ids.append(tokenizer.eos_token_id)
        if len(ids) > max_length:
            raise ValueError(
                f"{task.path}, example {example.id}: its prompt of {len(prompt)} tokens and its completion of "
                f"{len(ids) - len(prompt)} make {len(ids)}, the model takes {max_length}; shorten or remove it"
            )
        tokenized.append(TokenizedExample(ids, len(prompt)))
    return tokenized


def _ending(task: Task) -> str:
    """The text that a plain completion of a task with stop strings is expected to end with."""
    if task.shots:
        shown = task.separator + task.shots[0].prompt
        found = {shown.find(string): string for string in task.stop if string in shown}
        if found and min(found) <= len(task.separator):
            # All of the separator, also behind the stop string: tokenizers may have one token for it.
            return shown[: max(min(found) + len(found[min(found)]), len(task.separator))]
    return task.stop[0]


def _prompt_ids(example: Example, tokenizer: Any, task: Task) -> list[int]:
    prompt = render(example, task)
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(
            f"{task.path}, example {example.id}: the model's chat template refuses a conversation of {roles} "
            f"({error}); leave out what it does not take, often the system message"
        ) from error


def _turns(example: Example) -> list[tuple[str, str]]:
    return list(example.messages) or [("user", example.prompt)]


def _read_header(path: Path) -> _Header:
    text = read_text(path)
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid {path.suffix[1:]}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {kind(content)}, a task's header is a mapping with name, metric and test")
    try:
        header = _Header(**{str(key): value for key, value in content.items()})
    except ValidationError as error:
        raise ValueError(_header_problem(path, error)) from error
    _check_header(path, header)
    return header


def _check_header(path: Path, header: _Header) -> None:
    if header.format == "lm-eval":
        if header.task is None:
            raise ValueError(f"{path}: format lm-eval needs `task: NAME`, for example gsm8k")
        set_here = [key for key in ("calibration", "test", "template", "few_shot_file") if getattr(header, key)]
        if set_here:
            raise ValueError(f"{path}: {set_here[0]} is the lm-eval task's own affair; remove it")
        return
    if header.name is None:
        raise ValueError(f"{path}: name is missing; add it")
    for key in ("task", "include"):
        if getattr(header, key) is not None:
            raise ValueError(f"{path}: {key} belongs to `format: lm-eval`, got format {header.format}; remove one")
    if header.calibration is None and header.test is None:
        raise ValueError(f"{path}: names neither a calibration nor a test file; add `test: test.jsonl` or the other")
    if header.test is not None and (header.metric or header.native.metric) is None:
        raise ValueError(f"{path}: metric is missing; add it ({', '.join(METRICS)}), or leave the test file out")
    if header.template is not None and _QUESTION not in header.template:
        raise ValueError(f"{path}, template: got {header.template!r}, which does not contain {_QUESTION}; add it")
    if header.system is not None and not header.chat_template:
        raise ValueError(f"{path}: a system message needs `chat_template: true`; add it, or put the text in `template`")
    if header.few_shot and not (header.few_shot_file or header.calibration):
        raise ValueError(f"{path}: few_shot {header.few_shot} has no file to come from; add `few_shot_file: FILE`")
    if header.few_shot_file is not None and not header.few_shot:
        raise ValueError(f"{path}: few_shot_file without a number; add `few_shot: N`")


def _header_problem(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key {key!r}; a header has {', '.join(_Header.model_fields)}"
    allowed = {"metric": METRICS, "format": (*FORMATS, "lm-eval")}.get(key)
    if allowed:
        return f"{path}, {key}: got {first['input']!r}; there are {', '.join(allowed)}"
    return f"{path}, {key}: got {first['input']!r}; {first['msg']}"


def _parts(header: _Header) -> dict[Part, str]:
    parts = {"calibration": header.calibration, "test": header.test, "few_shot": header.few_shot_file}
    return {part: name for part, name in parts.items() if name is not None}


def _read(file: Path, part: Part, header: _Header, path: Path) -> list[Record]:
    if not file.is_file():
        key = "few_shot_file" if part == "few_shot" else part
        raise ValueError(f"{path}, {key}: there is no file {file}; the name is relative to the header's folder")
    records = read_records(file, header.format, part)
    if not records:
        raise ValueError(f"{file} holds no examples; it needs one JSON object a line with id, prompt and answers")
    return records


def _without_test(calibration: Sequence[Record], test: Sequence[Record], file: Path) -> list[Record]:
    """Published files may ask a question twice, and nobody should have to edit them."""
    asked = {normalised(record.item["question"]) for record in test}
    kept = [record for record in calibration if normalised(record.item["question"]) not in asked]
    if not kept:
        raise ValueError(f"{file}: all its items are in the test set as well; name another calibration file")
    return kept


def _examples(records: Sequence[Record], judged_by: Metric | None, header: _Header) -> tuple[Example, ...]:
    where_of: dict[str, str] = {}
    examples = []
    for record in records:
        example = _example(record.item, header, record.where)
        if example.id in where_of:
            first = where_of[example.id].rpartition(", ")[2]
            raise ValueError(f"{record.where}: id {example.id!r} was already used on {first}; ids must differ")
        where_of[example.id] = record.where
        _check_tests(example, record.where)
        if judged_by is not None:
            _check_judged(example, judged_by, record.where)
        examples.append(example)
    return tuple(examples)


def _example(item: Mapping[str, Any], header: _Header, where: str) -> Example:
    identity = string(item, "id", where)
    template, completion_pattern = header.patterns
    answers = strings(item, "answers", where)
    tests = strings(item, "tests", where)
    written = "completion" if "completion" in item else "target"
    completion = string(item, written, where) if written in item else None
    messages: tuple[tuple[str, str], ...] = ()
    if "messages" in item:
        messages, reply = _messages(item, header, where)
        if reply is not None and completion is not None:
            raise ValueError(f"{where}: got a {written} and a closing assistant message; keep one of them")
        text, completion = messages[-1][1], completion or reply
    else:
        # A template is written for the bare question; the item's own prompt may hold a ready-made one.
        fields = ("question", "prompt") if template is not None else ("prompt", "question")
        needed = "messages, prompt or question" if header.chat_template else "prompt or question"
        text = string(item, fields[0] if fields[0] in item else fields[1], where, needed=needed)
    parts = {"question": text, "tests": "\n".join(tests)}
    prompt = text
    if template is not None and not messages:
        if "{tests}" in template and not tests:
            raise ValueError(f"{where}: the template shows {{tests}} and the item has no tests; add them")
        prompt = _fill(template, parts)
    if completion is not None:
        completion = _fill(completion_pattern, parts | {"completion": completion})
    elif answers:
        completion = f" {answers[0]}"
    return Example(
        id=identity,
        prompt=prompt,
        answers=answers,
        completion=completion or "",
        tests=tests,
        entry_point=string(item, "entry_point", where) if item.get("entry_point") is not None else None,
        test_setup=string(item, "test_setup", where) if item.get("test_setup") else "",
        messages=messages,
    )


def _messages(item: Mapping[str, Any], header: _Header, where: str) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """A conversation that ends with the user, and the assistant's reply to it, if the item has one."""
    where = f"{where}, messages"
    if not header.chat_template:
        raise ValueError(f"{where}: a conversation needs the model's chat template; set `chat_template: true`")
    if "prompt" in item or "question" in item:
        raise ValueError(f"{where}: the item has a prompt or question as well; keep one of them")
    got = item["messages"]
    if not isinstance(got, list) or not got:
        raise ValueError(f"{where}: got {kind(got)}, needs a list with at least one object of role and content")
    turns = []
    for number, message in enumerate(got):
        if not isinstance(message, dict):
            raise ValueError(f"{where}[{number}]: got {kind(message)}, needs an object with role and content")
        role = string(message, "role", f"{where}[{number}]")
        if role not in _ROLES:
            raise ValueError(f"{where}[{number}], role: got {role!r}; there are {', '.join(_ROLES)}")
        if role == "system" and number > 0:
            raise ValueError(f"{where}[{number}]: a system message must be the first; move it")
        turns.append((role, string(message, "content", f"{where}[{number}]")))
    reply = turns.pop()[1] if turns[-1][0] == "assistant" else None
    if not turns or turns[-1][0] != "user":
        raise ValueError(f"{where}: no message of the user to answer at the end; add it")
    return tuple(turns), reply


def _fill(pattern: str, parts: Mapping[str, str]) -> str:
    """The pattern with its known names filled in, in one pass; other braces stay."""
    return re.sub(r"\{(question|tests|completion)\}", lambda m: parts.get(m.group(1), m.group()), pattern)


def _check_tests(example: Example, where: str) -> None:
    for test in example.tests:
        try:
            compile(test, "test", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{where}, tests: got {test!r}, which is not Python ({error}); correct it") from error


def _check_judged(example: Example, metric: Metric, where: str) -> None:
    """Whether an output for this example can be judged."""
    if metric == "pass@1":
        if not example.tests:
            raise ValueError(
                f'{where}: metric pass@1 needs tests; add "tests": ["assert ..."] or choose another metric'
            )
        if not example.completion:
            raise ValueError(f"{where}: no completion and no answers; add a reference solution as either")
    elif not example.answers:
        raise ValueError(f'{where}: no answers; metric {metric} needs "answers": ["..."] with at least one')
    if metric == "math":
        for answer in example.answers:
            if math_answer(answer) is None:
                raise ValueError(
                    f"{where}, answers: got {answer!r}, which holds no number; metric math compares numbers"
                )


def _taken(count: int, examples: tuple[Example, ...], file: Path, path: Path) -> tuple[Example, ...]:
    if len(examples) < count:
        raise ValueError(f"{path}: few_shot is {count} and {file} has {len(examples)} examples; ask for fewer")
    return examples[:count]


def _check_completed(shots: Sequence[Example], path: Path) -> None:
    for shot in shots:
        if not shot.completion:
            raise ValueError(
                f"{path}: few-shot example {shot.id} has no answers and no completion to show; add them, or name a "
                "file with labels as few_shot_file"
            )


def _harness_task(header: _Header, path: Path) -> Task:
    include = str(path.parent / header.include) if header.include else None
    found = harness.load(header.task, include, header.metric, header.few_shot)
    as_items = header.model_copy(update={"format": "jsonl"})
    metric: Metric = found.metric
    calibration = _examples(found.calibration, None, as_items)
    test = _examples(found.test, metric, as_items)
    shots = _examples(found.shots, None, as_items)
    _check_completed(shots, path)
    stop = tuple(found.stop if header.stop is None else header.stop)
    shown = {normalised(example) for example in shots}
    asked = {normalised(example) for example in test}
    calibration = tuple(example for example in calibration if normalised(example) not in asked | shown)
    test = _without_shots(test, shown, path)
    _check_disjoint(calibration, test, shots, path)
    prompts = [[record.item for record in found.shots], found.description, found.separator]
    prompts += [header.chat_template, header.system, stop]
    digests = [
        hashlib.sha256(json.dumps([[record.item for record in part], *prompts]).encode()).hexdigest()
        for part in (found.calibration, found.test)
    ]
    system = f"{header.system}{found.separator}{found.description}" if header.system else found.description
    return Task(
        name=header.name or header.task,
        metric=metric,
        calibration=calibration,
        test=test,
        max_new_tokens=header.max_new_tokens or found.max_new_tokens,
        stop=stop,
        chat_template=header.chat_template,
        path=path,
        calibration_sha256=digests[0] if calibration else None,
        test_sha256=digests[1] if test else None,
        system=system or None,
        shots=shots,
        separator=found.separator,
    )


def _without_shots(test: tuple[Example, ...], shown: set[str], path: Path) -> tuple[Example, ...]:
    """The harness may take its few-shot examples from the test set, and draws others where one is asked itself."""
    kept = tuple(example for example in test if normalised(example) not in shown)
    if len(kept) == len(test):
        return test
    left_out = f"{path}: {len(test) - len(kept)} of {len(test)} test examples are among the few-shot examples"
    if not kept:
        raise ValueError(f"{left_out}, so none is left to ask: use a smaller few_shot")
    warnings.warn(f"{left_out}, which show their answers; they are left out", stacklevel=4)
    return kept


def _sha256(file: Path, header: _Header, shots: Sequence[Example], stop: tuple[str, ...]) -> str:
    digest = hashlib.sha256(file.read_bytes())
    if header.template is not None or header.chat_template:
        digest.update(json.dumps([header.template, header.chat_template]).encode())
    changes: dict[str, Any] = {}
    if header.format != "jsonl":
        changes |= {"format": header.format, "patterns": header.patterns}
    if header.system is not None:
        changes["system"] = header.system
    if shots:
        changes["shots"] = [[shot.prompt, shot.messages, shot.completion] for shot in shots]
        changes["separator"] = header.separator
    if stop and not header.chat_template:
        changes["stop"] = stop
    if changes:
        digest.update(json.dumps(changes, sort_keys=True).encode())
    return digest.hexdigest()


def normalised(asked: Example | str) -> str:
    """What makes two prompts one: case, white space and Unicode forms do not tell them apart, digits and operators do.

    Args:
        asked: an example, whose prompt or conversation it is, or a text.

    Returns:
        Its words, a space between them.
    """
    if isinstance(asked, Example):
        asked = "\n".join(content for _, content in asked.messages) or asked.prompt
    return " ".join(unicodedata.normalize("NFKC", asked).casefold().split())


def _check_disjoint(
    calibration: Sequence[Example], test: Sequence[Example], shots: Sequence[Example], path: Path
) -> None:
    if found := _common(calibration, test):
        raise ValueError(
            f"{path}: {found[0]} test prompts are in the calibration set ({found[1]}); a result on them would "
            "prove nothing: remove them from one of the two files"
        )
    if found := _common(shots, test):
        raise ValueError(
            f"{path}: {found[0]} test prompts are among the few-shot examples ({found[1]}), which show their answers: "
            "remove them from one of the two files"
        )
    if found := _common(shots, calibration):
        raise ValueError(
            f"{path}: {found[0]} calibration prompts are among the few-shot examples ({found[1]}), which show their "
            "answers: leave few_shot_file out, and the first calibration examples are shown instead"
        )


def _common(first: Sequence[Example], second: Sequence[Example]) -> tuple[int, str] | None:
    """How many of the second's prompts are in the first, and some of them."""
    ids = {normalised(example): example.id for example in first}
    pairs = [f"{ids[key]} = {example.id}" for example in second if (key := normalised(example)) in ids]
    more = f" and {len(pairs) - _SHOWN_OVERLAPS} more" if len(pairs) > _SHOWN_OVERLAPS else ""
    return (len(pairs), ", ".join(pairs[:_SHOWN_OVERLAPS]) + more) if pairs else None
