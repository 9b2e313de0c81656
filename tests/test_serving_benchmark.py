"""The comparison of servers: its prompts, its check of what is served, its ratios and its table."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks import random_model, serving
from benchmarks.random_model import CHARACTERS_FROM, make_prompts, make_tokenizer
from taq_vllm.model_files import ModelFiles

ROOT = Path(__file__).parents[1]
VOCABULARY = 600
SPEEDS = {"bf16": 4.0, "stock-w4a16": 3.0, "plan-5bit": 12.0, "llama.cpp-q4_k_m": 10.0}
BYTES = {"bf16": 2000, "stock-w4a16": 600, "plan-5bit": 650, "llama.cpp-q4_k_m": 600}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(VOCABULARY, folder)
    return AutoTokenizer.from_pretrained(folder)


def lines(speeds=SPEEDS):
    settings = {
        "model": {"name": "m"},
        "processor": "here",
        "preloaded": [],
        "device": "cpu",
        "threads": 1,
        "commit": "abc",
    }
    found = []
    for name, speed in speeds.items():
        taken = {"start_s": 50.0, "memory_bytes": 10**9, "bytes_per_token": BYTES[name]}
        found.append({"benchmark": "serving", "contender": name, **taken, **settings})
        for cell in serving.CELLS:
            # A slow second round falls on every contender.
            figures = {
                "output_tokens_per_s": [speed, *[speed / 10] * (cell.rounds - 1)],
                "first_token_s": [2 / speed, *[20 / speed] * (cell.rounds - 1)],
                "token_ms": [1000 / speed] * cell.rounds,
            }
            found.append({"benchmark": "serving", "contender": name, **asdict(cell), **figures, **settings})
    return found


def test_any_token_ids_are_a_text_that_becomes_them_again(tokenizer):
    for prompt in make_prompts(8, 64, VOCABULARY, seed=0, first=CHARACTERS_FROM):
        assert tokenizer.encode(tokenizer.decode(prompt)) == prompt
    assert len(tokenizer) == VOCABULARY


def test_the_random_model_says_nothing_but_characters(tmp_path):
    model = random_model.make_model(random_model.TINY, tmp_path)
    head = ModelFiles(model).tensors["lm_head.weight"]
    assert head.shape == (random_model.TINY.vocabulary, random_model.TINY.hidden)
    prompts = make_prompts(4, 16, random_model.TINY.vocabulary, seed=0, first=CHARACTERS_FROM)
    assert serving.reference_logprobs(model, prompts).argmax(-1).min() >= CHARACTERS_FROM


def server_that_says(tokenizer, tokens):
    answers = iter(tokens)

    def create(**_):
        return SimpleNamespace(choices=[SimpleNamespace(text=tokenizer.decode([next(answers)]))])

    return SimpleNamespace(client=SimpleNamespace(completions=SimpleNamespace(create=create)))


def test_a_server_of_another_model_is_not_timed(tokenizer):
    prompts = make_prompts(8, 4, VOCABULARY, seed=0, first=CHARACTERS_FROM)
    logprobs = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    logprobs[:, :CHARACTERS_FROM] = logprobs.min()
    right = logprobs.argmax(-1).tolist()
    assert serving.check_choices(server_that_says(tokenizer, right), "ours", tokenizer, prompts, logprobs) == 0
    wrong = server_that_says(tokenizer, right[1:] + right[:1])
    with pytest.raises(RuntimeError, match=r"ours: its first tokens are .* nats below .* does not serve this model"):
        serving.check_choices(wrong, "ours", tokenizer, prompts, logprobs)


def test_ratios_are_taken_within_a_round():
    first = serving.MUST_HOLD[0]
    assert serving.ratios(lines(), first) == pytest.approx([3.0] * serving.DECODE.rounds)
    per_byte = next(requirement for requirement in serving.MUST_HOLD if requirement.per_byte)
    assert serving.ratios(lines(), per_byte)[0] == pytest.approx(1.2 * 650 / 600)
    first_token = next(r for r in serving.MUST_HOLD if r.figure == "first_tokens_per_s")
    assert serving.ratios(lines(), first_token) == pytest.approx([3.0] * serving.FIRST_TOKEN.rounds)
    assert serving.ratios(lines(), replace(first, contender="nobody")) is None


def test_requirements_say_what_holds_what_misses_and_what_was_not_measured():
    assert {sentence.split()[0] for sentence in serving.requirements(lines())} == {"holds"}
    slow = serving.requirements(lines(SPEEDS | {"plan-5bit": 11.0}))
    assert slow[0].startswith("MISSES batch 1, 128 in, 128 out: output tokens/s over bf16: 2.75x")
    without_peer = {name: speed for name, speed in SPEEDS.items() if not name.startswith("llama")}
    assert sum(s.startswith("not measured") for s in serving.requirements(lines(without_peer))) == 1


def test_the_table_is_made_from_lines_alone():
    offline = lines()[1] | {"tool": "vllm bench latency", "output_tokens_per_s": 77.7}
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in serving.render(json.loads(json.dumps([*lines(), offline]))):
        console.print(part)
    text = console.export_text()
    assert "batch 1, 128 in, 128 out: output tokens/s" in text
    assert "77.7" in text
    assert "holds" in text


@pytest.mark.engine
def test_a_plan_is_served_and_asked_by_every_tool(tmp_path):
    out = tmp_path / "serving.jsonl"
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--contenders", "plan-5bit", "--out", str(out)]
    done = subprocess.run([*command, "--work", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("tool") for line in found] == [None] * 3 + ["vllm bench latency", "vllm bench throughput"]
    assert all(speed > 0 for line in found[1:3] for speed in line["output_tokens_per_s"])
    assert found[0]["memory_bytes"] > found[0]["bytes_per_token"]
    assert "not measured: batch 1, 128 in, 128 out" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got neither --out nor --table"),
        (["--out", "x", "--contenders", "bf16,plan"], "--contenders plan: there are"),
    ],
)
def test_wrong_arguments_are_named_before_anything_starts(arguments, said):
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
