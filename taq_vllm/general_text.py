"""General text for calibration: what `--mix-general RATIO --general-data FILE` reads.

Task data alone can fit a quantizer to the task's own wording (arXiv 2607.00908); a share of other text holds against
that. Three kinds of file are taken: plain text (`.txt`), which is cut into pieces of equal length; JSON lines with
`text` (or `prompt`, or `question`); and a task's header, whose calibration examples are used as they are. None may
hold a test prompt of the task that is specialised for.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import Task, TokenizedExample, load_task, normalised

_FIELDS = ("text", "prompt", "question")
_LEAST_TOKENS = 16  # of a piece of plain text
_TELLING_WORDS = 4  # shorter prompts ("why?") stand in any text


@dataclass(frozen=True)
class GeneralText:
    """A file of general text.

    Attributes:
        path: the file, or the folder of a task.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ValueError(f"no general data at {self.path}: give a .txt, a .jsonl with `text`, or a task")
        if self._task is None and not self._texts:
            raise ValueError(f"{self.path} holds no text; general data need at least one line of it")

    @cached_property
    def _task(self) -> Task | None:
        return load_task(self.path) if self.path.is_dir() or self.path.suffix in (".yaml", ".yml", ".json") else None

    @cached_property
    def _texts(self) -> dict[int, str]:
        """By the number of the line that it begins in."""
        try:
            content = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        if self.path.suffix != ".jsonl":
            return {1: content} if content.strip() else {}
        lines = enumerate(content.split("\n"), start=1)
        return {number: _text(line, f"{self.path}, line {number}") for number, line in lines if line.strip()}

    @property
    def sha256(self) -> str:
        """Of what is read."""
        if self._task is not None:
            assert self._task.calibration_sha256 is not None or not self._task.calibration
            return self._task.calibration_sha256 or ""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def check_apart(self, task: Task) -> None:
        """Refuse text that gives test prompts of a task away.

        A prompt is found as a whole line (or example), and from four words on also inside of a longer one, in plain
        text across lines. Compared is what `tasks.normalised` makes of both.

        Args:
            task: that is calibrated for and tested on.

        Raises:
            ValueError: a test prompt is in the text; names the line.
        """
        asked = {tuple(normalised(example).split()): example.id for example in task.test}
        beginnings: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for prompt in asked:
            if len(prompt) >= _TELLING_WORDS:
                beginnings.setdefault(prompt[:_TELLING_WORDS], []).append(prompt)
        for document in self._documents():
            words, places = [], []
            for where, text in document:
                of_line = normalised(text).split()
                if tuple(of_line) in asked:
                    raise _given_away(where, task, asked[tuple(of_line)])
                words += of_line
                places += [where] * len(of_line)
            for start in range(len(words) - _TELLING_WORDS + 1):
                for prompt in beginnings.get(tuple(words[start : start + _TELLING_WORDS]), ()):
                    if tuple(words[start : start + len(prompt)]) == prompt:
                        raise _given_away(places[start], task, asked[prompt])

    def _documents(self) -> Iterator[list[tuple[str, str]]]:
        """What is read as one text: its lines, and where they stand."""
        if self._task is not None:
            for example in self._task.calibration:
                yield [(f"{self.path}, example {example.id}", normalised(example))]
        elif self.path.suffix == ".jsonl":
            for number, text in self._texts.items():
                yield [(f"{self.path}, line {number}", text)]
        else:
            lines = enumerate(self._texts[1].split("\n"), start=1)
            yield [(f"{self.path}, line {number}", line) for number, line in lines]

    def sequences(self, model: StreamedModel, count: int, max_tokens: int) -> list[TokenizedExample]:
        """So many examples, evenly spaced over the file; of plain text, pieces of equal length.

        Args:
            model: whose tokenizer is used.
            count: of examples.
            max_tokens: of each; longer ones are cut.

        Raises:
            ValueError: the file has not so much text.
        """
        from transformers import AutoTokenizer

        from taq_vllm.scoring import calibration_sequences

        limit = min(max_tokens, model.config.max_position_embeddings)
        if self._task is not None:
            found = calibration_sequences(model, self._task, len(self._task.calibration), "if present")
        else:
            tokenizer = AutoTokenizer.from_pretrained(model.files.path)
            if self.path.suffix == ".jsonl":
                pieces = [tokenizer(text).input_ids[:limit] for text in self._texts.values()]
            else:
                ids = tokenizer(self._texts[1], verbose=False).input_ids
                length = min(limit, len(ids) // count)
                if length < _LEAST_TOKENS:
                    raise ValueError(
                        f"{self.path} has {len(ids)} tokens, which is too little for {count} examples: give more text, "
                        "or a smaller --mix-general or --examples"
                    )
                pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
            found = [TokenizedExample(ids, len(ids)) for ids in pieces if ids]
        if len(found) < count:
            raise ValueError(
                f"{self.path} has {len(found)} examples and {count} are needed: give more general data, or a smaller "
                "--mix-general or --examples"
            )
        return [found[i * len(found) // count] for i in range(count)]


def _given_away(where: str, task: Task, example: str) -> ValueError:
    return ValueError(
        f"{where}: holds the prompt of {task.path}'s test example {example}; a result on it would prove nothing: "
        "remove it from the general data"
    )


def _text(line: str, where: str) -> str:
    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); each line must be one whole object") from error
    for field in _FIELDS:
        if isinstance(item, dict) and isinstance(item.get(field), str) and item[field].strip():
            return item[field]
    raise ValueError(f"{where}: has no text; each line must be an object with {' or '.join(_FIELDS)}")
