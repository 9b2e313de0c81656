import os

import pytest
import torch
from taq_kernels.tuned import LatencyEntry, Table
from tiny_models import make_tiny

from taq_vllm import step_latency
from taq_vllm.budget import Latencies
from taq_vllm.model_files import ModelFiles
from taq_vllm.step_latency import Step, measure_steps, rest_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model")))


def test_a_model_with_a_short_context_is_refused(tmp_path):
    short = ModelFiles(make_tiny("qwen3", tmp_path, max_position_embeddings=32))
    with pytest.raises(ValueError, match="context of 32 tokens; a step is measured over 49"):
        next(measure_steps(short, [1], CPU))


def test_the_engine_sees_the_one_gpu_that_is_measured(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert step_latency._environment(torch.device("cuda:2"))["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert step_latency._environment(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "7"
    assert step_latency._environment(CPU)["CUDA_VISIBLE_DEVICES"] == os.environ["CUDA_VISIBLE_DEVICES"]


def test_a_step_of_other_threads_than_the_matrices_is_refused(files):
    latencies = Latencies.of_table(Table("cpu", "k", {}, (), (LatencyEntry(1, 128, 4, 128, 1, 2, 1.0),)), "the table")
    with pytest.raises(ValueError, match="with 1 threads, and the table has latencies for 2"):
        rest_of(Step(1, 5.0, 1, "cpu"), latencies, files)


@pytest.mark.engine
def test_steps_come_one_by_one_with_their_device_and_a_failing_batch_loses_none(files):
    """No engine decodes -1 sequences."""
    found = measure_steps(files, [1, -1], CPU)
    first = next(found)
    assert (first.batch, first.device) == (1, "cpu")
    assert first.us > 0
    with pytest.raises(ValueError, match="vLLM could not decode"):
        next(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpus_step_is_not_measured_with_a_vllm_for_cpus(files, monkeypatch):
    monkeypatch.setattr(step_latency, "device_name", lambda device: "NVIDIA Test 1")
    monkeypatch.setattr(step_latency, "_environment", lambda device: dict(os.environ))
    with pytest.raises(ValueError, match="this vLLM is for cpu, not for a GPU"):
        next(measure_steps(files, [1], torch.device("cuda:0")))
