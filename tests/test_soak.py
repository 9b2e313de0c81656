"""What the soak benchmark makes of what it saw."""

import json
import os

import pytest
from rich.console import Console

from benchmarks import soak

LINE = {
    "minutes": 10,
    "servers": {
        soak.PLAN: {
            "completed": 1000,
            "failed": 0,
            "aborted": 50,
            "errors": {},
            "memory_bytes": [500, 900, 1000, 1000, 1004, 1006],
        },
        soak.REFERENCE: {
            "completed": 1100,
            "failed": 0,
            "aborted": 60,
            "errors": {},
            "memory_bytes": [500, 900, 1000, 1000, 1012, 1012],
        },
    },
    "malformed": {"no JSON": {"400 400": 3}, "an unknown model": {"404 404": 3}},
    "answers": 16,
    "answers_equal": 16,
}


def judged(plan=None, **changes):
    line = LINE | changes
    line["servers"] = LINE["servers"] | {soak.PLAN: LINE["servers"][soak.PLAN] | (plan or {})}
    return list(soak.requirements(line).values())


def test_growth_is_that_of_the_last_third_over_the_second():
    assert soak.growth(LINE["servers"][soak.PLAN]["memory_bytes"]) == pytest.approx(0.005)


def test_a_server_that_stays_what_it_was_passes():
    assert judged() == [True] * 5


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"plan": {"failed": 1}}, [0]),
        ({"malformed": {"no JSON": {"200 400": 1, "400 400": 2}}}, [1]),
        ({"malformed": {"no JSON": {"500 500": 1}}}, [2]),
        ({"plan": {"memory_bytes": [500, 900, 1000, 1000, 1011, 1012]}}, [3]),
        ({"answers_equal": 15}, [4]),
    ],
)
def test_every_requirement_can_fail(changes, which):
    assert [index for index, holds in enumerate(judged(**changes)) if not holds] == which


def test_the_table_is_made_from_the_line_alone():
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in soak.render([json.loads(json.dumps(LINE))]):
        console.print(part)
    text = console.export_text()
    assert "an unknown model" in text
    assert "(+0.50%; in 16 bits +1.20%): yes" in text
