import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from benchmarks import decode, planning, random_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, Plan

ROOT = Path(__file__).parent.parent
HARDWARE = ("processor", "cores", "device", "instructions", "threads", "versions", "commit", "time")


@pytest.fixture(scope="module")
def contenders(tmp_path_factory):
    return decode.make_contenders(random_model.TINY, tmp_path_factory.mktemp("bench"))


def test_the_random_model_has_about_a_billion_parameters_in_the_promised_shape():
    with torch.device("meta"):
        model = LlamaForCausalLM(random_model.config_of(random_model.ONE_BILLION))
    assert 0.95e9 < sum(p.numel() for p in model.parameters()) < 1.15e9
    block = model.model.layers[0]
    assert len(model.model.layers) == 16
    assert tuple(block.mlp.down_proj.weight.shape) == (2048, 8192)
    assert tuple(block.self_attn.k_proj.weight.shape) == (8 * 64, 2048)
    assert tuple(model.lm_head.weight.shape) == (32000, 2048)


def test_contenders_differ_in_bits_alone(contenders):
    tensors = ModelFiles(contenders["bf16"]).tensors
    assert {info.dtype for info in tensors.values()} == {"BF16"}
    uniform = Plan.load(contenders["stock-w4a16"] / PLAN_FILE)
    assert {(m.bits, m.symmetric) for m in uniform.matrices.values()} == {(4, True)}
    planned = Plan.load(contenders["plan-5bit"] / PLAN_FILE)
    assert planned.budget.average_bits <= 5
    assert {m.bits for m in planned.matrices.values()} == {4, 8}
    assert planned.base_model.fingerprint == uniform.base_model.fingerprint


def test_a_second_run_finds_its_contenders(contenders):
    before = {p: p.stat().st_mtime_ns for folder in contenders.values() for p in folder.iterdir()}
    assert decode.make_contenders(random_model.TINY, contenders["bf16"].parents[1]) == contenders
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_expected_bytes_are_those_of_the_files_and_the_plan(contenders):
    expected = decode.expected_bytes(contenders)
    files = ModelFiles(contenders["bf16"])
    assert expected["bf16"].resident == sum(info.end - info.start for info in files.tensors.values())
    plan = Plan.load(contenders["plan-5bit"] / PLAN_FILE)
    assert expected["plan-5bit"].resident == plan.budget.resident_bytes
    embedding = 2 * random_model.TINY.vocabulary * random_model.TINY.hidden
    assert all(e.resident - e.per_token == embedding for e in expected.values())


def lines(plan_speed=(60.0, 10.0, 100.0), saved=1000, plan_peak=1000):
    kind = "decode_tokens_per_s_batch_1"
    speeds = {"bf16": (20.0, 5.0, 40.0), "stock-w4a16": (10.0, 2.5, 20.0), "plan-5bit": plan_speed}
    values = {(name, kind): list(speed) for name, speed in speeds.items()}
    for name, rate in (("bf16", 50.0), ("stock-w4a16", 70.0), ("plan-5bit", 80.0)):
        values[name, "decode_tokens_per_s_batch_8"] = [rate] * 3
        values[name, "first_token_per_s"] = [rate / 100] * 3
    shares = {key: [1.0, 0.4, 1.0] for key in values}
    for name, planned in (("bf16", 2000), ("stock-w4a16", 800), ("plan-5bit", 1000)):
        values[name, "decode_step_ms"] = [50.0]
        values[name, "floor_tokens_per_s_batch_1"] = [100.0, 100.0, 100.0]
        values[name, "load_s"] = [3.0]
        values[name, "load_peak_bytes"] = [plan_peak if name == "plan-5bit" else 1000]
        values[name, "memory_bytes"] = [5000 - (saved if name == "plan-5bit" else 0)]
        values[name, "tensor_bytes"] = [planned]
        values[name, "planned_weight_bytes"] = [planned]
        values[name, "logprob_distance_own_weights"] = [0.01]
        values[name, "logprob_distance_bf16_weights"] = [0.3]
    settings = {
        "model": {"name": "llama-test"},
        "workload": {
            "rounds": 3,
            "first_token_rounds": 3,
            "output_tokens": {"1": 64, "8": 16},
            "first_token_input": 512,
        },
        **dict.fromkeys(HARDWARE, "here"),
        "instructions": ["avx2"],
        "threads": 1,
    }
    operators = {name: {"aten::mm": 30.0, "aten::add": 0.1} for name in decode.CONTENDERS}
    return decode.make_lines(values, shares, operators, settings)


def test_every_line_says_what_was_measured_on_what():
    for line in lines():
        assert {"benchmark", "contender", "measurement", "median", "min", "max", "rounds"} <= line.keys()
        assert set(HARDWARE) <= line.keys()
        assert line["min"] <= line["median"] <= line["max"]
        assert json.loads(json.dumps(line)) == line


def test_ratios_are_taken_within_a_round():
    [ratio] = [r for r in lines() if r["measurement"] == "decode_tokens_per_s_batch_1_over_bf16"]
    assert ratio["rounds"] == [3.0, 2.0, 2.5]
    assert ratio["median"] == 2.5
    kind = "decode_tokens_per_s_batch_1_over_floor"
    [share] = [r for r in lines() if (r["contender"], r["measurement"]) == ("bf16", kind)]
    assert share["rounds"] == [0.2, 0.05, 0.4]


def test_the_table_is_made_from_lines_alone():
    console = Console(width=220, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    read_back = [json.loads(json.dumps(line)) for line in lines()]
    for part in decode.render(read_back):
        console.print(part)
    text = console.export_text()
    for cell in ("bf16", "stock-w4a16", "plan-5bit", "60.0 (10.0-100.0)", "20.0 (5.0-40.0)", "0.0100 / 0.3000"):
        assert cell in text
    assert "had 40% of its cores" in text


def test_a_decode_step_is_split_into_operators_and_what_lies_between_them():
    table = decode.profile_table(lines())
    rows = {cells[0]: cells[1:] for cells in zip(*(column.cells for column in table.columns), strict=True)}
    assert rows["aten::mm"] == ("30.00",) * 3
    assert rows["other operators"] == ("0.10",) * 3
    assert rows["outside of operators"] == ("19.90",) * 3


def test_requirements_are_judged_from_the_lines():
    assert [s.split()[0] for s in decode.requirements(lines())] == ["holds"] * 8
    slow = decode.requirements(lines(plan_speed=(40.0, 10.0, 80.0)))
    assert slow[0].startswith("MISSES")
    assert slow[1].startswith("holds")
    assert decode.requirements(lines(saved=970))[7].startswith("MISSES")
    assert decode.requirements(lines(saved=985))[7].startswith("holds")
    high = decode.requirements(lines(plan_peak=1200))
    assert high[5].startswith("MISSES plan over bf16, peak memory while loading: 1.20x")
    older = [line for line in lines() if line["measurement"] != "load_peak_bytes"]
    assert decode.requirements(older)[5] == "not measured: peak memory while loading over bf16"


REFERENCES = {"bf16": [[-1.0, -2.0]], "stock-w4a16": [[-1.5, -2.5]], "plan-5bit": [[-1.2, -1.8]]}


def served(**changes):
    return {name: [[a + 0.01, b - 0.01] for a, b in rows] for name, rows in (REFERENCES | changes).items()}


def test_engines_that_serve_their_own_weights_are_accepted():
    distances = decode.check_logprobs(served(), REFERENCES)
    assert distances["plan-5bit"]["own_weights"] == pytest.approx(0.01)
    assert distances["plan-5bit"]["bf16_weights"] == pytest.approx((0.19 + 0.19) / 2)


@pytest.mark.parametrize("name", decode.CONTENDERS)
@pytest.mark.parametrize("wrong", [[[-3.0, -0.5]], [[math.nan, -2.0]]])
def test_an_engine_that_computes_something_else_stops_the_run(name, wrong):
    with pytest.raises(RuntimeError, match=f"{name} is .* nat away from its own weights"):
        decode.check_logprobs(served(**{name: wrong}), REFERENCES)


def test_the_memory_that_scoring_may_take_is_embedding_two_blocks_and_hidden_states(tmp_path):
    case = planning.smallest_case(tmp_path)
    model, sequences, batches, _ = planning._prepare(case)
    shape = random_model.TINY
    attention = shape.hidden * shape.hidden * 2 + shape.hidden * shape.hidden // shape.heads * shape.kv_heads * 2
    item = 2  # bytes, whatever the walk computes in
    block = item * (attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden)
    assert len(sequences) == 8
    assert all(64 <= len(s.input_ids) <= 128 for s in sequences)
    assert planning.allowed_bytes(model, batches) == {
        "embedding": item * shape.vocabulary * shape.hidden,
        "two_blocks": 2 * block,
        "hidden_states": item * shape.hidden * 8 * max(len(s.input_ids) for s in sequences),
    }


def planning_line(score_s, peak_bytes):
    timed = {
        "plain_s": [1.0, 2.0, 4.0],
        "score_s": score_s,
        "cpu_share": 1.0,
        "tokens": 99,
        "allowed_bytes": {"embedding": 100, "two_blocks": 200, "hidden_states": 50},
    }
    return planning.make_line(planning.Case("m", "m", 8, 3), timed, peak_bytes, 1000)


def test_scoring_is_judged_by_the_median_ratio_and_the_peak_over_the_libraries():
    line = planning_line([1.2, 2.0, 6.0], 1350)
    assert line["ratios"] == [1.2, 1.0, 1.5]
    assert line["time_holds"]
    assert line["memory_holds"]
    assert line["peak_bytes"] == 350
    assert not planning_line([1.4, 2.8, 4.0], 1350)["time_holds"]
    assert not planning_line([1.2, 2.0, 6.0], 1351)["memory_holds"]


def test_the_planning_table_is_made_from_lines_alone():
    line = planning_line([1.2, 2.0, 6.0], 1350) | {"processor": "here", "threads": 1, "commit": "abc"}
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(planning.render([json.loads(json.dumps(line))]))
    text = console.export_text()
    assert "1.20 (1.00-1.50)" in text
    assert "time yes, memory yes" in text


@pytest.mark.engine
def test_the_decode_benchmark_runs_all_contenders_on_the_engine(tmp_path):
    out = tmp_path / "decode.jsonl"
    command = [sys.executable, "-m", "benchmarks.decode", "--quick", "--out", str(out), "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(line["contender"], line["measurement"]) for line in map(json.loads, out.read_text().splitlines())}
    for name in decode.CONTENDERS:
        for kind in ("decode_tokens_per_s_batch_1", "decode_tokens_per_s_batch_8", "first_token_per_s", "memory_bytes"):
            assert (name, kind) in found
    assert "plan over stock-w4a16, decode tokens/s batch 1" in done.stdout
