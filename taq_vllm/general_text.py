"""General text for calibration: what `--mix-general RATIO --general-data FILE` reads.

Task data alone can fit a quantizer to the task's own wording (arXiv 2607.00908); a share of other text holds against
that. Three kinds of file are taken: plain text (`.txt`), which is cut into pieces of equal length; JSON lines with
`text` (or `prompt`, or `question`); and a task's header, whose calibration examples are used as they are.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import Task, TokenizedExample, load_task

_FIELDS = ("text", "prompt", "question")
_LEAST_TOKENS = 16  # of a piece of plain text


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
    def _texts(self) -> list[str]:
        try:
            content = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
        if self.path.suffix != ".jsonl":
            return [content] if content.strip() else []
        lines = enumerate(content.split("\n"), start=1)
        return [_text(line, f"{self.path}, line {number}") for number, line in lines if line.strip()]

    @property
    def sha256(self) -> str:
        """Of what is read."""
        if self._task is not None:
            assert self._task.calibration_sha256 is not None or not self._task.calibration
            return self._task.calibration_sha256 or ""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

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
                pieces = [tokenizer(text).input_ids[:limit] for text in self._texts]
            else:
                ids = tokenizer(self._texts[0], verbose=False).input_ids
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


def _text(line: str, where: str) -> str:
    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); each line must be one whole object") from error
    for field in _FIELDS:
        if isinstance(item, dict) and isinstance(item.get(field), str) and item[field].strip():
            return item[field]
    raise ValueError(f"{where}: has no text; each line must be an object with {' or '.join(_FIELDS)}")
