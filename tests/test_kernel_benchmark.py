"""The kernel benchmark: shapes, a real run of its CPU mode on a tiny layer, and what is made from its lines."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from taq_kernels import timing, tune, tuned

from benchmarks import kernels
from benchmarks.peers import gemms as peers

CPU = torch.device("cpu")


# Shapes.


@pytest.mark.parametrize(
    ("model", "blocks", "others", "parameters"),
    [
        # Embedding and head, norms, biases of q, k and v; and the number of parameters that the model card names.
        ("Llama-3.1-8B", 32, 2 * 128256 * 4096 + 65 * 4096, 8_030_261_248),
        ("Qwen2.5-7B", 28, 2 * 152064 * 3584 + 57 * 3584 + 28 * 4608, 7_615_616_512),
        ("Qwen3-4B", 36, 151936 * 2560 + 73 * 2560 + 36 * 256, 4_022_468_096),
        ("Mistral-7B", 32, 2 * 32768 * 4096 + 65 * 4096, 7_248_023_552),
        ("Phi-4-mini", 32, 200064 * 3072 + 65 * 3072, 3_836_021_760),
    ],
)
def test_the_layers_are_those_of_the_models(model, blocks, others, parameters):
    block = sum(layer.rows * layer.columns for layer in kernels.MODELS[model].values())
    assert blocks * block + others == parameters


def test_half_is_half_of_the_bytes_but_for_part_of_a_tile():
    for layers in kernels.MODELS.values():
        for layer in layers.values():
            (narrow_bits, narrow), (wide_bits, wide) = layer.matrices("half")
            assert (narrow_bits, wide_bits) == (4, 8)
            assert narrow + wide == layer.rows
            assert abs(4 * narrow - 8 * wide) <= 12 * kernels.TILE_ROWS / 2


def test_three_bitwidths_are_for_fused_qkv_alone():
    layers = kernels.MODELS["Llama-3.1-8B"]
    assert layers["qkv_proj"].matrices("4+8+16") == ((4, 4096), (8, 1024), (16, 1024))
    assert not any(layers[name].matrices("4+8+16") for name in ("o_proj", "gate_up_proj", "down_proj"))


def test_a_shape_is_measured_once_and_the_most_telling_m_come_first():
    found = kernels.groups(("Llama-3.1-8B", "Mistral-7B", kernels.SQUARE), (1, 64, 4096), "cuda")
    assert [group.tokens for group in found] == [(1, 64)] * 4 + [(4096,)] * 4
    assert found[0].places == (("Llama-3.1-8B", "qkv_proj"), ("Mistral-7B", "qkv_proj"))
    assert (kernels.SQUARE, "linear") in found[1].places
    for tiers in kernels.TIERS.values():
        assert {m for tier in tiers for m in tier} == set(kernels.TOKENS)


def test_calls_of_seconds_are_left_out_on_a_cpu():
    found = kernels.groups((kernels.SQUARE, "Llama-3.1-8B"), kernels.DEFAULT_TOKENS["cpu"], "cpu")
    most = {group.places[0][1]: max(group.tokens) for group in found}
    assert most == {"linear": 1024, "qkv_proj": 256, "gate_up_proj": 128, "down_proj": 256}


# A real run.


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A layer that is measured in no time, and the file that lines go to."""
    monkeypatch.setitem(kernels.MODELS, "tiny", {"qkv_proj": kernels.Layer((128, 128, 128), 256)})
    monkeypatch.setitem(kernels.JUDGED, "cpu", ("tiny",))
    monkeypatch.setitem(kernels.RUNS, "cpu", 3)
    monkeypatch.setattr(timing, "CPU_BYTES", 1_000_000)
    threads = torch.get_num_threads()
    yield tmp_path / "lines.jsonl"
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernels", *map(str, arguments)])
        kernels.main()
        return capsys.readouterr()

    return call


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_cpu_mode_measures_every_contender_and_reports(tiny, run):
    arguments = ("--device", "cpu", "--models", "tiny", "--m", "1,8", "--out", tiny)
    run(*arguments)
    lines = read(tiny)
    contenders = {(line["contender"], line["plan"]) for line in lines}
    assert contenders == {("torch", "16"), ("onednn", "16"), ("int4pack", "4"), ("wna16", "4")} | {
        ("taq", plan) for plan in ("4", "8", "half")
    }
    assert {line["tokens"] for line in lines} == {1, 8}
    for line in lines:
        assert "failed" not in line
        assert (line["model"], line["layer"], line["rows"], line["columns"]) == ("tiny", "qkv_proj", 384, 256)
        assert sum(rows for _, rows in line["matrices"]) == 384
        assert 0 < line["us"]["min"] <= line["us"]["median"] <= line["us"]["p90"]
        assert line["floor_fraction"] == pytest.approx(line["floor_us"]["median"] / line["us"]["median"])
        assert 0 < line["relative_error"] <= kernels.LARGEST_ERROR
        # bf16 has 8 significant bits: rounding is off by up to 2^-9 to 2^-8 of a value, uniformly; RMS over sqrt(3).
        assert 2**-9 / math.sqrt(3) * 0.9 < line["rounding_error"] < 2**-8 / math.sqrt(3)
        assert {"processor", "versions", "commit", "time", "threads", "contender_version"} <= line.keys()
        bits = sum(bits * rows * 256 for bits, rows in line["matrices"])
        assert bits / 8 <= line["weight_bytes"] <= bits / 8 + 384 * (256 // 128) * 4
    run(*arguments)
    assert len(read(tiny)) == 2 * len(lines)
    text = run("--report", tiny).out
    assert "### tiny: speedup over bf16" in text
    assert "4 bits over oneDNN bf16, M 1" in text
    assert tiny.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_only_what_was_asked_for_is_measured(tiny, run):
    run("--device", "cpu", "--models", "tiny", "--m", "1", "--bits", "4,8", "--contenders", "taq", "--out", tiny)
    assert [(line["contender"], line["plan"]) for line in read(tiny)] == [("taq", "4"), ("taq", "8")]


def test_nothing_is_begun_when_time_is_up(tiny, run):
    said = run("--device", "cpu", "--models", "tiny", "--m", "1", "--max-seconds", "-1", "--out", tiny).err
    assert read(tiny) == []
    assert "out of time: tiny qkv_proj" in said


def test_the_layers_of_the_models_can_be_tuned(tiny, run):
    layers = kernels.layers_to_tune(("Llama-3.1-8B", "Mistral-7B"), kernels.PLANS)
    assert len(layers) == 4 * 3 + 1  # in 4 bits, 8 and half of each; and QKV in 4, 8 and 16
    assert tune.Layer(((4, 4096), (8, 1024), (16, 1024)), 4096, 128) in layers
    said = run("--device", "cpu", "--models", "tiny", "--m", "1", "--bits", "4", "--tune", tiny).err
    assert "tune 1/3: latency of ((4, 384),) x 256, M 1" in said
    assert {entry.bits for entry in tuned.Table.load(tiny).latencies} == {4, 8, 16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--m", "3"], "got 3; there are 1, 2, 4"),
        (["--models", "gpt-2"], "got 'gpt-2'"),
        (["--bits", "3"], "got '3'"),
        (["--contenders", "marlin"], "got 'marlin'"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cpu", "--out", str(tmp_path / "x"), *arguments])
    with pytest.raises(SystemExit):
        kernels.main()
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def raises(matrices):
    raise RuntimeError("no kernel\nfor this")


def wrong(matrices):
    product = peers.pack_torch([peers.Matrix(16, None, None, m.dequantized().bfloat16()) for m in matrices]).fresh()
    return peers.Packed(1000, lambda: lambda x: product(x).roll(1, dims=1))


def unwritten(matrices):
    rows = sum(matrix.codes.shape[0] for matrix in matrices)
    return peers.Packed(1000, lambda: lambda x: torch.full((x.shape[0], rows), torch.nan))


def fails_when_called(matrices):
    return peers.Packed(1000, lambda: lambda x: raises(matrices))


@pytest.mark.parametrize(
    ("pack", "failure"),
    [
        (raises, "RuntimeError: no kernel for this"),
        (fails_when_called, "RuntimeError: no kernel for this"),
        (wrong, r"wrong result: relative error 1\.\d+"),
        (unwritten, "wrong result: relative error inf"),
    ],
)
def test_a_contender_that_fails_is_a_line_without_times(tiny, run, monkeypatch, pack, failure):
    good = next(c for c in peers.CONTENDERS if c.name == "int4pack")
    broken = peers.Contender("broken", pack, ("4",), ("cpu",), "torch", "torch")
    absent = peers.Contender("absent", pack, ("4",), ("cpu",), "no_such_module", "no-such-module")
    monkeypatch.setattr(kernels, "CONTENDERS", (broken, good, absent))
    said = run("--device", "cpu", "--models", "tiny", "--m", "1", "--bits", "4", "--out", tiny).err
    first, second = read(tiny)
    assert second["contender"] == "int4pack"
    assert "us" in second
    assert "us" not in first
    assert re.fullmatch(failure, first["failed"])
    assert first["not_installed"] == ["absent"]
    assert "not installed, so left out: absent" in said
    report = kernels.report(read(tiny))
    assert f"- broken 4, tiny qkv_proj, M 1: {first['failed']}" in report
    assert "Not installed where this was measured: absent." in report


def test_the_state_that_is_recorded_is_of_the_gpu_that_torch_uses(monkeypatch):
    """The first GPU of nvidia-smi need not be the first, nor even one, of those that CUDA shows."""
    asked = []

    def answer(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="1980 MHz, 3201 MHz, 40, 300.00 W, 0x0\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="6d1c-07"))
    monkeypatch.setattr(subprocess, "run", answer)
    assert kernels.gpu_state()["power.draw"] == "300.00 W"
    assert "--id=GPU-6d1c-07" in asked[0]


def test_words_hold_the_first_code_in_their_lowest_bits():
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8) + 8
    assert peers._words(codes, 4).tolist() == [[0xFEDCBA98 - 2**32]]
    assert peers._words(torch.tensor([[1, 2, 3, 200]], dtype=torch.uint8), 8).tolist() == [[0xC8030201 - 2**32]]


def test_random_matrices_are_what_contenders_are_checked_against():
    torch.manual_seed(0)
    matrix = peers.random_matrix(4, 16, 256, CPU)
    w = matrix.dequantized()
    row, column = 3, 200
    assert w[row, column] == (matrix.codes[row, column].item() - 8) * matrix.scales[row, 1].item()


# Lines.


def line(contender, plan, model, layer, tokens, us, *, floor=None, device="cuda", threads=0, **more):
    shape = kernels.MODELS[model][layer]
    matrices = [list(matrix) for matrix in shape.matrices(plan)]
    return {
        "benchmark": "kernels",
        "device": device,
        "model": model,
        "layer": layer,
        "also": [],
        "rows": shape.rows,
        "columns": shape.columns,
        "tokens": tokens,
        "plan": plan,
        "matrices": matrices,
        "contender": contender,
        "contender_version": "1.0",
        "weight_bytes": sum(bits * rows * shape.columns // 8 for bits, rows in matrices),
        "relative_error": 0.0017,
        "rounding_error": 0.0017,
        "us": {"median": us, "min": us / 2, "p90": 2 * us},
        "floor_us": {"median": floor or us, "min": (floor or us) / 2, "p90": us},
        "floor_fraction": (floor or us) / us,
        "threads": threads,
        "gpu": None if threads else "NVIDIA Test 1",
        "processor": "a CPU",
        "commit": "abc",
        "not_installed": [],
    } | more


LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
GPU_US = {
    ("torch", "16"): 12.0,
    ("taq", "4"): 4.0,
    ("taq", "8"): 6.0,
    ("taq", "half"): 5.0,
    ("tinygemm", "4"): 6.0,
    ("humming", "4"): 3.0,
}


def gpu_lines(tokens=(1, 16), times=GPU_US, models=("Llama-3.1-8B", "Qwen2.5-7B")):
    found = [
        line(*contender, model, layer, m, us, floor=us / 2)
        for model in models
        for layer in LAYERS
        for m in tokens
        for contender, us in times.items()
    ]
    for m in tokens:
        found.append(line("taq", "4+8+16", "Llama-3.1-8B", "qkv_proj", m, 5.0))
        found.append(line("taq-one-by-one", "4+8+16", "Llama-3.1-8B", "qkv_proj", m, 7.0))
    return found


def figures(lines, threads=0):
    return {figure.what: figure for figure in kernels.figures(kernels.Results(lines, threads))}


def test_gpu_figures_are_ratios_of_block_times():
    found = figures(gpu_lines())
    values = {what: figure.value for what, figure in found.items()}
    assert values["4 bits over bf16, M 1"] == pytest.approx(3)
    assert values["8 bits over bf16, M 16"] == pytest.approx(2)
    assert values["4 bits over tinygemm, M 1"] == pytest.approx(1.5)
    assert values["4 bits over humming, M 16"] == pytest.approx(0.75)
    assert values["4 bits, weights of 28 MB and more, M 1 and 16: share of the floor"] == pytest.approx(0.5)
    assert values["QKV at 4, 8 and 16 bits: three launches over one, M <= 16"] == pytest.approx(1.4)
    # Two thirds of the rows at 4 bits (4 us), one third at 8 (6 us), but for the cut at tiles.
    assert values["half at 4, half at 8 bits over their mean"] == pytest.approx(5 / (4 + 2 / 3), rel=0.01)
    assert found["4 bits over bf16, M 1"].verdict == "holds"
    assert found["4 bits over humming, M 16"].verdict == "MISSES"
    assert found["half at 4, half at 8 bits over their mean"].verdict == "MISSES"
    assert found["4 bits over gemlite, M 1"].verdict == "not measured"
    assert found["4 bits over bf16, M 64"].verdict == "not measured"


def test_figures_speak_of_the_worst_model_and_layer():
    slow = [line("taq", "4", "Qwen2.5-7B", layer, 1, 8.0, floor=1.0) for layer in LAYERS]
    found = figures(gpu_lines() + slow)
    assert found["4 bits over bf16, M 1"].value == pytest.approx(1.5)
    assert found["4 bits over bf16, M 16"].value == pytest.approx(3)
    assert found["4 bits, weights of 28 MB and more, M 1 and 16: share of the floor"].value == pytest.approx(0.125)


def test_a_block_with_a_layer_missing_or_failed_has_no_figure():
    lines = [x for x in gpu_lines() if (x["layer"], x["contender"], x["model"]) != ("o_proj", "tinygemm", "Qwen2.5-7B")]
    assert figures(lines)["4 bits over tinygemm, M 1"].value == pytest.approx(1.5)  # of Llama
    lines = [x for x in lines if (x["layer"], x["contender"]) != ("o_proj", "tinygemm")]
    assert figures(lines)["4 bits over tinygemm, M 1"].value is None
    failed = [x for x in gpu_lines() if x["contender"] == "humming" and x["layer"] == "o_proj"]
    for x in failed:
        del x["us"]
        x["failed"] = "no"
    assert figures(gpu_lines() + failed)["4 bits over humming, M 1"].value is None


def test_shared_layers_count_for_every_model():
    lines = [line("taq", "4", "Llama-3.1-8B", layer, 1, 4.0, also=[["Mistral-7B", layer]]) for layer in LAYERS]
    results = kernels.Results(lines, 0)
    assert results.models() == ["Llama-3.1-8B", "Mistral-7B"]
    assert results.block_us("Mistral-7B", 1, "taq", "4") == pytest.approx(16)


def cpu_lines(tokens=(1, 8, 32, 128)):
    times = {("onednn", "16"): 8.0, ("torch", "16"): 12.0, ("wna16", "4"): 6.0, ("taq", "4"): 2.0, ("taq", "8"): 4.0}
    return [
        line(*contender, model, layer, m, us * m, floor=us * m * 0.9, device="cpu", threads=2)
        for model in kernels.JUDGED["cpu"]
        for layer in kernels.MODELS[model]
        for m in tokens
        for contender, us in times.items()
    ]


def test_cpu_figures_compare_with_the_best_of_vllm():
    values = {what: figure.value for what, figure in figures(cpu_lines(), 2).items()}
    best = "vLLM's best (oneDNN bf16, wna16)"
    assert values["4 bits over oneDNN bf16, M 1"] == pytest.approx(4)
    assert values["8 bits over oneDNN bf16, M 1"] == pytest.approx(2)
    assert values[f"4 bits over {best}, M 8"] == pytest.approx(3)
    assert values[f"8 bits over {best}, worst M <= 32"] == pytest.approx(1.5)
    assert values["4 bits: share of the floor, M 1"] == pytest.approx(0.9)
    assert values["4 bits: error over that of rounding y"] == pytest.approx(1)
    slow = [x | {"us": {"median": 1.0, "min": 1e4, "p90": 1.0}} for x in cpu_lines() if x["contender"] == "taq"]
    slow = [x for x in slow if x["tokens"] == 128]
    found = figures(cpu_lines() + slow, 2)
    assert found[f"4 bits over {best}, worst M <= 1024"].verdict == "MISSES"
    assert found[f"4 bits over {best}, worst M <= 32"].verdict == "holds"


def test_the_table_has_speedups_over_the_faster_bf16_and_the_share_of_the_floor():
    text = kernels.table(kernels.Results(cpu_lines(), 2), "Llama-3.1-8B").splitlines()
    assert text[0].startswith("| M | bf16, µs | onednn 16 | torch 16 | wna16 4 | taq 4 | taq 8 |")
    assert text[2] == "| 1 | 16 | 1.00x | 0.67x | 1.33x | 4.00x | 2.00x | 90% | 90% |"
    assert len(text) == 2 + 4


def test_the_report_is_made_from_lines_alone(tmp_path):
    lines = [json.loads(json.dumps(x)) for x in gpu_lines() + cpu_lines()]
    text = kernels.report(lines)
    assert "## NVIDIA Test 1" in text
    assert "## a CPU, 2 threads" in text
    assert "| 4 bits over bf16, M 1 | at least 2.8 | 3.00 | holds |" in text
    section = kernels.readme_section(lines)
    assert section.count("| M | bf16, µs |") == 4  # two models on a GPU, two on a CPU
    assert "- holds 4 bits over bf16, M 1: 3.00 (at least 2.8)" in section
    assert "not measured" not in section
    kernels.plot(lines, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_the_gpu_mode_measures_this_projects_kernels(tiny, run, monkeypatch):
    monkeypatch.setitem(kernels.RUNS, "cuda", 3)
    run("--models", "tiny", "--m", "1,64", "--contenders", "torch,tinygemm,taq,taq-one-by-one", "--out", tiny)
    lines = read(tiny)
    assert not [line for line in lines if "failed" in line]
    assert {(line["contender"], line["plan"]) for line in lines} == {("torch", "16"), ("tinygemm", "4")} | {
        ("taq", plan) for plan in ("4", "8", "half", "4+8+16")
    } | {("taq-one-by-one", "4+8+16")}
    assert all(line["clocks"] and line["gpu"] and line["driver"] for line in lines)
