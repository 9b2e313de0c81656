import json
import sys
from pathlib import Path

import pytest

from benchmarks import large

SMALL = large.Shape("llama-small", 128, 16, 256, 3072, 4, 2)
RESULTS = Path(large.__file__).parent / "results" / "large-cpu.jsonl"


def test_killed_runs_end_with_the_bytes_of_runs_that_were_not(tmp_path):
    twin = large.compare_twin(SMALL, tmp_path, "6.0bits", threads=1, seed=0)
    assert twin["files_that_differ"] == []
    assert twin["files"] > SMALL.layers
    (scored,), quantized = twin["killed_after"]["score"], twin["killed_after"]["quantize"]
    assert 1 <= scored < SMALL.layers
    assert 1 <= quantized[0] < quantized[1] <= SMALL.layers


def _writes(count, seconds):
    """A program that makes a file every so many seconds, going on after those that are there."""
    return (
        "import pathlib, sys, time\n"
        f"for i in range({count}):\n"
        "    file = pathlib.Path(sys.argv[1]) / str(i)\n"
        f"    file.exists() or (time.sleep({seconds}), file.touch())"
    )


@pytest.fixture
def blocks(tmp_path):
    def done():
        return len(list(tmp_path.iterdir()))

    return tmp_path, done


def test_each_run_is_killed_after_work_of_its_own(blocks, monkeypatch):
    folder, done = blocks
    monkeypatch.setattr(large, "_TAQ", [sys.executable, "-c", _writes(12, 0.2)])
    step = large.run_step("step", [str(folder)], {}, done, [1, 1, 5])
    first, second, third = step.killed_after
    assert 1 <= first < second < third
    assert 5 <= third < 12
    assert done() == 12
    assert len(step.seconds) == len(step.peak_bytes) == 4
    assert min(step.peak_bytes) > 1e6


def test_a_run_that_ends_before_its_kill_shows_nothing(blocks, monkeypatch):
    folder, done = blocks
    monkeypatch.setattr(large, "_TAQ", [sys.executable, "-c", _writes(2, 0)])
    with pytest.raises(RuntimeError, match="step ended before it was killed, at block 3"):
        large.run_step("step", [str(folder)], {}, done, [3])


def test_the_start_of_a_continued_run_is_not_the_time_of_a_block(blocks):
    folder, done = blocks
    (folder / "0").touch()
    waits = "import time, sys, pathlib\ntime.sleep(1.5)\n" + _writes(20, 0.05)
    child = large.subprocess.Popen([sys.executable, "-c", waits, str(folder)])
    try:
        large._wait_for(child.pid, done, 1, 4)
        # Of 20 blocks 1.5 s would be more than all: at most one block of 50 ms, and some time of the scheduler's
        assert done() < 15
    finally:
        child.kill()
        child.wait()


def test_a_command_that_fails_is_an_error(blocks, monkeypatch):
    folder, done = blocks
    monkeypatch.setattr(large, "_TAQ", [sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(RuntimeError, match="step failed with 3"):
        large.run_step("step", [str(folder)], {}, done, [])


def test_a_new_line_takes_the_place_of_the_old_one_of_its_model_and_method(tmp_path):
    file = tmp_path / "lines.jsonl"
    for model, method, seconds in (("a", "rtn", 1), ("a", "clip", 2), ("b", "rtn", 3), ("a", "rtn", 4)):
        lines = large.add_line(file, {"model": model, "method": method, "seconds": seconds})
    assert [line["seconds"] for line in lines] == [2, 3, 4]
    assert [json.loads(text) for text in file.read_text().splitlines()] == lines


def test_committed_lines_hold_and_make_a_table():
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    for line in lines:
        assert line["memory_holds"]
        assert line["peak_bytes"] <= large.MOST_RESIDENT_BYTES
        assert line["kills"] == 3
        assert line["twin"]["files_that_differ"] == []
    table = large.render(lines)
    assert table.row_count == len(lines)
    twins = list(table.columns[-2].cells)
    assert all(cell.startswith("yes (") for cell in twins)
    assert ["not on record" in cell for cell in twins] == ["killed_after" not in line["twin"] for line in lines]


def test_a_twin_that_differs_is_said():
    assert large._twin({"files_that_differ": ["plan.json"]}) == "NO: plan.json"
