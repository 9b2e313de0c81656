import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny

import taq_vllm.cli
import taq_vllm.scoring
from taq_vllm.plan import Plan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"id": str(i), "prompt": f"Question: {i}?\nAnswer:", "answers": [f"{i * 7}"]} for i in range(6)]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text("name: tiny\nmetric: em\ncalibration: calibration.jsonl\n")
    return folder


@pytest.fixture
def taq(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["taq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            taq_vllm.cli.main()
        output = capsys.readouterr()
        return ended.value.code or 0, output.out, output.err

    return run


def test_the_steps_one_by_one_end_in_a_verified_checkpoint(taq, model, task, tmp_path):
    scores, plan, out = tmp_path / "s.json", tmp_path / "p.json", tmp_path / "out"
    assert taq("score", model, "--task", task, "-o", scores)[0] == 0
    assert taq("plan", model, "--scores", scores, "--budget", "6bits", "-o", plan)[0] == 0
    assert taq("quantize", model, "--plan", plan, "--task", task, "-o", out)[0] == 0
    made = json.loads(plan.read_text())
    assert made["scorer"]["name"] == "kl"
    assert (made["allocation"]["name"], made["allocation"]["granularity"]) == ("knapsack", "module")
    code, text, _ = taq("verify", out)
    assert code == 0
    assert "is whole" in text


def test_a_step_run_again_says_so_and_changes_nothing(taq, model, task, tmp_path):
    out = tmp_path / "out"
    first = json.loads(taq("specialize", model, "--task", task, "--budget", "6bits", "-o", out, "--json")[1])
    stamps = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    code, text, _ = taq("specialize", model, "--task", task, "--budget", "6bits", "-o", out, "--json")
    again = json.loads(text)
    assert code == 0
    assert (first["scored"], first["quantized"]) == (True, True)
    assert (again["scored"], again["quantized"]) == (False, False)
    assert stamps == {file: file.stat().st_mtime_ns for file in out.iterdir()}


def test_dry_runs_print_sizes_and_write_nothing(taq, model, tmp_path):
    plan = tmp_path / "p.json"
    code, text, _ = taq("plan", model, "--baseline", "edges", "--budget", "6bits", "-o", plan, "--dry-run", "--json")
    assert code == 0
    assert json.loads(text)["average_bits"] <= 6
    assert not plan.exists()
    taq("plan", model, "--baseline", "edges", "--budget", "6bits", "-o", plan)
    code, text, _ = taq("quantize", model, "--plan", plan, "-o", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(text)["disk_bytes"] == Plan.load(plan).budget.disk_bytes
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "MODEL", "--baseline", "edges", "--budget", "3bits"], 1, "below the smallest"),
        (["plan", "MODEL", "--baseline", "edges", "--budget", "5"], 1, "write it as 5.0bits"),
        (["plan", "MODEL", "--budget", "5bits"], 1, "needs scores"),
        (["plan", "/nowhere", "--baseline", "edges", "--budget", "5bits"], 1, "no model at /nowhere"),
        (["plan", "MODEL", "--scores", "/nowhere/s.json", "--budget", "5bits"], 1, "no scores at"),
        (["plan", "MODEL"], 2, "--budget"),
        (["plan", "MODEL", "--scores", "a", "--baseline", "edges", "--budget", "5bits"], 2, "not both"),
        (["score", "MODEL", "--task", "/nowhere"], 1, "/nowhere"),
        (["quantize", "MODEL", "--plan", "/nowhere.json", "-o", "OUT"], 1, "no plan at"),
        (["verify", "MODEL"], 1, "manifest.json"),
        (["frobnicate"], 2, "frobnicate"),
        (["score", "MODEL", "--hidden-memory", "2G"], 2, "write it as 2GiB"),
        (
            ["plan", "MODEL", "--baseline", "edges", "--budget", "5bits", "--symmetric", "4", "--asymmetric", "4"],
            2,
            "one",
        ),
        (
            ["specialize", "MODEL", "--scorer", "taq", "--task", "TASK", "--budget", "1bits", "-o", "OUT"],
            1,
            "'monotone' can meet",
        ),
        (["specialize", "MODEL", "--task", "TASK", "--budget", "1bits", "-o", "OUT"], 1, "'knapsack' can meet"),
        (
            ["specialize", "MODEL", "--scorer", "taq", "--task", "TASK", "--budget", "8bits", "-o", "OUT", "--head"],
            1,
            "--pin lm_head=8",
        ),
    ],
)
def test_wrong_input_is_one_clear_message_and_the_right_exit_code(taq, model, task, tmp_path, arguments, code, said):
    names = {"MODEL": model, "TASK": task, "OUT": tmp_path / "out"}
    got, _, error = taq(*(names.get(a, a) for a in arguments))
    assert got == code
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_several_budgets_a_curve_a_difference_and_an_explanation(taq, model, tmp_path):
    ask = ("--baseline", "random", "--granularity", "module")
    code, text, _ = taq(
        "plan", model, *ask, "--budget", "6bits", "--budget", "8bits", "-o", tmp_path / "p.json", "--json"
    )
    assert code == 0
    files = [each["output"] for each in json.loads(text)["plans"]]
    assert [Path(file).name for file in files] == ["p-6bits.json", "p-8bits.json"]

    code, text, _ = taq("plan", "diff", *files)
    assert code == 0
    assert "matrices differ" in text
    code, text, _ = taq("plan", "explain", files[0], "1")
    assert code == 0
    assert "model.layers.1.mlp.down_proj: " in text

    command = ("plan", "curve", model, *ask, "-o", tmp_path / "c.csv", "--points", "3", "--json")
    code, text, _ = taq(*command, "--plot", tmp_path / "c.png")
    assert code == 0
    done = json.loads(text)
    assert 0 < done["corners"] <= done["points"] <= done["corners"] + 3
    assert len((tmp_path / "c.csv").read_text().splitlines()) == done["points"] + 1
    assert (tmp_path / "c.png").is_file()


def test_symmetry_is_chosen_by_bitwidth(taq, model, tmp_path):
    ask = ("plan", model, "--baseline", "edges", "--budget", "6bits", "-o", tmp_path / "p.json")
    assert taq(*ask, "--symmetric", "4", "--asymmetric", "8")[0] == 0
    assert {(m.bits, m.symmetric) for m in Plan.load(tmp_path / "p.json").matrices.values()} >= {(4, True), (8, False)}


def test_a_plan_in_milliseconds_of_another_devices_table(taq, model, tmp_path):
    from taq_kernels import tuned
    from taq_kernels.tuned import LatencyEntry, Table

    shapes = ((512, 256), (256, 256), (768, 256), (256, 384), (3072, 256))
    latencies = tuple(LatencyEntry(n, k, bits, 128, 4, 0, bits * n / 100) for n, k in shapes for bits in (4, 8, 16))
    Table("NVIDIA Test 1", tuned.kernel_version("cuda"), {}, (), latencies).save(tmp_path / "t.json")
    ask = ("plan", model, "--baseline", "edges", "--budget", "2ms@batch=4", "-o", tmp_path / "p.json")
    ask = (*ask, "--device-table", tmp_path / "t.json", "--for-device", "NVIDIA Test 1")
    assert taq(*ask)[0] == 1  # nothing says what a step takes beside its matrices
    code, text, _ = taq(*ask, "--fixed-ms", "0.5")
    assert code == 0
    assert "ms per decode step of batch 4 (predicted)" in text
    assert 500 < Plan.load(tmp_path / "p.json").budget.latency_us[4] <= 2000


def test_a_dry_run_of_scoring_keeps_its_hidden_states_small_and_writes_no_scores(taq, model, task, tmp_path):
    ask = ("score", model, "--task", task, "-o", tmp_path / "s.json", "--hidden-memory", "1kB")
    code, text, _ = taq(*ask, "--dry-run", "--json")
    assert code == 0
    assert json.loads(text)
    assert not (tmp_path / "s.json").exists()


def test_unfinished_work_of_other_requests_is_told(taq, model, tmp_path):
    (tmp_path / "s.json.0123456789ab.journal.hidden").write_bytes(bytes(2_000_000))
    code, text, _ = taq("score", model, "--scorer", "random", "-o", tmp_path / "s.json")
    assert code == 0
    assert "1 files of other requests that did not finish lie beside it (2.0 MB)" in text


def test_specialize_again_with_another_setting_scores_again(taq, model, task, tmp_path):
    ask = ("specialize", model, "--task", task, "--budget", "6bits", "--scorer", "random", "--method", "rtn", "--json")
    assert taq(*ask, "-o", tmp_path / "out", "--set", "seed=1")[0] == 0
    taq(*ask, "-o", tmp_path / "out", "--set", "seed=2")
    assert len(list((tmp_path / "out.work").glob("scores-random-*.json"))) == 2


def test_a_full_gpu_is_one_message_that_says_what_to_lower(taq, model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(taq_vllm.scoring, "score", full)
    code, _, error = taq("score", model, "--scorer", "random")
    assert code == 1
    assert "Tried to allocate 1 GiB" in error
    assert "--hidden-memory" in error


def test_the_installed_command_answers():
    command = Path(sys.executable).parent / "taq"
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "taq-vllm 0.1.0"


@pytest.fixture
def quick_tuning(monkeypatch, tmp_path):
    """Tables in a folder of their own, and few copies of weights: what is measured does not matter here."""
    from taq_kernels import ops, timing, tuned

    ops.kernel_name(torch.device("cpu"))  # the compiled kernel is found before the folder of caches moves
    monkeypatch.setattr(timing, "CPU_BYTES", 100_000)
    monkeypatch.setattr(timing, "MEASURED_RUNS", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    tuned._tables.cache_clear()


def test_tune_measures_a_models_layers_where_the_kernels_look_for_them(taq, model, tmp_path, quick_tuning):
    from taq_kernels import tuned

    command = ("tune", model, "--device", "cpu", "--m", "1,16")
    code, text, _ = taq(*command, "--json")
    assert code == 0
    done = json.loads(text)
    # qkv [512, 256], o [256, 256], gate_up [768, 256], down [256, 384], head [3072, 256]; 4, 8 and 16 bits;
    # two M.
    assert (done["measured"], done["kept"], done["left"]) == (5 * 3 * 2, 0, 0)
    assert done["output"] == str(tmp_path / "cache" / "taq_kernels" / "tuned" / "cpu.json")
    entries = tuned.table_for("cpu").latencies
    assert {(e.rows, e.columns) for e in entries} == {(512, 256), (256, 256), (768, 256), (256, 384), (3072, 256)}
    assert all(e.us > 0 for e in entries)
    before = Path(done["output"]).read_text()
    code, text, _ = taq(*command)
    assert "0 measured now, 30 were there" in text
    assert "microseconds on cpu" in text
    assert Path(done["output"]).read_text() == before


def test_tune_stops_when_its_time_is_up_and_continues(taq, model, tmp_path, quick_tuning):
    table = tmp_path / "t.json"
    command = ("tune", model, "--device", "cpu", "--m", "1", "-o", table, "--json")
    assert json.loads(taq(*command, "--max-seconds", "0")[1])["left"] == 15
    assert json.loads(taq(*command)[1])["measured"] == 15
    assert json.loads(taq(*command, "--force")[1])["measured"] == 15


def test_tune_cuts_layers_for_ranks_and_takes_a_plan(taq, model, tmp_path, quick_tuning):
    plan, table = tmp_path / "p.json", tmp_path / "t.json"
    taq("plan", model, "--baseline", "edges", "--budget", "6bits", "-o", plan)
    command = ("tune", model, "--plan", plan, "--device", "cpu", "--m", "1", "-o", table, "--json")
    assert taq(*command, "--tensor-parallel-size", "2")[0] == 0
    entries = json.loads(table.read_text())["latencies"]
    assert {(e["rows"], e["columns"], e["group_size"]) for e in entries} == {
        (256, 256, 128),
        (256, 128, 128),
        (384, 256, 128),
        (256, 192, 64),
        (1536, 256, 128),
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tune", "/nowhere"], 1, "no model at /nowhere"),
        (["tune", "MODEL", "--device", "abacus"], 2, "got device 'abacus'"),
        (["tune", "MODEL", "--device", "meta"], 1, "there are cpu and cuda"),
        (["tune", "MODEL", "--m", "1,two"], 2, "whole numbers"),
        (["tune", "MODEL", "--m", "0"], 2, "whole numbers"),
        (["tune", "MODEL", "--device", "cpu", "-o", "MODEL"], 1, "cannot write a table to"),
        (["tune", "MODEL", "--device", "cpu", "-o", "MODEL/config.json"], 1, "not a table of version 1"),
        (["tune", "MODEL", "--device", "cpu", "-o", "MODEL/config.json/t.json"], 1, "cannot write a table to"),
        (["tune", "MODEL", "--device", "cpu", "--tensor-parallel-size", "3"], 1, "3 ranks do not divide"),
        (["tune", "MODEL", "--device", "cpu", "--plan", "/nowhere.json"], 1, "no plan at"),
    ],
)
def test_tune_refuses_wrong_input(taq, model, quick_tuning, arguments, code, said):
    got, _, error = taq(*(str(argument).replace("MODEL", str(model)) for argument in arguments))
    assert got == code
    assert said in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tune_without_a_gpu_says_what_can_be_measured(taq, model, quick_tuning):
    code, _, error = taq("tune", model, "--device", "cuda")
    assert code == 1
    assert "torch finds no GPU here; measure this machine with --device cpu" in error
