import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny

from taq_vllm import preflight
from taq_vllm.allocate import Request, allocate
from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.progress import duration
from taq_vllm.scoring import baseline, score
from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import load_task


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Blocks of 20 MB in float32: they are told from the libraries' memory."""
    return make_tiny(
        "llama",
        tmp_path_factory.mktemp("model"),
        hidden_size=512,
        intermediate_size=2560,
        num_hidden_layers=5,
        max_position_embeddings=512,
    )


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "tiny.jsonl"
    rows = [
        {"id": str(i), "prompt": "one two three " * (20 + i) + str(i), "answers": ["x"], "completion": " four"}
        for i in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("scorer", "settings"), [("taq", {}), ("taqo", {}), ("kl", {"bits": [4, 8]}), ("loss", {})])
def test_block_runs_and_hidden_states_are_those_of_the_whole_run(
    model, task_file, tmp_path, monkeypatch, scorer, settings
):
    files, task = ModelFiles(model), load_task(task_file)
    settings = settings | {"batch_size": 3}
    estimate = preflight.score_estimate(files, task, scorer, tmp_path / "s.json", settings, "cpu")
    assert list(tmp_path.iterdir()) == []
    ran, loaded, models = [], [], []
    run, block = StreamedModel.run_with_gradient, StreamedModel.block

    def counted(self, layer, module, hidden):
        ran.append(layer)
        models.append(self)
        return run(self, layer, module, hidden)

    def counted_block(self, layer):
        loaded.append(layer)
        return block(self, layer)

    monkeypatch.setattr(StreamedModel, "run_with_gradient", counted)
    monkeypatch.setattr(StreamedModel, "block", counted_block)
    score(files, task, scorer, tmp_path / "s.json", settings, "cpu")
    assert estimate.block_runs == len(ran) / 2  # two batches
    weights = sum(2 * rows * columns for rows, columns in files.matrices.values()) / files.layers
    assert estimate.read_bytes >= len(loaded) * weights
    assert estimate.memory_bytes["hidden states"] == models[-1].storage.most_bytes


def test_a_scorer_that_reads_no_examples_is_estimated_too(model, tmp_path):
    estimate = preflight.score_estimate(ModelFiles(model), None, "weight-error", tmp_path / "s.json", {}, "cpu")
    assert estimate.seconds > 0
    assert estimate.read_bytes == sum(2 * rows * columns for rows, columns in ModelFiles(model).matrices.values())


@pytest.mark.parametrize("method", ["rtn", "clip"])
def test_the_disk_that_quantizing_needs_is_the_result_and_what_it_keeps(model, task_file, tmp_path, method):
    files, task = ModelFiles(model), load_task(task_file)
    plan = allocate(files, baseline(files, "edges"), Request("6.0bits"))
    calibration = Calibration(method=method, examples=6)
    estimate = preflight.quantize_estimate(files, plan, tmp_path / "out", calibration, task, "cpu")
    assert list(tmp_path.iterdir()) == []
    quantize_model(files, plan, tmp_path / "out", calibration, task, "cpu")
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    hidden = 6 * 4 * 512 * (max(len(row.prompt) for row in task.calibration))
    assert plan.budget.disk_bytes <= estimate.disk_bytes < written + 2 * hidden


_SCORE = """
import json, sys
from pathlib import Path
from taq_vllm import preflight, scoring
from taq_vllm.model_files import ModelFiles
from taq_vllm.tasks import load_task
model, task, folder, what = sys.argv[1:]
arguments = (ModelFiles(model), load_task(task), "taq", Path(folder) / "s.json", {"batch_size": 2}, "cpu")
if what == "estimate":
    print(json.dumps(preflight.score_estimate(*arguments).record()))
else:
    print(json.dumps({"peak": scoring.score(*arguments)[0].peak_memory_bytes}))
"""


def _ask(*arguments):
    command = [sys.executable, "-c", _SCORE, *map(str, arguments)]
    path = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in ("", "kernels"))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_the_memory_that_is_estimated_is_the_memory_that_is_used(model, task_file, tmp_path):
    estimate = _ask(model, task_file, tmp_path, "estimate")
    peak = _ask(model, task_file, tmp_path, "score")["peak"]
    # Blocks of one shape need one amount; what differs are pages that the allocator keeps: 10%
    assert peak <= estimate["peak_memory_bytes"] * 1.1
    assert estimate["peak_memory_bytes"] <= peak * 1.3
    assert estimate["memory_bytes"]["a block"] > 15e6


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("small"))


@pytest.fixture
def nothing_runs(monkeypatch):
    """A block that is loaded fails the test."""
    monkeypatch.setattr(StreamedModel, "block", lambda *_: pytest.fail("a block was loaded"))


def test_what_would_be_refused_is_refused_before_anything_runs(small, task_file, tmp_path, nothing_runs):
    files, task, output = ModelFiles(small), load_task(task_file), tmp_path / "s.json"
    with pytest.raises(ValueError, match="reads a task's prompts"):
        preflight.score_estimate(files, None, "taq", output)
    with pytest.raises(ValueError, match="there are"):
        preflight.score_estimate(files, task, "magic", output)
    output.write_text("{")
    with pytest.raises(ValueError, match=r"s\.json"):
        preflight.score_estimate(files, task, "taq", output)
    baseline(files, "edges").save(output)
    with pytest.raises(ValueError, match="holds other scores"):
        preflight.score_estimate(files, task, "taq", output)
    assert list(tmp_path.iterdir()) == [output]


def test_scores_that_may_be_replaced_are_estimated(small, tmp_path):
    files, output = ModelFiles(small), tmp_path / "s.json"
    baseline(files, "edges").save(output)
    assert preflight.score_estimate(files, None, "weight-error", output, device="cpu", force=True).seconds > 0


def test_a_checkpoint_that_would_be_refused_is_not_estimated(small, task_file, tmp_path, nothing_runs):
    files, task, output = ModelFiles(small), load_task(task_file), tmp_path / "out"
    plan = allocate(files, baseline(files, "edges"), Request("6.0bits"))
    full = allocate(files, baseline(files, "edges"), Request("16bits"))
    with pytest.raises(ValueError, match="nothing to quantize"):
        preflight.quantize_estimate(files, full, output, Calibration(), task, "cpu")
    with pytest.raises(ValueError, match="give --task"):
        preflight.quantize_estimate(files, plan, output, Calibration(), None, "cpu")
    output.write_text("a file")
    with pytest.raises(ValueError, match="holds something else"):
        preflight.quantize_estimate(files, plan, output, Calibration(), task, "cpu")
    output.unlink()
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        preflight.quantize_estimate(files, plan, output, Calibration(), task, "cpu")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "notes.txt"]


@pytest.mark.parametrize("scorer", ["taqo", "weight-error"])
def test_float32_weights_are_read_in_their_size(small, task_file, tmp_path, scorer):
    wide = make_tiny("llama", tmp_path / "wide", torch.float32)
    task = load_task(task_file)
    read = [
        preflight.score_estimate(ModelFiles(model), task, scorer, tmp_path / "s.json", {}, "cpu").read_bytes
        for model in (small, wide)
    ]
    assert read[1] == 2 * read[0]


def test_quantizing_reads_all_that_it_copies(small, tmp_path):
    files = ModelFiles(small)
    plan = allocate(files, baseline(files, "edges"), Request("6.0bits"))
    estimate = preflight.quantize_estimate(files, plan, tmp_path / "out", Calibration(method="rtn"), None, "cpu")
    assert estimate.read_bytes == sum(info.end - info.start for info in files.tensors.values())


def test_what_is_spilled_counts_on_the_disk_where_it_is_spilled(small, task_file, tmp_path):
    memory_disk = Path("/dev/shm")
    if not memory_disk.is_dir() or memory_disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")

    def asked(spill_folder):
        return preflight.score_estimate(
            ModelFiles(small),
            load_task(task_file),
            "taq",
            tmp_path / "s.json",
            {},
            "cpu",
            "layer",
            False,
            0,
            spill_folder,
        )

    here, there = asked(None), asked(memory_disk)
    assert here.spill_bytes == 0 < there.spill_bytes
    assert here.disk_bytes == there.disk_bytes + there.spill_bytes
    assert "spill folder's disk" in " ".join(there.lines())
    assert here.memory_bytes["hidden states"] == there.memory_bytes["hidden states"] == 0


_TOGETHER = """
import json, sys
from taq_vllm.cli import main
for command in json.loads(sys.argv.pop()):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
    print("end", flush=True)
"""


def _torchrun(processes, *commands):
    """What `taq` prints for each command in each of several processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(str(Path(__file__).parents[1] / part) for part in ("", "kernels"))
    env = os.environ | {"PYTHONPATH": path, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _TOGETHER, json.dumps([[str(word) for word in command] for command in commands])],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    answers = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * processes
    return [answer.split("end\n")[:-1] for answer in answers]


def test_processes_share_the_examples_of_an_estimate_and_one_prints_it(small, task_file, tmp_path):
    files, output = ModelFiles(small), tmp_path / "s.json"
    task = ["--task", task_file, "--device", "cpu", "--json", "--dry-run"]
    alone = preflight.score_estimate(files, load_task(task_file), "taq", output, {"batch_size": 1}, "cpu")
    plan = tmp_path / "plan.json"
    allocate(files, baseline(files, "edges"), Request("6.0bits")).save(plan)
    score = ["score", small, "--scorer", "taq", *task, "-o", output, "--set", "batch_size=1"]
    quantize = ["quantize", small, *task, "--plan", plan, "-o", tmp_path / "out", "--examples", 4, "--method", "clip"]
    (scored, quantized), others = _torchrun(2, score, quantize)
    assert others == ["", ""]
    assert list(tmp_path.iterdir()) == [plan]
    together = json.loads(scored)
    assert together["block_runs"] == alone.block_runs
    # Examples are of nearly one length: half of them, and some padding
    share = together["memory_bytes"]["hidden states"] / alone.memory_bytes["hidden states"]
    assert share == pytest.approx(0.5, abs=0.05)
    assert json.loads(quantized)["estimate"]["sampled_blocks"] == 2


def test_too_little_disk_is_said():
    enough = preflight.Estimate(1, {"libraries": 1}, 0, 10**9, 10**9, 10**9, 10**9, 1.0, 2, 1.0, 4)
    assert "NOT ENOUGH" not in " ".join(enough.lines())
    assert "NOT ENOUGH" in dataclasses.replace(enough, disk_bytes=2 * 10**9).lines()[2]
    spills = dataclasses.replace(enough, spill_bytes=2 * 10**9).lines()
    assert "NOT ENOUGH" not in spills[2]
    assert "NOT ENOUGH, free some space or choose another spill folder" in spills[3]


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (600, "10 min"), (36000, "10.0 h")])
def test_durations_read_well(seconds, said):
    assert duration(seconds) == said
