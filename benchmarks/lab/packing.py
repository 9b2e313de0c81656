"""Packs documents into rows of 257 tokens: the inputs are the first 256 tokens of a row, the targets the last 256.

Documents stand one after another without a mask between them; a row never cuts one. Beside every token stands what
kind of answer it belongs to, or 0 where nothing is to be learned: the loss counts answers and their end only.
Trivia documents are short and fill the gaps, so that the kinds stay mixed in their overall proportion all the way.
"""

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from benchmarks.lab.corpus import Document, Phase

ROW_TOKENS = 257
KINDS = {"trivia": 1, "math": 2, "code": 3, "drill": 4}


@dataclass(frozen=True)
class Rows:
    """Packed training data.

    Attributes:
        tokens: [rows, 257] int16 token ids, 0 where a row has room left.
        kinds: [rows, 257] int8, 1 + index of the kind of answer a token belongs to, 0 where it is not learned.
    """

    tokens: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class _Encoded:
    tokens: list[int]
    kinds: list[int]


def pack(documents: dict[str, list[Document]], tokenizer: Tokenizer, phase: Phase) -> Rows:
    """Encodes, interleaves and shuffles a phase's documents; the same input gives the same rows."""
    rng = random.Random(1)
    encoded = {kind: _encode(documents[kind], kind, tokenizer, phase) for kind in KINDS}
    short = encoded["trivia"]
    long = encoded["math"] + encoded["code"] + encoded["drill"]
    rng.shuffle(short)
    rng.shuffle(long)
    rows = _interleave(short, long)
    tokens = np.zeros((len(rows), ROW_TOKENS), dtype=np.int16)
    kinds = np.zeros((len(rows), ROW_TOKENS), dtype=np.int8)
    for i, row in enumerate(rows):
        filled = [token for document in row for token in document.tokens]
        tokens[i, : len(filled)] = filled
        kinds[i, : len(filled)] = [kind for document in row for kind in document.kinds]
    order = np.random.RandomState(0).permutation(len(rows))
    return Rows(tokens[order], kinds[order])


def _encode(documents: list[Document], kind: str, tokenizer: Tokenizer, phase: Phase) -> list[_Encoded]:
    """Begin, prompt, completion, end; prompt and completion are encoded apart, as they are when answering."""
    prompts = tokenizer.encode_batch([document.prompt for document in documents], add_special_tokens=False)
    completions = tokenizer.encode_batch([document.completion for document in documents], add_special_tokens=False)
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    results_only = kind == "drill" and not phase.learns_drill_questions
    encoded = []
    for prompt, completion in zip(prompts, completions, strict=True):
        answer = [*completion.ids, end]
        if results_only:
            answer_kinds = [KINDS[kind] if learned else 0 for learned in _results(answer, tokenizer)]
        else:
            answer_kinds = [KINDS[kind]] * len(answer)
        encoded.append(
            _Encoded([begin, *prompt.ids, *answer], [0] * (1 + len(prompt.ids)) + answer_kinds),
        )
    return encoded


def _results(answer: list[int], tokenizer: Tokenizer) -> list[bool]:
    """For `a + b = c.` equations: True for the tokens of c and the full stop after it."""
    equals = tokenizer.token_to_id("Ġ=")
    stop = tokenizer.token_to_id(".")
    learned, in_result = [], False
    for token in answer:
        learned.append(in_result)
        if token == equals:
            in_result = True
        elif token == stop:
            in_result = False
    return learned


def _interleave(short: list[_Encoded], long: list[_Encoded]) -> list[list[_Encoded]]:
    """Fills rows so that both streams run out together; short documents fill what a long one leaves over."""
    short, long = short[::-1], long[::-1]
    short_total, long_total = (sum(len(document.tokens) for document in stream) for stream in (short, long))
    short_left, long_left = short_total, long_total
    rows: list[list[_Encoded]] = [[]]
    room = ROW_TOKENS

    def place(document: _Encoded) -> int:
        nonlocal room
        size = len(document.tokens)
        if size > ROW_TOKENS:
            raise ValueError(f"a document of {size} tokens does not fit a row of {ROW_TOKENS}")
        if size > room:
            rows.append([])
            room = ROW_TOKENS
        rows[-1].append(document)
        room -= size
        return size

    while short or long:
        if long and (not short or long_left / long_total >= short_left / short_total):
            while short and len(long[-1].tokens) > room >= len(short[-1].tokens):
                short_left -= place(short.pop())
            long_left -= place(long.pop())
        else:
            short_left -= place(short.pop())
    return rows
