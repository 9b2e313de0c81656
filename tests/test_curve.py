import itertools
from dataclasses import replace

import pytest
from tiny_models import make_tiny

from taq_vllm.allocate import Request, allocate
from taq_vllm.curve import plot, trade_off, write_csv
from taq_vllm.model_files import ModelFiles
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import baseline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=5))


@pytest.fixture(scope="module")
def points(files):
    return trade_off(files, baseline(files, "random"), Request("", granularity="module"))


def test_every_point_of_the_trade_off_is_what_its_budget_gives(files, points):
    fine = Request("", "knapsack", granularity="module")
    for point in points[:: max(1, len(points) // 16)]:
        plan = allocate(files, baseline(files, "random"), replace(fine, budget=f"{point.disk_bytes}B"))
        assert plan.budget.disk_bytes == point.disk_bytes
        assert plan.budget.average_bits == pytest.approx(point.average_bits)
        assert point.gap == 0
    assert all(a.disk_bytes < b.disk_bytes and a.cost > b.cost for a, b in itertools.pairwise(points))


def test_between_far_corners_there_are_plans_of_evenly_spaced_sizes(files):
    scores = baseline(files, "random", granularity="module")
    units = tuple(
        UnitScore(unit=entry.unit, score=0, costs={4: 1.0 + 7 * place % 5, 8: 0.4 + 3 * place % 4 / 10})
        for place, entry in enumerate(scores.units)
    )
    costly = scores.model_copy(update={"units": units, "cost_unit": "nats"})
    only_corners = trade_off(files, costly, Request("", granularity="module"), points=0)
    assert all(point.corner for point in only_corners)
    points = trade_off(files, costly, Request("", granularity="module"), points=40)
    assert [point for point in points if point.corner] == only_corners
    between = [point for point in points if not point.corner]
    assert between
    for point in between:
        low = max((c for c in only_corners if c.disk_bytes < point.disk_bytes), key=lambda c: c.disk_bytes)
        high = min((c for c in only_corners if c.disk_bytes > point.disk_bytes), key=lambda c: c.disk_bytes)
        share = (point.disk_bytes - low.disk_bytes) / (high.disk_bytes - low.disk_bytes)
        assert point.cost >= low.cost + share * (high.cost - low.cost) - 1e-9
        assert point.cost < low.cost


def test_the_file_has_a_line_per_point_and_tells_corners(points, tmp_path):
    write_csv(points, tmp_path / "c.csv")
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[0] == "disk_bytes,average_bits,cost,corner,unit,bits,gap"
    assert [line.split(",")[3] for line in lines[1:]] == [str(int(point.corner)) for point in points]
    plot(points, "nats", "title", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
