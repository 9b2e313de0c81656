"""Short Python functions to be written from a sentence, judged by running their tests.

A composition is one to three operations and an ending (`code_operations.py`). It is rendered as an English sentence
and as the one function body that the sentence asks for. Which split a composition may appear in is a hash of its
keys: 6% belong to the test set, 4% to calibration, the rest and all single operations to training, so a test asks
for a combination that was never seen.
The draws from the `random.Random` and their order are the data set: change one and all later problems change.
"""

import random
from dataclasses import dataclass
from hashlib import md5
from typing import NamedTuple

from benchmarks.lab import code_operations as operations_of
from benchmarks.lab.code_operations import Table

VERBS = (
    *("solve", "compute", "process", "transform", "handle", "run"),
    *("make", "get", "apply", "build", "check", "find"),
)
NOUNS = (
    *("list", "values", "data", "numbers", "items", "input"),
    *("result", "task", "step", "case", "thing", "output"),
)
LETTERS = "aeioubcdlmnrst"
WORDS = (
    *("Apple", "banana", "is", "the", "Cat", "dog", "radar", "moon", "level", "Tree"),
    *("a", "stone", "blue", "River", "on", "table", "read", "cat", "noon", "LION"),
)
# List operations that compare with {k} or subtract from it, where a {k} above 9 still leaves something to do.
WIDE_THRESHOLDS = frozenset(("gt", "lt", "clamp", "floor", "fromk"))


class Family(NamedTuple):
    """One type of argument: its share of the problems, its tables, and names for the argument."""

    share: float
    operations: Table
    endings: Table
    arguments: tuple[str, ...]


FAMILIES = {
    "l": Family(
        share=0.58,
        operations=operations_of.LIST_OPERATIONS,
        endings=operations_of.LIST_ENDINGS,
        arguments=("xs", "nums", "values", "lst", "arr"),
    ),
    "s": Family(
        share=0.27,
        operations=operations_of.STRING_OPERATIONS,
        endings=operations_of.STRING_ENDINGS,
        arguments=("s", "text", "word"),
    ),
    "n": Family(
        share=0.15,
        operations=operations_of.NUMBER_OPERATIONS,
        endings=operations_of.NUMBER_ENDINGS,
        arguments=("n", "num", "m"),
    ),
}


@dataclass(frozen=True)
class Composition:
    """What a function does: the family of its argument, one to three operations, and what it returns."""

    family: str
    operations: tuple[str, ...]
    ending: str

    @property
    def split(self) -> str:
        """`train`, `test` or `calibration`; a hash, so that it does not depend on what else is drawn."""
        if len(self.operations) == 1:
            return "train"
        key = repr((self.family, self.operations, self.ending))
        percent = int(md5(key.encode()).hexdigest(), 16) % 100
        return "test" if percent < 6 else "calibration" if percent < 10 else "train"


class Function(NamedTuple):
    """A rendered composition: the prompt, the completion (a newline and the function) and the function's name."""

    prompt: str
    completion: str
    name: str


def draw_composition(rng: random.Random) -> Composition:
    """Draws a family by its share, then operations and an ending, those early in their tables more often."""

    def draw_key(table: Table) -> str:
        weights = [1 / (1 + 0.03 * i) for i in range(len(table))]
        return rng.choices(list(table), weights)[0]

    key = rng.choices(list(FAMILIES), [family.share for family in FAMILIES.values()])[0]
    family = FAMILIES[key]
    count = rng.choice((1, 2, 2, 2, 3, 3, 3))
    operations = tuple(draw_key(family.operations) for _ in range(count))
    return Composition(key, operations, draw_key(family.endings))


def render(rng: random.Random, composition: Composition) -> Function:
    """Draws names, constants and a wording."""
    family = FAMILIES[composition.family]
    argument = rng.choice(family.arguments)
    if rng.random() < 0.75:
        name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    else:
        name = rng.choice(("f", "g", "func", "fn", "foo"))
    phrases, lines = [], []
    parts = [(family.operations, key) for key in composition.operations]
    for table, key in [*parts, (family.endings, composition.ending)]:
        k = rng.randint(2, 9)
        c, c2 = rng.sample(LETTERS, 2)
        if table is operations_of.LIST_OPERATIONS and key in WIDE_THRESHOLDS:
            k = rng.randint(2, 12)
        blanks = {"v": argument, "k": k, "c": c, "c2": c2}
        table_phrases, table_lines = table[key]
        phrases.append(rng.choice(table_phrases).format(**blanks))
        lines += [line.format(**blanks) for line in table_lines]
    prompt = f"Question: Write a python function {name}({argument}) that {_sentence(rng, phrases)}.\nAnswer:"
    body = "".join(f"\n    {line}" for line in lines)
    return Function(prompt, f"\ndef {name}({argument}):{body}", name)


def draw_tests(rng: random.Random, composition: Composition, function: Function) -> list[str] | None:
    """Assertions over 7 random inputs and the empty one, made by running the function.

    Returns:
        6 to 8 assert statements, or None where the function is no fair question: it fails on a non-empty input,
        returns something very long, or always returns the same.
    """
    namespace: dict = {}
    exec(function.completion, namespace)
    inputs = [_draw_input(rng, composition.family) for _ in range(7)]
    if composition.family != "n":
        inputs.append([] if composition.family == "l" else "")
    tests, outputs = [], set()
    for value in inputs:
        try:
            output = namespace[function.name](value)
        except Exception:
            if not value:
                continue
            return None
        if len(repr(output)) > 400:
            return None
        outputs.add(repr(output))
        tests.append(f"assert {function.name}({value!r}) == {output!r}")
    return tests if len(outputs) >= 2 else None


def _sentence(rng: random.Random, phrases: list[str]) -> str:
    """Joins the phrases in the order of execution or, with `after it`, in reverse."""
    *steps, ending = phrases
    style = rng.random()
    if len(steps) == 1:
        return rng.choice(
            (f"{steps[0]} and returns {ending}", f"returns {ending} after it {steps[0]}"),
        )
    if style < 0.45:
        return f"{', then '.join(steps)} and returns {ending}"
    if style < 0.7:
        return f"first {', next '.join(steps)}, and finally returns {ending}"
    return f"returns {ending} after it {', which it does after it '.join(reversed(steps))}"


def _draw_input(rng: random.Random, family: str) -> list[int] | int | str:
    if family == "l":
        return [rng.randint(-9, 20) for _ in range(rng.choice((3, 4, 5, 6, 7, 8, 9)))]
    if family == "n":
        return rng.choice((rng.randint(1, 30), rng.randint(10, 150)))
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice((1, 2, 3, 4, 5))))
