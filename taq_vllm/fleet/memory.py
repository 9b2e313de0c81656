"""What of a fleet fits into memory, before anything starts: weights, the engine's own, and what is left for KV cache.

A server may take its share of the device. Of that, weights take what the plan says (or the files of a checkpoint
without one), and the engine's processes `ENGINE_BYTES`; the rest becomes KV cache. A share too small for one request
of the longest length is an error here, and so are shares that do not fit together.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from taq_vllm.fleet.spec import Fleet, TaskServers
from taq_vllm.memory import available_bytes, total_bytes
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, Plan

ENGINE_BYTES = 1_600_000_000
"""Of a server's three processes on a CPU, weights and cache apart: 1.47 GB of memory of their own were measured. For a
GPU as much is taken, an estimate."""
GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """Where servers run.

    Attributes:
        kind: `cpu` or `cuda`.
        name: for messages.
        total_bytes: of its memory; of several GPUs, of the smallest.
        free_bytes: the least that is free on any.
        cores: that this process may use.
    """

    kind: str
    name: str
    total_bytes: int
    free_bytes: int
    cores: int


@dataclass(frozen=True)
class ServerMemory:
    """What one server of a task takes; of several GPUs, on each of them.

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
        """How many the cache holds at once."""
        return self.cache_bytes // self.token_bytes

    @property
    def server_bytes(self) -> int:
        """All that one server takes."""
        return self.weight_bytes + ENGINE_BYTES + self.cache_bytes


def this_device() -> Device:
    """The GPUs if there are any, else this machine. Asks the driver's own tool: torch would take memory of the GPU."""
    cores = len(os.sched_getaffinity(0))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        gpus = [line.rsplit(",", 2) for line in done.stdout.splitlines()] if done.returncode == 0 else []
        if gpus:
            total, free = (min(int(gpu[place]) for gpu in gpus) * _MIB for place in (1, 2))
            return Device("cuda", gpus[0][0], total, free, cores)
    return Device("cpu", "this machine", total_bytes(), available_bytes(page_cache=False), cores)


def needs(fleet: Fleet, device: Device) -> dict[str, ServerMemory]:
    """What each task's servers take.

    Raises:
        ValueError: a checkpoint that is not there or is damaged, a share too small for one request, or shares that do
            not fit together, with what would.
    """
    found = {name: _need(name, member, device) for name, member in fleet.tasks.items()}
    _check_together(fleet, found, device)
    return found


def _need(name: str, member: TaskServers, device: Device) -> ServerMemory:
    files = ModelFiles(member.checkpoint)
    config = files.config
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cached = member.argument("kv-cache-dtype") or "auto"
    number = 1 if cached.startswith("fp8") else 4 if member.argument("dtype") == "float32" else 2
    # Of one GPU's share, where several hold a server's layers or heads.
    gpus = member.gpus if device.kind == "cuda" else 1
    token_bytes = -(-2 * config["num_hidden_layers"] * heads * head_size * number // gpus)
    longest = member.number("max-model-len") or config["max_position_embeddings"]
    share = int(member.memory * device.total_bytes)
    weights = _weight_bytes(files) // gpus
    cache = share - weights - ENGINE_BYTES
    if device.kind == "cpu":
        cache = cache // GIB * GIB
    need = ServerMemory(name, member.replicas, weights, share, max(0, cache), token_bytes, longest)
    least = longest * token_bytes
    if need.cache_bytes < least or need.cache_bytes == 0:
        whole = -(-least // GIB) * GIB if device.kind == "cpu" else least
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


def _check_together(fleet: Fleet, found: Mapping[str, ServerMemory], device: Device) -> None:
    """Every GPU has to hold its part of the servers that `devices` puts on it; a CPU holds everything."""
    loads: dict[str, int] = {}
    for name, member in fleet.tasks.items():
        for replica in range(member.replicas):
            if device.kind == "cpu":
                where = ["memory"]
            else:
                # Without a choice each server takes the first ones.
                where = member.devices[replica].split(",") if member.devices else list(map(str, range(member.gpus)))
            for part in where:
                loads[part] = loads.get(part, 0) + found[name].server_bytes
    for where, load in loads.items():
        if load > device.free_bytes:
            parts = ", ".join(f"{need.servers} x {need.task} {_gb(need.server_bytes)}" for need in found.values())
            place = device.name if device.kind == "cpu" else f"GPU {where} ({device.name})"
            raise ValueError(
                f"the fleet needs {_gb(load)} of {place}: {parts}; free are {_gb(device.free_bytes)} of "
                f"{_gb(device.total_bytes)}. Give smaller shares or fewer replicas, put servers on other GPUs "
                "(`devices`), or end what else takes memory"
            )


def _weight_bytes(files: ModelFiles) -> int:
    """In the server's memory: by the plan of a quantized checkpoint, else its tensors."""
    plan = files.path / PLAN_FILE
    if plan.is_file():
        return Plan.load(plan).budget.resident_bytes
    return sum(info.end - info.start for info in files.tensors.values())


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
