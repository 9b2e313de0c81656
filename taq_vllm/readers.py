r"""Native files of well-known tasks, turned into the items that a plain JSONL file would hold.

What is read, one record a line, a JSON array, or gzipped (`.gz`) of either:

- `gsm8k` (openai/grade-school-math): question, answer with worked steps and `#### N`. The calculator's annotations
  `<<48/2=24>>` are dropped: they were written for a tool that no model here has.
- `mbpp` (google-research/mbpp): task_id, text, code, test_list, test_setup_code, challenge_test_list (not run, as in
  the usual harnesses); also the sanitized file with prompt and test_imports. The file holds all splits: ids 11-510 are
  the test set, everything else is for calibration and few-shot examples.
- `humaneval` (openai/human-eval): task_id, prompt, canonical_solution, test, entry_point; the test calls `check`.
- `triviaqa` (mandarjoshi90/triviaqa): `{"Data": [{Question, QuestionId, Answer}]}`, or {question, question_id, answer}
  a line as on the Hugging Face hub. Any alias is right; teacher forcing continues with the answer's value.
- `jsonl`: items as they stand (`tasks.py`).

Prompts and stop strings are those of EleutherAI's lm-evaluation-harness 0.4 (gsm8k, mbpp, mbpp_instruct, humaneval,
humaneval_instruct, triviaqa), except that trivia answers may hold full stops and commas ("St. Louis, Missouri") and
that the chat prompts of gsm8k and triviaqa are our own: the harness has none.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Part = Literal["calibration", "test", "few_shot"]

_MBPP_TEST_IDS = range(11, 511)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_FINAL_ANSWER = re.compile(r"####\s*(\S.*)$", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """How a native file is presented to a model where the task's header does not say.

    Attributes:
        metric: judges an output.
        template: prompt; {question} is the item's text and {tests} its tests, one a line.
        completion: of a plain prompt; {completion} is the item's own.
        closing: ends a completion after `template`, and only there.
        stop: strings that end an output of a plain prompt, the first of them a completion; a chat model ends its
            turns itself.
        chat_template: prompt as a user message.
        chat_completion: the assistant's reply.
        max_new_tokens: longest output.
    """

    metric: str | None = None
    template: str | None = None
    completion: str = "{completion}"
    closing: str = ""
    stop: tuple[str, ...] = ()
    chat_template: str | None = None
    chat_completion: str = "{completion}"
    max_new_tokens: int = 64


_FENCED = "```python\n{completion}\n```"
FORMATS: Mapping[str, Format] = {
    "jsonl": Format(),
    "gsm8k": Format(
        metric="math",
        template="Question: {question}\nAnswer:",
        completion=" {completion}",
        stop=("Question:",),
        chat_template="Question: {question}\nEnd with the final number after ####.",
        max_new_tokens=256,
    ),
    "mbpp": Format(
        metric="pass@1",
        template="You are an expert Python programmer, and here is your task: {question} "
        "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",
        closing="\n[DONE]",
        stop=("[DONE]",),
        chat_template="You are an expert Python programmer, and here is your task:\n{question}\n"
        "Your code should pass these tests:\n{tests}",
        chat_completion=_FENCED,
        max_new_tokens=256,
    ),
    "humaneval": Format(
        metric="pass@1",
        template="{question}",
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        chat_template="Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\n{question}\n```",
        chat_completion="```python\n{question}{completion}\n```",
        max_new_tokens=512,
    ),
    "triviaqa": Format(
        metric="em",
        template="Question: {question}\nAnswer:",
        completion=" {completion}",
        stop=("\n",),
        chat_template="{question}\nReply with the answer only.",
    ),
}


@dataclass(frozen=True)
class Record:
    """One item, with the fields of a plain JSONL item, and where it stands."""

    item: dict[str, Any]
    where: str
    """File and line, or file and place in its array, for messages."""


def read_records(file: Path, format: str, part: Part) -> list[Record]:
    """Read a data file.

    Args:
        file: of examples; gzipped files are recognised by their content.
        format: one of `FORMATS`.
        part: what the items are for; decides which split of a file is read that holds several.

    Raises:
        ValueError: a damaged file, or a record that is not of this format; names it and says what was needed.
    """
    records = _objects(file, format)
    if format == "jsonl":
        hint = _hint(records[0].item, format) if records else ""
        if hint and "id" not in records[0].item:
            raise ValueError(f"{records[0].where}: {hint}")
        return records
    read = {"gsm8k": _gsm8k, "mbpp": _mbpp, "humaneval": _humaneval, "triviaqa": _triviaqa}[format]
    items = [
        Record(_converted(read, record, format, place, file), record.where) for place, record in enumerate(records)
    ]
    if format == "mbpp" and items:
        wanted = [r for r in items if (int(r.item["id"].removeprefix("mbpp-")) in _MBPP_TEST_IDS) == (part == "test")]
        if not wanted:
            ids = f"{_MBPP_TEST_IDS.start}-{_MBPP_TEST_IDS.stop - 1}"
            raise ValueError(
                f"{file}: all {len(items)} items are {'outside of' if part == 'test' else 'among'} MBPP's test ids "
                f"{ids}, so none is left for {part}: name the file under the other key, or convert it to plain JSONL"
            )
        return wanted
    return items


def read_text(file: Path) -> str:
    """A text file, also gzipped.

    Raises:
        ValueError: damaged, or not UTF-8.
    """
    data = file.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is a damaged gzip file ({error}): fetch it again") from error
    elif file.suffix == ".gz":
        raise ValueError(f"{file} is named .gz and is not gzipped: fetch it again, or take .gz off its name")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def kind(value: object) -> str:
    """What a JSON value is, for messages: "a list", "a number (7)"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    name = names.get(type(value), "a number")
    return name if value is None or isinstance(value, (dict, list)) else f"{name} ({value!r})"


def string(item: Mapping[str, Any], field: str, where: str, needed: str | None = None) -> str:
    """A field that must be a string with something in it.

    Raises:
        ValueError: it is missing, of another kind, or empty.
    """
    if field not in item:
        raise ValueError(f"{where}: {needed or field} is missing; the item has {', '.join(item) or 'no fields'}")
    value = item[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}, {field}: got {kind(value)}, needs a string; put it in quotes")
    if not value.strip():
        raise ValueError(f"{where}, {field}: got an empty string; fill it in or remove the item")
    return value


def strings(item: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A field that may be missing and otherwise is a list of strings, each with something in it.

    Raises:
        ValueError: it is something else.
    """
    value = item.get(field, [])
    if not isinstance(value, list):
        raise ValueError(f"{where}, {field}: got {kind(value)}, needs a list of strings")
    for entry in value:
        if not isinstance(entry, str):
            raise ValueError(f"{where}, {field}: got {kind(entry)} in the list, needs strings; put it in quotes")
        if not entry.strip():
            raise ValueError(f"{where}, {field}: got an empty string in the list; remove it")
    return tuple(value)


def _objects(file: Path, format: str) -> list[Record]:
    text = read_text(file)
    if format != "jsonl":
        whole = _whole(text)
        if isinstance(whole, dict) and isinstance(whole.get("Data"), list):
            whole = whole["Data"]
        if isinstance(whole, list):
            places = [(f"{file}, item {number}", entry) for number, entry in enumerate(whole, start=1)]
            return [Record(_object(entry, where, format), where) for where, entry in places]
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one whole object"
            ) from error
        records.append(Record(_object(entry, where, format), where))
    return records


def _whole(text: str) -> Any:
    """The text as one JSON value, None where it is several lines of JSON or none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _object(entry: Any, where: str, format: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        fields = "id, prompt and answers" if format == "jsonl" else f"the fields of {format}"
        raise ValueError(f"{where}: got {kind(entry)}; each line must be an object with {fields}")
    return entry


def _converted(
    read: Callable[[dict[str, Any], str, str], dict[str, Any]], record: Record, format: str, place: int, file: Path
) -> dict[str, Any]:
    try:
        return read(record.item, record.where, f"{file.name.partition('.')[0]}-{place}")
    except ValueError as error:
        hint = _hint(record.item, format)
        raise ValueError(f"{error}; {hint}" if hint else str(error)) from error


def _hint(item: Mapping[str, Any], format: str) -> str:
    """What else this item looks like."""
    tells = {
        "humaneval": {"canonical_solution"},
        "mbpp": {"test_list"},
        "triviaqa": {"QuestionId"},
        "triviaqa ": {"question_id", "answer"},
        "gsm8k": {"question", "answer"},
        "jsonl": {"id", "answers"},
    }
    looks = next((name.strip() for name, fields in tells.items() if fields <= item.keys()), None)
    if looks in (None, format):
        return ""
    return f"this looks like {looks}: write `format: {looks}` in the task's header"


def _gsm8k(item: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    question = string(item, "question", where)
    answer = _CALCULATOR.sub("", string(item, "answer", where)).strip()
    final = _FINAL_ANSWER.search(answer)
    if final is None:
        raise ValueError(f"{where}, answer: it must end with '#### N', the final number; got ...{answer[-40:]!r}")
    return {
        "id": name,
        "question": question,
        "answers": [final.group(1).strip().replace(",", "")],
        "completion": answer,
    }


def _mbpp(item: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    sanitized = "text" not in item
    question = string(item, "prompt" if sanitized else "text", where, needed="text (or, in the sanitized file, prompt)")
    number = item.get("task_id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{where}, task_id: got {kind(number)}, needs MBPP's number of the task")
    tests = strings(item, "test_list", where)
    if not tests:
        raise ValueError(f"{where}, test_list: no tests; MBPP's items have three assertions")
    if sanitized:
        setup = "\n".join(strings(item, "test_imports", where))
    else:
        setup = item.get("test_setup_code", "")
        if not isinstance(setup, str):
            raise ValueError(f"{where}, test_setup_code: got {kind(setup)}, needs a string")
    # The files have both kinds of line ends and trailing spaces.
    code = "\n".join(line.rstrip() for line in string(item, "code", where).strip("\r\n").split("\n"))
    return {
        "id": f"mbpp-{number}",
        "question": question.strip(),
        "answers": [code],
        "completion": code,
        "tests": list(tests),
        "test_setup": setup.replace("\r\n", "\n"),
    }


def _humaneval(item: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    prompt = string(item, "prompt", where)
    entry_point = string(item, "entry_point", where)
    test = string(item, "test", where)
    if not re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE):
        raise ValueError(f"{where}, entry_point: got {entry_point!r}, and the prompt defines no such function")
    if not re.search(r"^def check\(", test, re.MULTILINE):
        raise ValueError(f"{where}, test: it must define check(candidate), which is called with {entry_point}")
    return {
        "id": string(item, "task_id", where),
        "question": prompt,
        "completion": string(item, "canonical_solution", where).rstrip(),
        "tests": [f"{test.rstrip()}\n\ncheck({entry_point})\n"],
        "entry_point": entry_point,
    }


def _triviaqa(item: dict[str, Any], where: str, name: str) -> dict[str, Any]:
    # Both layouts with the hub's names; other fields (evidence, search results) are large and not read.
    names = {"Question": "question", "QuestionId": "question_id", "Answer": "answer"}
    item = {names.get(key, key): value for key, value in item.items()}
    converted = {"id": string(item, "question_id", where), "question": string(item, "question", where).strip()}
    if item.get("answer") is None:  # the official test set keeps its answers
        return converted
    if not isinstance(item["answer"], dict):
        raise ValueError(f"{where}, answer: got {kind(item['answer'])}, needs an object with value and aliases")
    answer = {re.sub(r"(?<!^)(?=[A-Z])", "_", key).lower(): value for key, value in item["answer"].items()}
    value = string(answer, "value", f"{where}, answer").strip()
    aliases = [
        alias
        for field in ("aliases", "human_answers", "normalized_aliases")
        for alias in strings(answer, field, f"{where}, answer")
    ]
    return converted | {"answers": list(dict.fromkeys([value, *aliases])), "completion": value}
