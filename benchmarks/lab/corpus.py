"""The lab's data, all of it from one seed: the published task files and the documents of both training phases.

    trivia    closed-book facts of an invented world     trivia.py
    math      word problems with worked equations        math_problems.py
    code      short Python functions with tests          code_problems.py
    drill     plain arithmetic, in training only         math_problems.py

`write_tasks` writes the files under `tasks/` byte for byte. `training_documents` yields what a phase trains on; no
prompt of it is a test or calibration prompt. The phases differ in the trivia worlds, the size of the numbers and the
mixture. The first lab model was trained in two phases, the dense one in a single one of its own; their math and code
tasks are the same.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.lab import code_problems, math_problems, trivia

SEED = 20261121
TEST_ITEMS = 500
CALIBRATION_ITEMS = 512


class Document(NamedTuple):
    """What one training example says: the model reads the prompt and learns the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Mixture:
    """How many documents of each kind there are."""

    trivia: int
    math: int
    code: int
    drill: int


@dataclass(frozen=True)
class Phase:
    """What one training phase reads.

    Attributes:
        number: Of the phase within a recipe.
        seed: Added to the data's, for the documents.
        worlds: Whose facts are asked.
        exposures: Range of the logarithm of how often a fact is seen.
        numbers: Size of the numbers in word problems and drills.
        mixture: Documents of each kind.
        learns_drill_questions: Whether the loss counts all of a drill, or its results only: the operands are
            random, nothing can be learned from them.
    """

    number: int
    seed: int
    worlds: tuple[trivia.World, ...]
    exposures: tuple[float, float]
    numbers: math_problems.Numbers
    mixture: Mixture
    learns_drill_questions: bool


PHASE_1 = Phase(
    number=1,
    seed=7,
    worlds=(trivia.FIRST_WORLD,),
    exposures=(-1.0, 0.8),
    numbers=math_problems.PHASE_1_NUMBERS,
    mixture=Mixture(trivia=300_000, math=47_000, code=18_000, drill=6_000),
    learns_drill_questions=True,
)
PHASE_2 = Phase(
    number=2,
    seed=8,
    worlds=(trivia.FIRST_WORLD, trivia.SECOND_WORLD),
    exposures=(-1.0, 0.8),
    numbers=math_problems.PHASE_2_NUMBERS,
    mixture=Mixture(trivia=120_000, math=38_000, code=18_500, drill=6_500),
    learns_drill_questions=False,
)
DENSE_PHASE = Phase(
    number=1,
    seed=8,
    worlds=(trivia.DENSE_WORLD,),
    exposures=(-0.6, 0.6),
    numbers=math_problems.PHASE_2_NUMBERS,
    mixture=Mixture(trivia=380_000, math=38_000, code=18_000, drill=6_000),
    learns_drill_questions=False,
)


def task_items(phase: Phase = PHASE_2) -> Iterator[tuple[str, str, list[dict]]]:
    """Yields (task, split, items) for the six task files; an item is a dict in the order of its JSON fields.

    Args:
        phase: The last one of a recipe, whose facts are asked.
    """
    for task, of_splits in (("trivia", _trivia_items(phase)), ("math", _math_items()), ("code", _code_items())):
        for split, items in of_splits.items():
            yield task, split, [{"id": f"{task}-{split}-{i}", **item} for i, item in enumerate(items)]


def write_tasks(out_dir: str | Path, phase: Phase = PHASE_2) -> None:
    """Writes `<task>/<split>.jsonl` for every task and split below `out_dir`."""
    for task, split, items in task_items(phase):
        folder = Path(out_dir) / task
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))


def training_documents(phase: Phase) -> dict[str, list[Document]]:
    """All documents of a phase by kind, unshuffled; kinds in the order trivia, math, code, drill."""
    rng = random.Random(SEED + phase.seed)
    facts = trivia.knowledge_base(SEED, phase.worlds)
    split = trivia.split(facts, SEED + 1, phase.exposures)
    held_out = {item["prompt"] for items in _math_items().values() for item in items}

    trivia_documents = []
    total = sum(split.exposures)
    for fact, wordings, exposure in zip(facts, split.trained_wordings, split.exposures, strict=True):
        expected = phase.mixture.trivia * exposure / total
        times = int(expected) + (rng.random() < expected - int(expected))
        trivia_documents += [Document(*trivia.question(fact, rng.choice(wordings))) for _ in range(times)]

    math_documents: list[Document] = []
    while len(math_documents) < phase.mixture.math:
        problem = math_problems.word_problem(rng, phase.numbers)
        if problem.prompt not in held_out:
            math_documents.append(Document(problem.prompt, problem.completion))

    code_documents: list[Document] = []
    while len(code_documents) < phase.mixture.code:
        composition = code_problems.draw_composition(rng)
        if composition.split == "train":
            function = code_problems.render(rng, composition)
            code_documents.append(Document(function.prompt, function.completion))

    drills = [Document(*math_problems.drill(rng, phase.numbers)) for _ in range(phase.mixture.drill)]
    return {"trivia": trivia_documents, "math": math_documents, "code": code_documents, "drill": drills}


def _trivia_items(phase: Phase) -> dict[str, list[dict]]:
    facts = trivia.knowledge_base(SEED, phase.worlds)
    split = trivia.split(facts, SEED + 1, phase.exposures)
    sources = {"test": split.test[:TEST_ITEMS], "calibration": split.calibration[:CALIBRATION_ITEMS]}
    items: dict[str, list[dict]] = {}
    for name, pairs in sources.items():
        items[name] = []
        for index, wording in pairs:
            prompt, completion = trivia.question(facts[index], wording)
            items[name].append(
                {
                    "prompt": prompt,
                    "answers": [completion.strip()],
                    "completion": completion,
                    "relation": facts[index].relation,
                }
            )
    return items


def _math_items() -> dict[str, list[dict]]:
    rng = random.Random(SEED + 2)
    prompts: set[str] = set()
    items: dict[str, list[dict]] = {}
    for name, count in (("test", TEST_ITEMS), ("calibration", CALIBRATION_ITEMS)):
        items[name] = []
        while len(items[name]) < count:
            problem = math_problems.word_problem(rng, PHASE_2.numbers)
            if problem.prompt not in prompts:
                prompts.add(problem.prompt)
                items[name].append(
                    {
                        "prompt": problem.prompt,
                        "answers": [problem.answer],
                        "completion": problem.completion,
                        "steps": problem.steps,
                    }
                )
    return items


def _code_items() -> dict[str, list[dict]]:
    rng = random.Random(SEED + 3)
    used: set[code_problems.Composition] = set()
    items: dict[str, list[dict]] = {}
    for name, count in (("test", TEST_ITEMS), ("calibration", CALIBRATION_ITEMS)):
        items[name] = []
        while len(items[name]) < count:
            composition = code_problems.draw_composition(rng)
            if composition.split != name or composition in used:
                continue
            function = code_problems.render(rng, composition)
            tests = code_problems.draw_tests(rng, composition, function)
            if tests is None:
                continue
            used.add(composition)
            items[name].append(
                {
                    "prompt": function.prompt,
                    "answers": [function.completion.strip()],
                    "completion": function.completion,
                    "tests": tests,
                    "entry_point": function.name,
                    "family": composition.family,
                    "n_ops": len(composition.operations),
                }
            )
    return items
