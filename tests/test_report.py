import random

import pytest
from matplotlib import image

from taq_vllm.evaluate import Result, Settings
from taq_vllm.plan import Allocation, Budget, MatrixPlan, ModelRef, Plan, ScorerRef
from taq_vllm.report import Row, TaskPanel, agreement, relevance_figure, results_markdown, results_table, winner
from taq_vllm.scores import Scores, UnitScore

MODEL = ModelRef(id="model", fingerprint="0")


def result(label, scores, average_bits=5.0):
    n = len(scores)
    return Result(
        key=label,
        label=label,
        model=label,
        model_sha256="0",
        plan_sha256=None,
        average_bits=average_bits,
        weight_bytes=7_400_000,
        task="t",
        test_sha256="0",
        metric="em",
        n=n,
        mean=sum(scores) / n,
        low=0.1,
        high=0.9,
        interval="wilson",
        answer_nll=0.05,
        answer_nll_low=0.04,
        answer_nll_high=0.06,
        output_tokens=100,
        generation_s=1.0,
        output_tokens_per_s=100.0,
        settings=Settings(
            quantization=None, engine_args={}, limit=None, seed=0, max_new_tokens=8, stop=(), chat_template=False
        ),
        versions={},
        hardware="h",
        started_at="2026",
        item_ids=tuple(map(str, range(n))),
        item_scores=tuple(map(float, scores)),
        item_nll=(0.1,) * n,
        item_tokens=(2,) * n,
        outputs=("",) * n,
    )


def scores_of(values, name="taq"):
    details = {
        f"{part}{suffix}": 0.5 for part in ("information", "stability", "nll_increase") for suffix in ("", "_stderr")
    }
    return Scores(
        model=MODEL,
        task=None,
        scorer=ScorerRef(name=name),
        units=tuple(
            UnitScore(unit=f"model.layers.{i}", score=v, stderr=0.1, details=details) for i, v in enumerate(values)
        ),
        seconds=0,
        peak_memory_bytes=0,
    )


def replace_units(scores, names):
    units = tuple(s.model_copy(update={"unit": name}) for s, name in zip(scores.units, names, strict=True))
    return scores.model_copy(update={"units": units, "granularity": "module"})


GOOD, BAD = [1] * 80 + [0] * 20, [1] * 60 + [0] * 40


def test_a_contender_that_beats_every_other_beyond_doubt_wins():
    rows = [Row("a", result("a", BAD), True), Row("b", result("b", GOOD), True), Row("c", result("c", BAD), True)]
    assert winner(rows) == "b"
    assert "| **b** |" in results_markdown(rows, rows[0].result)


def test_nobody_wins_while_one_paired_interval_holds_zero():
    almost = [1] * 79 + [0] * 21
    rows = [Row("a", result("a", BAD), True), Row("b", result("b", GOOD), True), Row("c", result("c", almost), True)]
    assert winner(rows) is None
    assert "**" not in results_markdown(rows, rows[0].result)


def test_a_better_row_of_another_size_does_not_compete():
    rows = [Row("full", result("full", [1] * 100)), Row("a", result("a", GOOD), True), Row("b", result("b", BAD), True)]
    assert winner(rows) == "a"


def test_the_difference_shown_is_paired_with_full_precision():
    full = result("full", GOOD, average_bits=None)
    rows = [Row("full", full), Row("a", result("a", BAD))]
    lines = results_markdown(rows, full).splitlines()
    assert "| - |" in lines[2]
    assert "| 16 |" in lines[2]
    assert "-20.0 [" in lines[3]
    assert results_table("t", rows, full).row_count == 2


def test_agreement_is_one_for_the_same_order_and_minus_one_for_its_reverse():
    assert agreement(scores_of([1, 2, 3, 4]), scores_of([10, 20, 30, 40])).tau == pytest.approx(1)
    assert agreement(scores_of([1, 2, 3, 4]), scores_of([4, 3, 2, 1])).tau == pytest.approx(-1)


def test_the_figure_draws_every_task_and_shows_mixed_layers(tmp_path):
    entry = {"symmetric": False, "shape": (128, 128), "why": "score"}
    bits = random.Random(0).choices((4, 8, 16), k=8)
    plan = Plan(
        base_model=MODEL,
        allocation=Allocation(name="monotone"),
        budget=Budget(asked="5bits", average_bits=5, planned_bytes=1, disk_bytes=1, resident_bytes=1),
        matrices={f"model.layers.{i // 2}.m{i % 2}": MatrixPlan(bits=b, **entry) for i, b in enumerate(bits)},
    )
    by_matrix = replace_units(scores_of([1, 2, 3, 4], "kl"), [f"model.layers.{i // 2}.m{i % 2}" for i in range(4)])
    oracle = scores_of([0, 0, 1, 0], "taqo")
    panels = [TaskPanel(name, scores_of([1, 2, 3, 4]), oracle, by_matrix, {"TAQ": plan}) for name in "ab"]
    relevance_figure(panels, "title", tmp_path / "sub" / "figure.png")
    pixels = image.imread(tmp_path / "sub" / "figure.png")
    assert pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.05  # not a blank sheet
