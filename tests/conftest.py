"""What tests of several modules share: the skip for machines without a GPU, the GPU kernel in Triton's interpreter, and
vLLM without its engine."""

import importlib.util
import os
import sys

import pytest
import torch

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
