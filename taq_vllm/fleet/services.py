"""The processes of a fleet on one machine: a `vllm serve` per replica on loopback, and the endpoint in front."""

import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from taq_vllm.fleet.memory import GIB, Device, ServerMemory
from taq_vllm.fleet.spec import ENDPOINT, Fleet, TaskServers
from taq_vllm.plan import PLAN_FILE

SCRIPTS = Path(sysconfig.get_path("scripts"))
"""Where this Python's commands are installed."""


@dataclass(frozen=True)
class Address:
    """Where a process listens.

    Attributes:
        name: of the process, as `trivia-0`, or `endpoint`.
        port: on which it listens.
        host: where this machine reaches it.
        task: the model's name in requests; None for the endpoint.
        replica: of the task.
    """

    name: str
    port: int
    host: str = "127.0.0.1"
    task: str | None = None
    replica: int = 0

    @property
    def url(self) -> str:
        """Where its health is asked."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Service:
    """A process that is kept running.

    Attributes:
        address: where it listens.
        command: with its arguments.
        environment: variables on top of those of the process that starts it.
        gives_way: once it answers, it lets those that still start have the cores first.
    """

    address: Address
    command: tuple[str, ...]
    environment: Mapping[str, str]
    gives_way: bool = False


def check_key(key: str | None) -> None:
    """Refuse a key that no request can bring.

    Raises:
        ValueError: it has a space, a line end, or a letter beyond ASCII.
    """
    if key and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            "the key has a space, a line end or a letter beyond ASCII, and no request can bring it; files and `echo` "
            "often end with a line end (`printf %s KEY` does not)"
        )


def bearer(key: str | None) -> dict[str, str]:
    """The headers of a request that brings the key; none without one."""
    return {"authorization": f"Bearer {key}"} if key else {}


def addresses(fleet: Fleet) -> list[Address]:
    """Of all processes, the endpoint last. The servers' ports follow the endpoint's."""
    replicas = [(name, replica) for name, member in fleet.tasks.items() for replica in range(member.replicas)]
    servers = [
        Address(f"{name}-{replica}", fleet.port + 1 + place, task=name, replica=replica)
        for place, (name, replica) in enumerate(replicas)
    ]
    return [*servers, Address(ENDPOINT, fleet.port, fleet.local_host)]


def services(fleet: Fleet, needs: Mapping[str, ServerMemory], device: Device) -> list[Service]:
    """All processes, in the order of `addresses`.

    Args:
        fleet: checked.
        needs: `memory.needs` of it.
        device: where it runs.
    """
    *servers, endpoint = addresses(fleet)
    found = []
    for address in servers:
        member = fleet.tasks[address.task]
        environment = _environment(member, address.replica, needs[address.task], device, fleet.servers)
        command = (*_serve(member, address.task, device), "--host", "127.0.0.1", "--port", str(address.port))
        # On a CPU servers share the cores, and those that serve would leave too little to one that starts again.
        found.append(Service(address, command, environment, gives_way=device.kind == "cpu"))
    workers = [f"{address.task}={address.url}" for address in servers]
    command = (sys.executable, "-m", "taq_vllm.fleet.endpoint", fleet.host, str(fleet.port), *workers)
    return [*found, Service(endpoint, command, {})]


def serve_arguments(member: TaskServers) -> tuple[str, ...]:
    """Of `vllm serve`, as far as they are the same wherever it runs, but for the checkpoint and the model's name."""
    # A plan beside 16-bit weights is followed only if it is asked for; a written checkpoint is recognised anyway.
    planned = (Path(member.checkpoint) / PLAN_FILE).is_file() and member.argument("quantization") is None
    return (*(("--quantization", "taq") if planned else ()), *member.arguments)


def _serve(member: TaskServers, task: str, device: Device) -> tuple[str, ...]:
    share = ("--gpu-memory-utilization", f"{member.memory:g}") if device.kind == "cuda" else ()
    command = (str(SCRIPTS / "vllm"), "serve", member.checkpoint, "--served-model-name", task)
    return (*command, *serve_arguments(member), *share)


def _environment(member: TaskServers, replica: int, need: ServerMemory, device: Device, servers: int) -> dict[str, str]:
    # A server's own processes talk to each other through ports too, on the address of the machine's name if not told.
    ours = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if device.kind == "cuda":
        ours["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # numbers GPUs as nvidia-smi does
        ours |= {"CUDA_VISIBLE_DEVICES": member.devices[replica]} if member.devices else {}
    else:
        # Servers share the cores: each would bind its threads to the same ones.
        ours |= {
            "VLLM_CPU_KVCACHE_SPACE": str(need.cache_bytes // GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, device.cores // servers)),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return ours | dict(member.environment)
