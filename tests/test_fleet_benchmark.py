"""What the fleet benchmark makes of what it saw."""

import json
import os

import pytest
from rich.console import Console

from benchmarks import fleet

LINE = {
    "tasks": 3,
    "up_s": 91.4,
    "answers_equal": 12,
    "answers_equal_after": 12,
    "answers": 12,
    "unknown_model": [404, "NotFoundError"],
    "wrong_key": 401,
    "without_key": {"GET /workers": 401, "POST /invocations": 401},
    "listens_on": {"127.0.0.1": 44},
    "killed": "math",
    "statuses": {"trivia": {"200": 300}, "math": {"200": 120, "500": 2, "503": 40}, "code": {"200": 310}},
    "down_s": 31.6,
}


def table_of(line):
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in fleet.render([json.loads(json.dumps(line))]):
        console.print(part)
    return console.export_text()


def test_a_fleet_that_does_what_it_should_passes():
    assert list(fleet.requirements(LINE).values()) == [True] * 9


@pytest.mark.parametrize(
    ("changes", "which"),
    [
        ({"answers_equal": 11}, [0]),
        ({"answers_equal_after": 11}, [1]),
        ({"unknown_model": [503, "NotFoundError"]}, [2]),
        ({"wrong_key": 200}, [3]),
        ({"without_key": {"GET /workers": 401, "POST /invocations": 200}}, [4]),
        ({"listens_on": {"127.0.0.1": 43, "192.0.2.2": 1}}, [5]),
        ({"listens_on": {}}, [5]),
        ({"statuses": LINE["statuses"] | {"code": {"200": 300, "503": 1}}}, [6]),
        ({"statuses": LINE["statuses"] | {"math": {"200": 1, "ReadError": 1}}}, [7]),
        ({"statuses": LINE["statuses"] | {"math": {"200": 1, "404": 1}}}, [7]),
        ({"down_s": 61}, [8]),
        ({"down_s": None}, [8]),
    ],
)
def test_every_requirement_can_fail(changes, which):
    assert [index for index, holds in enumerate(fleet.requirements(LINE | changes).values()) if not holds] == which


def test_the_table_is_made_from_the_line_alone():
    text = table_of(LINE)
    assert "back after 32 s" in text
    (math,) = (line.split() for line in text.splitlines() if " math " in line)
    assert [cell for cell in math if cell.isdecimal()] == ["120", "42", "0"]
    assert text.count(": yes") == 9


def test_a_server_that_did_not_come_back_is_said_so():
    text = table_of(LINE | {"down_s": None})
    assert "more than the load took" in text
    assert f"it is back within {fleet.MOST_DOWN_S} s: NO" in text
