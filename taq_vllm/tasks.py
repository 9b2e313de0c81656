"""A task: what a deployment is for, as calibration and test examples with a metric.

A task is a small YAML or JSON header that names two JSONL files, for example

    name: trivia
    metric: em                     # em | f1 | math | pass@1
    calibration: calibration.jsonl # relative to the header
    test: test.jsonl
    template: "Question: {question}\\nAnswer:"   # optional; without it a prompt is used as it stands
    chat_template: false           # true: the prompt is one user message of the tokenizer's chat template
    max_new_tokens: 64
    stop: []

and an item is one JSON object a line: `id`, `prompt` or `question`, `answers` (any one is right), `completion` or
`target` (what teacher forcing continues with, leading space or newline included), and for code `tests`,
`entry_point`, `test_setup`. Everything is checked here, once, so that no step trips over an item later.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from taq_vllm.metrics import math_answer

Metric = Literal["em", "f1", "math", "pass@1"]
METRICS: tuple[str, ...] = get_args(Metric)

_QUESTION = "{question}"
_SHOWN_OVERLAPS = 3


@dataclass(frozen=True)
class Example:
    """One item of a task, its prompt as the model sees it (before a chat template, if there is one)."""

    id: str
    prompt: str
    answers: tuple[str, ...]
    """Any one is right."""
    completion: str
    """What teacher forcing continues the prompt with."""
    tests: tuple[str, ...] = ()
    """Python statements, run after the candidate's code; the candidate passes when none raises."""
    entry_point: str | None = None
    """The function that the tests call."""
    test_setup: str = ""
    """Python code between the candidate's and the tests."""


@dataclass(frozen=True)
class Task:
    """Examples to calibrate on, examples to test on, and how an output is judged."""

    name: str
    metric: Metric
    calibration: tuple[Example, ...]
    test: tuple[Example, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    chat_template: bool
    path: Path
    """The header, or the bare JSONL file."""
    calibration_sha256: str | None
    """sha256 of the data file; where the header changes its prompts (template, chat template), of both together."""
    test_sha256: str | None
    """The same of the test file."""


@dataclass(frozen=True)
class TokenizedExample:
    """Token ids of one example: `input_ids[:prompt_len]` is the prompt, the rest what teacher forcing predicts."""

    input_ids: list[int]
    prompt_len: int


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    metric: Metric
    calibration: str | None = None
    test: str | None = None
    template: str | None = None
    chat_template: bool = False
    max_new_tokens: int = Field(default=64, ge=1)
    stop: list[str] = []

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty stop string would end every output at once; remove it")
        return stop


def load_task(path: str | Path, *, metric: Metric | None = None) -> Task:
    """Read a task and check every item of it.

    Args:
        path: a .yaml, .yml or .json header, a folder that holds `task.yaml`, or a bare .jsonl file, which becomes the
            calibration set of a task of that name with metric `em`.
        metric: overrides the header's.

    Raises:
        ValueError: anything missing, malformed or contradictory; names the file, the line, what was got and what is
            needed. Also when a calibration prompt occurs in the test set.
    """
    path = Path(path)
    if metric is not None and metric not in METRICS:
        raise ValueError(f"got metric {metric!r}; there are {', '.join(METRICS)}")
    if path.is_dir():
        path = path / "task.yaml"
    if not path.is_file():
        raise ValueError(
            f"no task at {path}: give a .yaml or .json header, a folder with task.yaml, or a .jsonl of examples"
        )
    if path.suffix == ".jsonl":
        header = _Header(name=path.stem, metric="em", calibration=path.name)
    elif path.suffix in (".yaml", ".yml", ".json"):
        header = _read_header(path)
    else:
        raise ValueError(f"got task {path}; its name must end in .yaml, .yml, .json (a header) or .jsonl (examples)")
    chosen = metric or header.metric
    sets: dict[str, tuple[Example, ...]] = {}
    hashes: dict[str, str | None] = {}
    for part, name in (("calibration", header.calibration), ("test", header.test)):
        file = path.parent / name if name is not None else None
        sets[part] = _read_examples(file, chosen, header.template, path, part) if file else ()
        hashes[part] = _sha256(file, header) if file else None
    _check_disjoint(sets["calibration"], sets["test"], path)
    return Task(
        name=header.name,
        metric=chosen,
        calibration=sets["calibration"],
        test=sets["test"],
        max_new_tokens=header.max_new_tokens,
        stop=tuple(header.stop),
        chat_template=header.chat_template,
        path=path,
        calibration_sha256=hashes["calibration"],
        test_sha256=hashes["test"],
    )


def tokenize(
    examples: Sequence[Example], tokenizer: Any, task: Task, *, with_completion: bool, max_length: int
) -> list[TokenizedExample]:
    """Turn examples into token ids, exactly as evaluation and scoring both need them.

    Args:
        examples: of `task`.
        tokenizer: of the model (transformers); it adds its special tokens to the prompt, or its chat template does.
        task: says whether the chat template is used.
        with_completion: append the completion's tokens and the end-of-sequence token.
        max_length: most tokens that the model takes.

    Raises:
        ValueError: an example longer than `max_length`, or a tokenizer without a chat template or an end token where
            one is needed.
    """
    if task.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{task.path} asks for a chat template and the model's tokenizer has none: set chat_template: false"
        )
    if with_completion and tokenizer.eos_token_id is None:
        raise ValueError("the model's tokenizer has no end-of-sequence token: add eos_token to tokenizer_config.json")
    tokenized = []
    for example in examples:
        if task.chat_template:
            message = [{"role": "user", "content": example.prompt}]
            prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            prompt = tokenizer(example.prompt).input_ids
        if len(prompt) > max_length:
            raise ValueError(
                f"{task.path}, example {example.id}: its prompt has {len(prompt)} tokens, the model takes "
                f"{max_length}; shorten or remove it"
            )
        ids = list(prompt)
        if with_completion:
            ids += [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(ids) > max_length:
            raise ValueError(
                f"{task.path}, example {example.id}: its prompt of {len(prompt)} tokens and its completion of "
                f"{len(ids) - len(prompt)} make {len(ids)}, the model takes {max_length}; shorten or remove it"
            )
        tokenized.append(TokenizedExample(ids, len(prompt)))
    return tokenized


def _read_header(path: Path) -> _Header:
    text = _read_text(path)
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid {path.suffix[1:]}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {_kind(content)}, a task's header is a mapping with name, metric and test")
    try:
        header = _Header(**{str(key): value for key, value in content.items()})
    except ValidationError as error:
        raise ValueError(_header_problem(path, error)) from error
    if header.calibration is None and header.test is None:
        raise ValueError(f"{path}: names neither a calibration nor a test file; add `test: test.jsonl` or the other")
    if header.template is not None and _QUESTION not in header.template:
        raise ValueError(f"{path}, template: got {header.template!r}, which does not contain {_QUESTION}; add it")
    return header


def _header_problem(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key {key!r}; a header has {', '.join(_Header.model_fields)}"
    if first["type"] == "missing":
        return f"{path}: {key} is missing; add it"
    if key == "metric":
        return f"{path}, metric: got {first['input']!r}; there are {', '.join(METRICS)}"
    return f"{path}, {key}: got {first['input']!r}; {first['msg']}"


def _read_examples(file: Path, metric: Metric, template: str | None, header: Path, part: str) -> tuple[Example, ...]:
    if not file.is_file():
        raise ValueError(f"{header}, {part}: there is no file {file}; the name is relative to the header's folder")
    examples: list[Example] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one whole object"
            ) from error
        if not isinstance(item, dict):
            raise ValueError(f"{where}: got {_kind(item)}; each line must be an object with id, prompt and answers")
        example = _example(item, metric, template, where)
        if example.id in line_of:
            raise ValueError(
                f"{where}: id {example.id!r} was already used on line {line_of[example.id]}; ids must differ"
            )
        line_of[example.id] = number
        examples.append(example)
    if not examples:
        raise ValueError(f"{file} holds no examples; it needs one JSON object a line with id, prompt and answers")
    return tuple(examples)


def _example(item: dict[str, Any], metric: Metric, template: str | None, where: str) -> Example:
    identity = _string(item, "id", where)
    # A template is written for the bare question; the item's own prompt may hold a ready-made one.
    fields = ("question", "prompt") if template is not None else ("prompt", "question")
    text = _string(item, fields[0] if fields[0] in item else fields[1], where, needed=" or ".join(fields))
    prompt = text if template is None else template.replace(_QUESTION, text)
    answers = _strings(item, "answers", where)
    tests = _strings(item, "tests", where)
    written = "completion" if "completion" in item else "target"
    completion = _string(item, written, where) if written in item else None
    if metric == "pass@1":
        if not tests:
            raise ValueError(
                f'{where}: metric pass@1 needs tests; add "tests": ["assert ..."] or choose another metric'
            )
        for test in tests:
            try:
                compile(test, "test", "exec")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"{where}, tests: got {test!r}, which is not Python ({error}); correct it") from error
        if completion is None and not answers:
            raise ValueError(f"{where}: no completion and no answers; add a reference solution as either")
    elif not answers:
        raise ValueError(f'{where}: no answers; metric {metric} needs "answers": ["..."] with at least one')
    if metric == "math":
        for answer in answers:
            if math_answer(answer) is None:
                raise ValueError(
                    f"{where}, answers: got {answer!r}, which holds no number; metric math compares numbers"
                )
    return Example(
        id=identity,
        prompt=prompt,
        answers=answers,
        completion=f" {answers[0]}" if completion is None else completion,
        tests=tests,
        entry_point=_string(item, "entry_point", where) if item.get("entry_point") is not None else None,
        test_setup=_string(item, "test_setup", where) if item.get("test_setup") else "",
    )


def _string(item: dict[str, Any], field: str, where: str, needed: str | None = None) -> str:
    if field not in item:
        raise ValueError(f"{where}: {needed or field} is missing; the item has {', '.join(item) or 'no fields'}")
    value = item[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}, {field}: got {_kind(value)}, needs a string; put it in quotes")
    if not value.strip():
        raise ValueError(f"{where}, {field}: got an empty string; fill it in or remove the line")
    return value


def _strings(item: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = item.get(field, [])
    if not isinstance(value, list):
        raise ValueError(f"{where}, {field}: got {_kind(value)}, needs a list of strings")
    for entry in value:
        if not isinstance(entry, str):
            raise ValueError(f"{where}, {field}: got {_kind(entry)} in the list, needs strings; put it in quotes")
        if not entry.strip():
            raise ValueError(f"{where}, {field}: got an empty string in the list; remove it")
    return tuple(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    kind = names.get(type(value), "a number")
    return kind if value is None or isinstance(value, (dict, list)) else f"{kind} ({value!r})"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _sha256(file: Path, header: _Header) -> str:
    digest = hashlib.sha256(file.read_bytes())
    if header.template is not None or header.chat_template:
        digest.update(json.dumps([header.template, header.chat_template]).encode())
    return digest.hexdigest()


def _normalised_sha256(prompt: str) -> str:
    """Case, white space and Unicode forms do not make a prompt another one; digits and operators do."""
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).encode()).hexdigest()


def _check_disjoint(calibration: Sequence[Example], test: Sequence[Example], path: Path) -> None:
    seen = {_normalised_sha256(example.prompt): example.id for example in calibration}
    overlaps = [
        f"{seen[digest]} = {example.id}" for example in test if (digest := _normalised_sha256(example.prompt)) in seen
    ]
    if overlaps:
        shown = ", ".join(overlaps[:_SHOWN_OVERLAPS])
        more = f" and {len(overlaps) - _SHOWN_OVERLAPS} more" if len(overlaps) > _SHOWN_OVERLAPS else ""
        raise ValueError(
            f"{path}: {len(overlaps)} test prompts are in the calibration set ({shown}{more}); a result on them would "
            "prove nothing: remove them from one of the two files"
        )
