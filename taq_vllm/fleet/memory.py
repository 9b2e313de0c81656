"""What of a fleet fits into memory, before anything starts: weights, the engine's own, and what is left for KV cache.

A server may take its share of the device. Of that, weights take what the plan says (or the files of a checkpoint
without one), and the engine's processes `ENGINE_BYTES`; the rest becomes KV cache. A share too small for one request
of the longest length is an error here, and so are shares that do not fit together.

GPUs go by the number that nvidia-smi gives them, and servers are told to count in the same order.
"""

import csv
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from taq_vllm.fleet.spec import Fleet, TaskServers
from taq_vllm.memory import available_bytes, total_bytes
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, Plan
from taq_vllm.progress import gigabytes

ENGINE_BYTES = 1_600_000_000
"""Of a server's three processes on a CPU, weights and cache apart: 1.47 GB of memory of their own were measured. For a
GPU as much is taken, an estimate."""
GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """One GPU's, or this machine's.

    Attributes:
        name: for messages.
        total_bytes: all of it.
        free_bytes: that can be had now.
    """

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Device:
    """Where servers run.

    Attributes:
        kind: `cpu` or `cuda`.
        cores: that this process may use.
        memories: by the GPU's number or UUID; of a CPU one.
        visible: those that servers take that name none.
    """

    kind: str
    cores: int
    memories: Mapping[str, Memory]
    visible: tuple[str, ...]

    def places(self, task: str, member: TaskServers, replica: int) -> list[Memory]:
        """Whose memory a server takes; of a CPU as often as there are copies of its weights.

        Raises:
            ValueError: a GPU that is not there, or fewer than the server runs on.
        """
        if self.kind == "cpu":
            return list(self.memories.values()) * (member.gpus // member.shards)
        # Without a choice each server takes the first ones.
        chosen = member.devices[replica].split(",") if member.devices else self.visible[: member.gpus]
        if len(chosen) < member.gpus:
            raise ValueError(
                f"task {task}: a server runs on {member.gpus} GPUs, by its `arguments`, and {len(chosen)} can be seen "
                "here; see nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        numbers = [number.strip() for number in chosen]
        for number in numbers:
            if number not in self.memories:
                known = ", ".join(number for number in self.memories if number.isdecimal())
                raise ValueError(
                    f"task {task}: nvidia-smi tells the memory of no GPU {number!r}, but of {known or 'none'}. Name "
                    "others in `devices`"
                )
        return [self.memories[number] for number in numbers]


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
    """The GPUs if there are any that CUDA_VISIBLE_DEVICES leaves, else this machine.

    Asks the driver's own tool: torch would take memory of the GPU.
    """
    cores = len(os.sched_getaffinity(0))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") and chosen not in ("", "-1"):
        query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
        if gpus := [line for line in lines if len(line) == 5 and done.returncode == 0]:
            memories = {}
            for number, uuid, name, total, free in gpus:
                if total.isdecimal() and free.isdecimal():  # else `[N/A]`, as where it is the machine's memory
                    memory = Memory(f"GPU {number} ({name})", int(total) * _MIB, int(free) * _MIB)
                    memories |= {number: memory, uuid: memory}
            visible = chosen.split(",") if chosen else [number for number, *_ in gpus]
            return Device("cuda", cores, memories, tuple(number.strip() for number in visible))
    memory = Memory("this machine", total_bytes(), available_bytes(page_cache=False))
    return Device("cpu", cores, {"memory": memory}, ("memory",))


def needs(fleet: Fleet, device: Device) -> dict[str, ServerMemory]:
    """What each task's servers take.

    Raises:
        ValueError: a checkpoint that is not there or is damaged, a share too small for one request, or shares that do
            not fit together, with what would.
    """
    places = {
        name: [device.places(name, member, replica) for replica in range(member.replicas)]
        for name, member in fleet.tasks.items()
    }
    found = {
        # Of different GPUs the smallest decides.
        name: _need(name, member, device.kind, min(memory.total_bytes for server in places[name] for memory in server))
        for name, member in fleet.tasks.items()
    }
    _check_together(fleet, device.kind, found, places)
    return found


def _need(name: str, member: TaskServers, kind: str, total: int) -> ServerMemory:
    files = ModelFiles(member.checkpoint, member.argument("revision"))

    def told(field: str, otherwise: str = "`vllm serve` may serve it, a fleet cannot plan its memory") -> int:
        if files.config.get(field) is None:
            raise ValueError(f"task {name}: {files.path / 'config.json'} has no {field}: {otherwise}")
        return files.config[field]

    heads = files.config.get("num_key_value_heads") or told("num_attention_heads")
    head_size = files.config.get("head_dim") or told("hidden_size") // told("num_attention_heads")
    cached = member.argument("kv-cache-dtype") or "auto"
    number = 1 if cached.startswith("fp8") else 4 if member.argument("dtype") == "float32" else 2
    # Of one GPU's share, where several hold a server's layers or heads.
    shards = member.shards if kind == "cuda" else 1
    token_bytes = -(-2 * told("num_hidden_layers") * heads * head_size * number // shards)
    longest = member.number("max-model-len") or told("max_position_embeddings", "give --max-model-len in `arguments`")
    share = int(member.memory * total)
    weights = _weight_bytes(files) // shards
    cache = share - weights - ENGINE_BYTES
    if kind == "cpu":
        cache = cache // GIB * GIB
    need = ServerMemory(name, member.replicas, weights, share, max(0, cache), token_bytes, longest)
    least = longest * token_bytes
    if need.cache_bytes < least or need.cache_bytes == 0:
        whole = -(-least // GIB) * GIB if kind == "cpu" else least
        enough = (weights + ENGINE_BYTES + whole) / total
        raise ValueError(
            f"task {name}: {member.memory:g} of {gigabytes(total)} is {gigabytes(share)}, which leaves "
            f"{gigabytes(need.cache_bytes)} for the KV cache beside {gigabytes(weights)} of weights and "
            f"{gigabytes(ENGINE_BYTES)} of the engine's own; one request of {longest} tokens needs {gigabytes(least)}"
            f"{', and vLLM takes whole GiB on a CPU' if kind == 'cpu' else ''}. "
            + (
                f"Give it a share of at least {enough + 0.005:.2f}, or a smaller --max-model-len"
                if enough < 1
                else "It does not fit on this device: choose a smaller --max-model-len, or a plan of fewer bits"
            )
        )
    return need


def _check_together(
    fleet: Fleet, kind: str, found: Mapping[str, ServerMemory], places: Mapping[str, list[list[Memory]]]
) -> None:
    """Every GPU has to hold its part of the servers that are put on it; a CPU holds everything."""
    loads: dict[Memory, Counter[str]] = {}
    for name, servers in places.items():
        for server in servers:
            for memory in server:
                loads.setdefault(memory, Counter())[name] += 1
    for memory, servers_of in loads.items():
        # Of a GPU a server takes its share, whatever the others have; on a CPU what it needs.
        sizes = {
            name: found[name].server_bytes if kind == "cpu" else int(fleet.tasks[name].memory * memory.total_bytes)
            for name in servers_of
        }
        load = sum(count * sizes[name] for name, count in servers_of.items())
        if load > memory.free_bytes:
            parts = ", ".join(f"{count} x {name} {gigabytes(sizes[name])}" for name, count in servers_of.items())
            raise ValueError(
                f"the fleet needs {gigabytes(load)} of {memory.name}: {parts}; free are "
                f"{gigabytes(memory.free_bytes)} of {gigabytes(memory.total_bytes)}. Give smaller shares or fewer "
                "replicas, put servers on other GPUs (`devices`), or end what else takes memory"
            )


def _weight_bytes(files: ModelFiles) -> int:
    """In the server's memory: by the plan of a quantized checkpoint, else its tensors."""
    plan = files.path / PLAN_FILE
    if plan.is_file():
        return Plan.load(plan).budget.resident_bytes
    return sum(info.end - info.start for info in files.tensors.values())
