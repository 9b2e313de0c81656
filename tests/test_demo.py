import json

import pytest
from rich.table import Table

from benchmarks import demo, readme
from benchmarks.parity import compare, requirements


@pytest.mark.engine
def test_the_demo_does_the_whole_job_for_a_task(tmp_path, monkeypatch, capsys):
    """Scores, plans, checkpoints, the engine, a real server, tables and the picture; two test items."""
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--tasks", "trivia", "--test-items", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    demo.main()
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("'Your own model and task'.")
    assert (out / "relevance.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]
    sizes = {line["plan"]: line["average_bits"] for line in lines}
    assert sizes["edges"] == sizes["TAQ"] == sizes["TAQO"] < 5.0
    assert sizes["TAQO"] - 0.02 < sizes["KL"] <= sizes["TAQO"]  # a few bytes are less than any matrix takes
    assert {line["n"] for line in lines} == {2}
    assert "| full precision |" in (out / "results.md").read_text()
    assert "trivia (em) | full precision" in readme.demo_table(lines)


def _answers(logprobs, greedy, gaps=None):
    return [{"logprobs": logprobs, "greedy": greedy, "gaps": gaps or [1.0] * len(greedy)}]


def test_parity_counts_a_text_that_ends_early_as_different():
    found = compare(_answers([0.0], [5, 6]), _answers([0.0], [5, 6, 2]), noise=0.5)
    assert found["texts_equal"] == 0
    assert found["flips_within_noise"] == 0


def test_parity_puts_a_flip_down_to_noise_only_where_two_tokens_were_close():
    reference = _answers([0.0, -1.0], [5, 6], gaps=[0.1, 3.0])
    assert compare(_answers([0.1, -1.0], [4, 6]), reference, noise=0.5)["flips_within_noise"] == 1
    assert compare(_answers([0.1, -1.0], [5, 7]), reference, noise=0.5)["flips_within_noise"] == 0
    assert compare(_answers([0.1, -1.0], [5, 6]), reference)["mean_abs_logprob_difference"] == pytest.approx(0.05)


def test_parity_names_what_is_too_far_away():
    line = {"way": "plugin", "ratio_to_stock": 1.1, "flips_within_noise": 0, "prompts": 3, "texts_equal": 3}
    assert requirements([line, line | {"way": "stock vLLM", "ratio_to_stock": 9}]) == []
    assert "1.30x" in requirements([line | {"ratio_to_stock": 1.3}])[0]
    assert "further apart" in requirements([line | {"texts_equal": 2}])[0]


@pytest.mark.parametrize("path", readme.WRITTEN, ids=lambda path: str(path.relative_to(readme.ROOT)))
def test_a_readme_shows_what_the_committed_lines_say(path):
    assert path.read_text(encoding="utf-8") == readme.rewritten(path)


def test_a_table_becomes_markdown_with_its_numbers():
    table = Table(title="speed")
    for column in ("who", "how fast"):
        table.add_column(column)
    table.add_row("a", "1.5")
    assert readme._markdown(table).splitlines() == ["speed", "", "| who | how fast |", "|---|---:|", "| a | 1.5 |"]
