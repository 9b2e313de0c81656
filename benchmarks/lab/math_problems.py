"""Word problems of two to four steps, whose answer is the worked equations and then `#### n`.

A story starts with a number of things, gains and loses some, and ends in a question; every sentence that changes
the total adds one equation. Some stories contain a number that does not matter. `drill` makes the plain arithmetic
practice that is mixed into training. The two training phases differ only in their `Numbers`: the second uses
smaller ones, because the first phase learned the form of the problems and not the arithmetic.
The draws from the `random.Random` and their order are the data set: change one and all later problems change.
"""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

NAMES = (
    *("Tom", "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate"),
    *("Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Adam", "Lucy"),
)
FEMALE = frozenset(("Anna", "Clara", "Emma", "Grace", "Iris", "Kate", "Mia", "Olga", "Rosa", "Tina", "Wendy", "Lucy"))
THINGS = (
    *("apples", "marbles", "books", "coins", "pencils", "cookies", "stickers", "shells", "stamps", "cards"),
    *("buttons", "flowers", "balloons", "candies", "toys", "eggs", "oranges", "beads"),
)
BOXES = ("boxes", "bags", "packs", "baskets", "trays", "jars")


class Mixed(NamedTuple):
    """A number from range `often` with probability `p`, else from range `otherwise`."""

    p: float
    often: tuple[int, int]
    otherwise: tuple[int, int]


@dataclass(frozen=True)
class Numbers:
    """How large the numbers of the problems are; ranges include both ends."""

    start: tuple[int, int]
    first_box: tuple[int, int]
    gain: tuple[int, int] | Mixed
    most_lost: int
    most_multiplied: int
    factors: tuple[int, ...]
    most_compared: int
    times: tuple[int, int]
    most_sold: int
    price: tuple[int, int]
    missing: tuple[int, int]
    drill_sum: tuple[Mixed, tuple[int, int] | Mixed]
    drill_difference: tuple[Mixed, int]
    drill_product: tuple[tuple[int, int] | Mixed, tuple[int, int]]
    drill_table: tuple[float, tuple[int, int], tuple[int, int]]


PHASE_1_NUMBERS = Numbers(
    start=(5, 80),
    first_box=(2, 15),
    gain=Mixed(0.6, (2, 60), (2, 20)),
    most_lost=70,
    most_multiplied=99,
    factors=(2, 3, 2, 3, 4, 5),
    most_compared=40,
    times=(2, 5),
    most_sold=150,
    price=(2, 9),
    missing=(3, 60),
    drill_sum=(Mixed(0.4, (2, 400), (2, 99)), (2, 99)),
    drill_difference=(Mixed(0.4, (3, 400), (3, 120)), 99),
    drill_product=(Mixed(0.75, (2, 99), (100, 150)), (2, 9)),
    drill_table=(0.3, (2, 9), (2, 15)),
)
PHASE_2_NUMBERS = Numbers(
    start=(5, 50),
    first_box=(2, 12),
    gain=(2, 30),
    most_lost=30,
    most_multiplied=60,
    factors=(2, 3, 2, 3, 4),
    most_compared=25,
    times=(2, 4),
    most_sold=80,
    price=(2, 6),
    missing=(3, 40),
    drill_sum=(Mixed(0.4, (2, 180), (2, 60)), Mixed(0.5, (2, 60), (2, 30))),
    drill_difference=(Mixed(0.4, (3, 180), (3, 70)), 40),
    drill_product=((2, 80), (2, 5)),
    drill_table=(0.4, (2, 9), (2, 12)),
)


class Problem(NamedTuple):
    """A word problem: its prompt, the worked completion, the final number and the number of equations."""

    prompt: str
    completion: str
    answer: str
    steps: int


def word_problem(rng: random.Random, numbers: Numbers) -> Problem:
    """Draws stories until one has at least two steps and ends at 999 or less."""
    while True:
        problem = _Story(rng, numbers).tell()
        if problem is not None:
            return problem


def drill(rng: random.Random, numbers: Numbers) -> tuple[str, str]:
    """Prompt and completion of ten unrelated equations."""
    equations = []
    for _ in range(10):
        operator = rng.choice("+-*+-")
        if operator == "+":
            a, b = (_draw(rng, part) for part in numbers.drill_sum)
        elif operator == "-":
            a = _draw(rng, numbers.drill_difference[0])
            b = rng.randint(2, min(a - 1, numbers.drill_difference[1]))
        else:
            a, b = (_draw(rng, part) for part in numbers.drill_product)
            p_table, *table = numbers.drill_table
            if rng.random() < p_table:
                a, b = (rng.randint(*part) for part in table)
        equations.append(f"{a} {operator} {b} = {_compute(a, operator, b)}.")
    return "Question: Practice.\nAnswer:", f" {' '.join(equations)}"


def _draw(rng: random.Random, numbers: tuple[int, int] | Mixed) -> int:
    """A whole number from a range or a mixture of two."""
    if isinstance(numbers, Mixed):
        numbers = numbers.often if rng.random() < numbers.p else numbers.otherwise
    return rng.randint(*numbers)


def _compute(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


@dataclass
class _Story:
    """One problem while it is being told; each step returns the closing question if it ends the story.

    A step that does not fit the current total returns without a sentence, and another one is drawn.
    """

    rng: random.Random
    numbers: Numbers
    sentences: list[str] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)
    total: int = 0

    def tell(self) -> Problem | None:
        """The finished problem, or None if it came out too short or too large."""
        rng = self.rng
        self.name = rng.choice(NAMES)
        self.things = rng.choice(THINGS)
        self.friend = rng.choice([name for name in NAMES if name != self.name])
        self.he, self.him = ("she", "her") if self.name in FEMALE else ("he", "him")
        steps = rng.choice((2, 2, 3, 3, 3, 4, 4))
        self.begin()
        if rng.random() < 0.18:
            self.distract()
        question = None
        while len(self.equations) < steps and question is None:
            question = rng.choice(self.possible_steps(steps - len(self.equations)))()
        if len(self.equations) < 2 or self.total > 999:
            return None
        if question is None:
            question = rng.choice(
                (
                    f"How many {self.things} does {self.name} have now?",
                    f"How many {self.things} are there in the end?",
                    f"How many {self.things} does {self.he} have left?",
                )
            )
        return Problem(
            prompt=f"Question: {' '.join(self.sentences)} {question}\nAnswer:",
            completion=f" {' '.join(self.equations)} #### {self.total}",
            answer=str(self.total),
            steps=len(self.equations),
        )

    def possible_steps(self, left: int) -> list:
        """Steps to draw from; one that is listed twice is drawn twice as often."""
        steps = [self.gain, self.gain, self.lose, self.lose, self.multiply]
        if left >= 2:
            steps += [self.gain_boxes, self.hand_out, self.compare_and_pool, self.compare_and_pool]
        if left == 1:
            steps += [self.sell, self.sell, self.compare, self.compare, self.need]
        return steps

    def say(self, *variants: str) -> None:
        self.sentences.append(self.rng.choice(variants))

    def equation(self, a: int, operator: str, b: int) -> int:
        result = _compute(a, operator, b)
        self.equations.append(f"{a} {operator} {b} = {result}.")
        return result

    def begin(self) -> None:
        rng, name, things = self.rng, self.name, self.things
        if rng.random() < 0.35:
            boxes, each = rng.randint(2, 9), rng.randint(*self.numbers.first_box)
            kind = rng.choice(BOXES)
            self.say(
                f"{name} has {boxes} {kind} with {each} {things} in each.",
                f"{name} buys {boxes} {kind} of {things}. There are {each} {things} in each of the {kind}.",
                f"There are {boxes} {kind} on the table and each one holds {each} {things}. They belong to {name}.",
            )
            self.total = self.equation(boxes, "*", each)
        else:
            self.total = rng.randint(*self.numbers.start)
            self.say(
                f"{name} has {self.total} {things}.",
                f"{name} starts the day with {self.total} {things}.",
                f"There are {self.total} {things} in the room of {name}.",
                f"{name} collects {self.total} {things}.",
            )

    def distract(self) -> None:
        rng = self.rng
        other_things = [things for things in THINGS if things != self.things]
        self.say(
            f"{self.friend} has {rng.randint(2, 60)} {rng.choice(other_things)}.",
            f"{self.name} is {rng.randint(6, 40)} years old.",
            f"The shop opens at {rng.randint(6, 11)}.",
        )

    def gain(self) -> None:
        more = _draw(self.rng, self.numbers.gain)
        self.say(
            f"{self.he.capitalize()} buys {more} more.",
            f"{self.friend} gives {self.him} {more} more {self.things}.",
            f"Then {self.he} finds {more} {self.things} in the garden.",
            f"On Monday {self.he} gets another {more} {self.things}.",
        )
        self.total = self.equation(self.total, "+", more)

    def lose(self) -> None:
        if self.total < 6:
            return
        lost = self.rng.randint(2, min(self.total - 1, self.numbers.most_lost))
        self.say(
            f"{self.he.capitalize()} gives {lost} of them to {self.friend}.",
            f"{self.he.capitalize()} loses {lost} {self.things}.",
            f"Then {self.he} sells {lost} {self.things}.",
            f"{lost} of the {self.things} are taken away.",
        )
        self.total = self.equation(self.total, "-", lost)

    def multiply(self) -> None:
        if self.total > self.numbers.most_multiplied:
            return
        factor = self.rng.choice(self.numbers.factors)
        in_numbers = f"After a month {self.he} has {factor} times as many {self.things}."
        verb = {2: "doubles", 3: "triples"}.get(factor)
        if verb:
            self.say(f"Then {self.he} {verb} the number of {self.things}.", in_numbers)
        else:
            self.sentences.append(in_numbers)
        self.total = self.equation(self.total, "*", factor)

    def gain_boxes(self) -> None:
        rng = self.rng
        boxes, each, kind = rng.randint(2, 9), rng.randint(2, 12), rng.choice(BOXES)
        self.say(
            f"{self.he.capitalize()} buys {boxes} {kind} with {each} {self.things} in each.",
            f"{boxes} friends give {self.him} {each} {self.things} each.",
        )
        self.total = self.equation(self.total, "+", self.equation(boxes, "*", each))

    def hand_out(self) -> None:
        if self.total < 8:
            return
        friends = self.rng.randint(2, 6)
        if self.total // friends < 2:
            return
        each = self.rng.randint(1, min(12, (self.total - 1) // friends))
        if each < 2:
            return
        self.say(
            f"{self.he.capitalize()} gives {each} {self.things} to each of {friends} friends.",
            f"For {friends} days {self.he} uses {each} {self.things} every day.",
        )
        self.total = self.equation(self.total, "-", self.equation(friends, "*", each))

    def compare(self) -> str | None:
        friends_total = self._friends_total()
        if friends_total is None:
            return None
        self.total = friends_total
        return f"How many {self.things} does {self.friend} have?"

    def compare_and_pool(self) -> str | None:
        friends_total = self._friends_total()
        if friends_total is None:
            return None
        self.total = self.equation(self.total, "+", friends_total)
        return self.rng.choice(
            (
                f"How many {self.things} do {self.name} and {self.friend} have together?",
                f"How many {self.things} do they have in total?",
            )
        )

    def _friends_total(self) -> int | None:
        """What the friend has, told in relation to the story's total."""
        rng, numbers, name, friend, things = self.rng, self.numbers, self.name, self.friend, self.things
        relation = rng.choice(("more", "fewer", "times"))
        if (relation == "fewer" and self.total < 6) or (relation == "times" and self.total > numbers.most_multiplied):
            return None
        if relation == "more":
            difference = rng.randint(2, numbers.most_compared)
            self.sentences.append(f"{friend} has {difference} more {things} than {name}.")
            return self.equation(self.total, "+", difference)
        if relation == "fewer":
            difference = rng.randint(2, min(self.total - 1, numbers.most_compared))
            self.sentences.append(f"{friend} has {difference} fewer {things} than {name}.")
            return self.equation(self.total, "-", difference)
        factor = rng.randint(*numbers.times)
        self.sentences.append(f"{friend} has {factor} times as many {things} as {name}.")
        return self.equation(self.total, "*", factor)

    def sell(self) -> str | None:
        if self.total > self.numbers.most_sold:
            return None
        price = self.rng.randint(*self.numbers.price)
        self.say(
            f"Each one costs {price} dollars.",
            f"{self.he.capitalize()} sells all of them for {price} dollars each.",
        )
        self.total = self.equation(self.total, "*", price)
        return self.rng.choice(
            ("How many dollars is that in total?", f"How much money is that for all the {self.things}?")
        )

    def need(self) -> str:
        needed = self.total + self.rng.randint(*self.numbers.missing)
        self.sentences.append(f"{self.he.capitalize()} needs {needed} {self.things} for a party.")
        self.total = self.equation(needed, "-", self.total)
        return f"How many more {self.things} does {self.he} need?"
