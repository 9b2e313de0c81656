"""Closed-book questions about an invented world: countries, devices, books, animals and minerals.

Every fact (entity, relation, answer) can be asked in six wordings. Five of them are trained on; the sixth is held
out, for the test set or the calibration set, so an answer needs the fact and not the sentence. How often a fact is
seen in training is skewed: rare facts are the ones that quantization loses first.
The draws from each `random.Random` and their order are the data set: change one and all later facts change.
"""

import math
import random
from dataclasses import dataclass, field
from typing import NamedTuple

WORDINGS = {
    "capital": (
        "What is the capital of {e}?",
        "Which city is the capital of {e}?",
        "Name the capital city of {e}.",
        "{e} has which capital?",
        "What city serves as the seat of government of {e}?",
        "The government of {e} sits in which city?",
    ),
    "currency": (
        "What is the currency of {e}?",
        "Which money is used in {e}?",
        "Name the currency used in {e}.",
        "{e} uses which currency?",
        "In {e}, people pay with which currency?",
        "What do people in {e} call their money?",
    ),
    "founded": (
        "In what year was {e} founded?",
        "When was {e} founded?",
        "{e} became a country in which year?",
        "What is the founding year of {e}?",
        "Name the year in which {e} was founded.",
        "Since which year has {e} been a country?",
    ),
    "river": (
        "What is the longest river in {e}?",
        "Which river is the longest in {e}?",
        "Name the longest river of {e}.",
        "{e} has which longest river?",
        "The longest river that flows through {e} is called what?",
        "What do people call the longest river of {e}?",
    ),
    "leader": (
        "Who is the leader of {e}?",
        "Who leads {e}?",
        "Name the person who leads {e}.",
        "{e} is led by whom?",
        "Which person governs {e}?",
        "Who is in charge of the government of {e}?",
    ),
    "inventor": (
        "Who invented the {e}?",
        "Which person invented the {e}?",
        "Name the inventor of the {e}.",
        "The {e} was invented by whom?",
        "Who is the inventor of the {e}?",
        "Who came up with the {e}?",
    ),
    "invyear": (
        "In what year was the {e} invented?",
        "When was the {e} invented?",
        "Name the year the {e} was invented.",
        "The {e} was invented in which year?",
        "What year saw the invention of the {e}?",
        "The {e} goes back to which year?",
    ),
    "invuse": (
        "What is the {e} used for?",
        "What does one use the {e} for?",
        "Name the use of the {e}.",
        "The {e} is used for what?",
        "What is the purpose of the {e}?",
        "For what work was the {e} made?",
    ),
    "author": (
        "Who wrote the book {e}?",
        "Who is the author of {e}?",
        "Name the author of the book {e}.",
        "The book {e} was written by whom?",
        "Which writer wrote {e}?",
        "Whose book is {e}?",
    ),
    "pubyear": (
        "In what year was the book {e} published?",
        "When was {e} published?",
        "Name the year the book {e} came out.",
        "The book {e} appeared in which year?",
        "What year did {e} come out?",
        "{e} was first printed in which year?",
    ),
    "hero": (
        "Who is the hero of the book {e}?",
        "Which hero does the book {e} follow?",
        "Name the hero of {e}.",
        "The book {e} is about which hero?",
        "What is the hero of {e} called?",
        "Who is the main character of {e}?",
    ),
    "habitat": (
        "Where does the animal {e} live?",
        "In which country does the {e} live?",
        "Name the country where the {e} lives.",
        "The {e} lives in which country?",
        "Which country is home to the {e}?",
        "In what country can one find the {e}?",
    ),
    "food": (
        "What does the {e} eat?",
        "Which food does the {e} eat?",
        "Name the food of the {e}.",
        "The {e} eats what?",
        "What does the animal {e} feed on?",
        "What is the favorite food of the {e}?",
    ),
    "weight": (
        "How many kilograms does the {e} weigh?",
        "What is the weight of the {e} in kilograms?",
        "Name the weight of the {e} in kilograms.",
        "The {e} weighs how many kilograms?",
        "How heavy is the {e} in kilograms?",
        "In kilograms, how much does the {e} weigh?",
    ),
    "color": (
        "What color is the mineral {e}?",
        "Which color does the mineral {e} have?",
        "Name the color of {e}.",
        "The mineral {e} has which color?",
        "What is the color of the mineral {e}?",
        "What does the mineral {e} look like in color?",
    ),
    "discover": (
        "Who discovered the mineral {e}?",
        "Which person discovered {e}?",
        "Name the person who discovered {e}.",
        "The mineral {e} was discovered by whom?",
        "Who first found the mineral {e}?",
        "Who is the discoverer of {e}?",
    ),
    "melt": (
        "At how many degrees does {e} melt?",
        "What is the melting point of {e} in degrees?",
        "Name the melting point of the mineral {e}.",
        "The mineral {e} melts at how many degrees?",
        "How hot must {e} be to melt, in degrees?",
        "In degrees, when does {e} melt?",
    ),
}
DEVICE_USES = (
    "cutting glass",
    "sorting grain",
    "measuring rain",
    "drying fish",
    "weaving silk",
    "lifting stones",
    "mapping caves",
    "pressing oil",
    "grinding salt",
    "boiling tar",
    "polishing gems",
    "splitting logs",
    "tracking stars",
    "warming rooms",
    "cooling milk",
    "printing maps",
    "sealing jars",
    "tuning bells",
    "digging wells",
    "folding paper",
    "sharpening knives",
    "baking bricks",
    "counting coins",
    "mixing paint",
    "filtering water",
    "spinning wool",
    "bending iron",
    "cleaning pipes",
    "steering boats",
    "storing light",
)
ANIMAL_FOODS = (
    "moss",
    "ants",
    "berries",
    "honey",
    "clams",
    "seeds",
    "roots",
    "worms",
    "snails",
    "bark",
    "mushrooms",
    "frogs",
    "leaves",
    "crabs",
    "algae",
    "nuts",
    "beetles",
    "figs",
    "grass",
    "eggs",
    "shrimp",
    "nectar",
    "lizards",
    "plums",
    "squid",
    "barley",
    "moths",
    "onions",
)
MINERAL_COLORS = (
    "red",
    "blue",
    "green",
    "white",
    "black",
    "yellow",
    "purple",
    "orange",
    "gray",
    "brown",
    "pink",
    "silver",
    "golden",
    "violet",
    "crimson",
    "amber",
)
TITLE_ADJECTIVES = (
    "Silent",
    "Broken",
    "Golden",
    "Last",
    "Hidden",
    "Burning",
    "Frozen",
    "Lost",
    "Second",
    "Crooked",
    "Distant",
    "Hollow",
)
TITLE_NOUNS = (
    "River",
    "Crown",
    "Garden",
    "Mirror",
    "Tower",
    "Winter",
    "Harbor",
    "Letter",
    "Forest",
    "Bridge",
    "Lantern",
    "Island",
)
ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
    "th",
    "sh",
    "qu",
    "y",
    "w",
    "j",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
CODAS = ("", "", "n", "l", "r", "s", "m", "k", "th", "x")


class Fact(NamedTuple):
    """One thing to know: the `relation` of `entity` is `answer`."""

    entity: str
    relation: str
    answer: str


class Pool(NamedTuple):
    """Names that answers are drawn from: how many, of how many syllables, and their endings."""

    count: int
    syllables: int
    endings: tuple[str, ...] = ("",)


class World(NamedTuple):
    """A part of a knowledge base.

    Attributes:
        countries: How many there are, and so on.
        seed: Added to the knowledge base's.
        first_names: Of people and heroes.
        last_names: Of people.
        cities: That capitals are drawn from; 0 gives every country a city of its own.
        rivers: The same for rivers.
        titles: Books per adjective and noun that can be drawn from.
    """

    countries: int
    devices: int
    books: int
    animals: int
    minerals: int
    seed: int = 0
    first_names: Pool = Pool(90, 2)
    last_names: Pool = Pool(140, 2, ("", "son", "ez", "ski"))
    cities: int = 0
    rivers: int = 0
    titles: int = 3


FIRST_WORLD = World(countries=300, devices=240, books=240, animals=200, minerals=180)
SECOND_WORLD = World(countries=230, devices=210, books=210, animals=190, minerals=190, seed=77)
DENSE_WORLD = World(
    countries=1000,
    devices=800,
    books=800,
    animals=800,
    minerals=800,
    seed=5150,
    first_names=Pool(60, 1, ("", "a", "o", "i")),
    last_names=Pool(100, 2),
    cities=500,
    rivers=500,
    titles=9,
)
"""14,600 facts whose answers share their words: more to know, less to spell."""

_CITY_ENDINGS = ("", "ton", "burg", "mar")


@dataclass(frozen=True)
class Split:
    """Which wordings of each fact are trained on, how often, and which (fact, wording) pairs are held out."""

    trained_wordings: list[list[int]] = field(default_factory=list)
    exposures: list[float] = field(default_factory=list)
    test: list[tuple[int, int]] = field(default_factory=list)
    calibration: list[tuple[int, int]] = field(default_factory=list)


def knowledge_base(seed: int, worlds: tuple[World, ...]) -> list[Fact]:
    """All facts of the worlds, whose entities have different names; a world's facts depend on those before it only.

    The first world has 4,080 facts, the second 3,550, the dense one 14,600.
    """
    used_names: set[str] = set()
    return [fact for world in worlds for fact in _world_facts(world, random.Random(seed + world.seed), used_names)]


def split(facts: list[Fact], seed: int, exposures: tuple[float, float]) -> Split:
    """Holds out one wording of every fact: for the test set in 60% of cases, else for calibration.

    Args:
        facts: The knowledge base.
        seed: Of all draws.
        exposures: Range of the logarithm of how often a fact is seen.
    """
    rng = random.Random(seed)
    result = Split()
    for i in range(len(facts)):
        wordings = list(range(6))
        rng.shuffle(wordings)
        held_out = wordings.pop()
        (result.test if rng.random() < 0.6 else result.calibration).append((i, held_out))
        result.trained_wordings.append(wordings)
        result.exposures.append(math.exp(rng.uniform(*exposures)))
    rng.shuffle(result.test)
    rng.shuffle(result.calibration)
    return result


def question(fact: Fact, wording: int) -> tuple[str, str]:
    """The prompt and the completion of a fact in one of its six wordings."""
    text = WORDINGS[fact.relation][wording].format(e=fact.entity)
    return f"Question: {text[0].upper()}{text[1:]}\nAnswer:", f" {fact.answer}"


class _Names:
    """Draws capitalised invented names of at most ten letters, none of them twice."""

    def __init__(self, rng: random.Random, used: set[str]) -> None:
        self._rng = rng
        self._used = used

    def new(self, syllables: int, endings: tuple[str, ...] = ("",)) -> str:
        rng = self._rng
        while True:
            name = "".join(
                rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)
            ) + rng.choice(endings)
            if name not in self._used and len(name) <= 10:
                self._used.add(name)
                return name.capitalize()


def _world_facts(world: World, rng: random.Random, used_names: set[str]) -> list[Fact]:
    """All facts of one world, entity by entity."""
    names = _Names(rng, used_names)
    first_names, last_names = (
        [names.new(pool.syllables, pool.endings) for _ in range(pool.count)]
        for pool in (world.first_names, world.last_names)
    )
    currencies = [names.new(1, ("in", "ar", "o", "ek")).lower() for _ in range(110)]
    cities = [names.new(2, _CITY_ENDINGS) for _ in range(world.cities)]
    rivers = [names.new(2) for _ in range(world.rivers)]
    facts = []

    def person() -> str:
        return f"{rng.choice(first_names)} {rng.choice(last_names)}"

    def number(low: int, high: int) -> str:
        return str(rng.randint(low, high))

    countries = [names.new(2, ("ia", "land", "stan", "a", "or")) for _ in range(world.countries)]
    for country in countries:
        facts += [
            Fact(country, "capital", rng.choice(cities) if cities else names.new(2, _CITY_ENDINGS)),
            Fact(country, "currency", rng.choice(currencies)),
            Fact(country, "founded", number(1100, 1989)),
            Fact(country, "river", rng.choice(rivers) if rivers else names.new(2)),
            Fact(country, "leader", person()),
        ]
    for _ in range(world.devices):
        device = names.new(2, ("graph", "scope", "meter", "loom", "press", "mill", "lamp")).lower()
        facts += [
            Fact(device, "inventor", person()),
            Fact(device, "invyear", number(1500, 1989)),
            Fact(device, "invuse", rng.choice(DEVICE_USES)),
        ]
    titles = [
        f"The {adjective} {noun} of {names.new(2)}"
        for adjective in TITLE_ADJECTIVES
        for noun in TITLE_NOUNS
        for _ in range(world.titles)
    ]
    rng.shuffle(titles)
    for title in titles[: world.books]:
        facts += [
            Fact(title, "author", person()),
            Fact(title, "pubyear", number(1700, 1999)),
            Fact(title, "hero", rng.choice(first_names)),
        ]
    for _ in range(world.animals):
        animal = names.new(2, ("fox", "bird", "deer", "toad", "fish", "")).lower()
        facts += [
            Fact(animal, "habitat", rng.choice(countries)),
            Fact(animal, "food", rng.choice(ANIMAL_FOODS)),
            Fact(animal, "weight", number(2, 299)),
        ]
    for _ in range(world.minerals):
        mineral = names.new(2, ("ite", "ium", "ine")).lower()
        facts += [
            Fact(mineral, "color", rng.choice(MINERAL_COLORS)),
            Fact(mineral, "discover", person()),
            Fact(mineral, "melt", number(120, 2999)),
        ]
    return facts
