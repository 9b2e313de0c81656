"""What tests of several modules share: the skip for machines without a GPU, the GPU kernel in Triton's interpreter,
vLLM without its engine, and the lines of the support table."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.provenance import provenance

# Before vLLM is imported: no network, one engine in this process, threads left alone, a small cache, and the log that
# tests read (an evaluation would turn it down for the whole process).
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="INFO",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
)


SUPPORT = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--support", metavar="FILE", type=Path, help="write what tests marked `feature` found, as lines")


def pytest_configure(config):
    config.stash[SUPPORT] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = item.get_closest_marker("feature")
    if mark and (report.when == "call" or not report.passed):
        name, compared = mark.args
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
        line = {"feature": name, "compared": compared, "outcome": report.outcome, "reason": reason}
        item.config.stash[SUPPORT].append({"benchmark": "support", **line})
    return report


def pytest_sessionfinish(session):
    if path := session.config.option.support:
        source = provenance()
        path.write_text("".join(json.dumps(line | source) + "\n" for line in session.config.stash[SUPPORT]))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture(scope="session")
def interpreted():
    """`taq_kernels.gemm` a second time, its functions made for Triton's interpreter. Other tests compile the first."""
    import triton
    from taq_kernels import gemm

    spec = importlib.util.spec_from_file_location("interpreted_gemm", gemm.__file__)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.runtime.interpret = True
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory):
    """vLLM's process groups for one rank, so that its layers can be built without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    store = tmp_path_factory.mktemp("world") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, distributed_init_method=f"file://{store}", local_rank=0, backend="gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()
