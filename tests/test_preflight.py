import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny

from taq_vllm import preflight
from taq_vllm.allocate import Request, allocate
from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
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


def test_what_would_be_refused_is_refused_before_anything_runs(model, task_file, tmp_path):
    files = ModelFiles(model)
    with pytest.raises(ValueError, match="reads a task's prompts"):
        preflight.score_estimate(files, None, "taq", tmp_path / "s.json")
    with pytest.raises(ValueError, match="there are"):
        preflight.score_estimate(files, load_task(task_file), "magic", tmp_path / "s.json")


def test_too_little_disk_is_said():
    estimate = preflight.Estimate(1, {"libraries": 1}, 0, 2 * 10**9, 10**9, 1.0, 2, 1.0, 4)
    assert "NOT ENOUGH" in estimate.lines()[2]


@pytest.mark.parametrize(("seconds", "said"), [(5, "5 s"), (600, "10 min"), (36000, "10.0 h")])
def test_durations_read_well(seconds, said):
    assert preflight.duration(seconds) == said
