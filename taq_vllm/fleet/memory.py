"""What of a fleet fits into memory, before anything starts: weights, the engine's own, and what is left for KV cache.

A server may take its share of the device. Of that, weights take what the plan says (or the files of a checkpoint
without one), and the engine's processes `ENGINE_BYTES`; the rest becomes KV cache. A share too small for one request
of the longest length is an error here, and so are shares that do not fit together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from taq_vllm.fleet.spec import Fleet, Member
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, Plan

ENGINE_BYTES = 1_600_000_000
"""Of a server's three processes on a CPU, weights and cache apart: 1.47 GB of memory of their own were measured. For a
GPU as much is taken, an estimate."""
_CACHE_BYTES_PER_NUMBER = 2
_GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """Where servers run."""

    kind: str
    """`cpu` or `cuda`"""
    name: str
    total_bytes: int
    free_bytes: int
    cores: int


@dataclass(frozen=True)
class Need:
    """What one server of a task takes.

    Attributes:
        task: its name.
        servers: replicas.
        weight_bytes: in the server's memory.
        share_bytes: what it may take in all.
        cache_bytes: what is left for the KV cache; on a CPU whole GiB, because vLLM takes no others.
        token_bytes: of the KV cache.
        longest: tokens of the longest request that is served.
    """

    task: str
    servers: int
    weight_bytes: int
    share_bytes: int
    cache_bytes: int
    token_bytes: int
    longest: int

    @property
    def tokens(self) -> int:
        """That the cache holds at once."""
        return self.cache_bytes // self.token_bytes

    @property
    def server_bytes(self) -> int:
        """Of one server."""
        return self.weight_bytes + ENGINE_BYTES + self.cache_bytes


def this_device() -> Device:
    """The first GPU if there is one, else this machine."""
    import os

    import psutil
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Device("cuda", torch.cuda.get_device_name(), total, free, len(os.sched_getaffinity(0)))
    memory = psutil.virtual_memory()
    return Device("cpu", "this machine", memory.total, memory.available, len(os.sched_getaffinity(0)))


def needs(fleet: Fleet, device: Device) -> dict[str, Need]:
    """What each task's servers take.

    Raises:
        ValueError: a checkpoint that is not there or is damaged, a share too small for one request, or shares that do
            not fit together, with what would.
    """
    found = {name: _need(name, member, device) for name, member in fleet.tasks.items()}
    _check_together(fleet, found, device)
    return found


def _need(name: str, member: Member, device: Device) -> Need:
    files = ModelFiles(member.checkpoint)
    config = files.config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 2 * config["num_hidden_layers"] * heads * head_size * _CACHE_BYTES_PER_NUMBER
    longest = int(member.argument("--max-model-len") or config["max_position_embeddings"])
    share = int(member.memory * device.total_bytes)
    weights = _weight_bytes(files)
    cache = share - weights - ENGINE_BYTES
    if device.kind == "cpu":
        cache = cache // _GIB * _GIB
    need = Need(name, member.replicas, weights, share, max(0, cache), token_bytes, longest)
    least = longest * token_bytes
    if need.cache_bytes < least or need.cache_bytes == 0:
        whole = -(-least // _GIB) * _GIB if device.kind == "cpu" else least
        enough = (weights + ENGINE_BYTES + whole) / device.total_bytes
        raise ValueError(
            f"task {name}: {member.memory:g} of {_gb(device.total_bytes)} is {_gb(share)}, which leaves "
            f"{_gb(need.cache_bytes)} for the KV cache beside {_gb(weights)} of weights and {_gb(ENGINE_BYTES)} of the "
            f"engine's own; one request of {longest} tokens needs {_gb(least)}"
            f"{', and vLLM takes whole GiB on a CPU' if device.kind == 'cpu' else ''}. "
            + (
                f"Give it a share of at least {enough + 0.005:.2f}, or a smaller --max-model-len"
                if enough < 1
                else "It does not fit on this device: choose a smaller --max-model-len, or a plan of fewer bits"
            )
        )
    return need


def _check_together(fleet: Fleet, found: Mapping[str, Need], device: Device) -> None:
    """GPUs hold what `devices` puts on them; a CPU holds everything."""
    loads: dict[str, int] = {}
    for name, member in fleet.tasks.items():
        for replica in range(member.replicas):
            where = member.devices[replica] if member.devices else "all GPUs" if device.kind == "cuda" else "memory"
            loads[where] = loads.get(where, 0) + found[name].server_bytes
    for where, load in loads.items():
        if load > device.free_bytes:
            parts = ", ".join(f"{need.servers} x {need.task} {_gb(need.server_bytes)}" for need in found.values())
            raise ValueError(
                f"the fleet needs {_gb(load)} of {device.name} ({where}): {parts}; free are "
                f"{_gb(device.free_bytes)} of {_gb(device.total_bytes)}. Give smaller shares or fewer replicas, or end "
                "what else takes memory"
            )


def _weight_bytes(files: ModelFiles) -> int:
    """In the server's memory: by the plan of a quantized checkpoint, else its tensors."""
    plan = files.path / PLAN_FILE
    if plan.is_file():
        return Plan.load(plan).budget.resident_bytes
    return sum(info.end - info.start for info in files.tensors.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
