"""`fleet.yaml`: which checkpoint answers for which task, with how much of the device's memory.

version: 1
port: 8000                       # of the endpoint, on loopback unless `host` says otherwise
tasks:
  trivia:                        # the model's name in requests
    checkpoint: out/trivia       # a folder (relative to this file) or a hub id
    memory: 0.3                  # share of the device's memory, weights and KV cache together
  code:
    checkpoint: out/code
    memory: 0.3
    replicas: 2
    arguments: [--max-model-len, 4096]     # of `vllm serve`
"""

import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from taq_vllm.plan import Record

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=63)]

ENDPOINT = "endpoint"
"""The name of the process in front, which no task can have."""

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own, for the key that a request has to bring."""

_OURS = ("host", "port", "served-model-name", "model", "api-key", "gpu-memory-utilization", "uds")
_OUR_VARIABLES = {
    KEY_VARIABLE: "files would hold the key: set it where `taq fleet up` is called, or in the cluster's Secret",
    "CUDA_VISIBLE_DEVICES": "name the GPUs in `devices`",
}
_SHORT = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "pcp": "prefill-context-parallel-size",
    "q": "quantization",
}
_MULTIPLES = {unit: 1000**power for power, unit in enumerate("kmgt", 1)}
_MULTIPLES |= {unit: 1024**power for power, unit in enumerate("KMGT", 1)}


def option_name(argument: str) -> str | None:
    """The option that an argument names, as vLLM understands it; None for a value.

    `--max_model_len=9`, `--max-model-len` are max-model-len, `-tp` is tensor-parallel-size.
    """
    if argument.startswith("--"):
        return argument[2:].partition("=")[0].replace("_", "-")
    short = argument[1:].partition("=")[0]
    return _SHORT.get(short) if argument.startswith("-") else None


class TaskServers(Record):
    """One task's servers."""

    checkpoint: str
    memory: float = Field(gt=0, le=1)
    """Share of the device's memory that one server may take: vLLM's `--gpu-memory-utilization`; on a CPU, of the
    machine's memory."""
    replicas: int = Field(default=1, ge=1)
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of each replica; all GPUs to all of them if not given."""
    arguments: tuple[str, ...] = ()
    """Further ones of `vllm serve`."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the servers' processes."""

    @field_validator("arguments")
    @classmethod
    def _not_ours(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        for argument in arguments:
            if option_name(argument) in _OURS:
                raise ValueError(f"got {argument}, which the fleet sets itself: leave it out")
        return arguments

    @field_validator("environment")
    @classmethod
    def _not_our_variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if name in _OUR_VARIABLES:
                raise ValueError(f"got {name}: {_OUR_VARIABLES[name]}")
        return environment

    @model_validator(mode="after")
    def _devices_for_all(self) -> "TaskServers":
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(f"got {len(self.devices)} devices for {self.replicas} replicas; give one for each")
        self.number("max-model-len")
        gpus = self.gpus
        for devices in self.devices:
            if len(devices.split(",")) != gpus:
                raise ValueError(f"got devices {devices!r} for a server on {gpus} GPUs; name each, as '0,1'")
        return self

    def argument(self, name: str) -> str | None:
        """The value of an option of `arguments`, by its long name without dashes; None if it is not there."""
        for place, argument in enumerate(self.arguments):
            if option_name(argument) == name:
                _, equals, value = argument.partition("=")
                return value if equals else next(iter(self.arguments[place + 1 : place + 2]), None)
        return None

    def number(self, name: str) -> int | None:
        """The same as a number, as vLLM reads it: `25.6k` is 25600 and `4K` 4096; None also for `auto`.

        Raises:
            ValueError: it is none.
        """
        value = self.argument(name)
        if value is None or value.lower() in ("auto", "-1"):
            return None
        # Decimals of powers of two are refused by vLLM too.
        found = re.fullmatch(r"(\d+|\d+\.\d+(?=[kmgt]))([kmgtKMGT]?)", value)
        if not found:
            raise ValueError(f"got --{name} {value}; write a number, as 4096, 4K or 25.6k")
        digits, unit = found.groups()
        return int(float(digits) * _MULTIPLES[unit]) if unit else int(digits)

    @property
    def shards(self) -> int:
        """GPUs that one server's weights and KV cache are divided among."""
        return (self.number("tensor-parallel-size") or 1) * (self.number("pipeline-parallel-size") or 1)

    @property
    def gpus(self) -> int:
        """That one server runs on; those beyond `shards` hold copies."""
        copies = self.number("data-parallel-size") or 1, self.number("prefill-context-parallel-size") or 1
        return self.shards * copies[0] * copies[1]


class Fleet(Record):
    """All tasks, and the endpoint in front of them."""

    version: int = Field(default=1, ge=1, le=1)
    """Of the file's format; may be left out."""
    host: str = "127.0.0.1"
    """Where the endpoint listens; the servers behind it are always on loopback."""
    port: int = Field(default=8000, ge=1, le=65535)
    tasks: dict[TaskName, TaskServers] = Field(min_length=1)

    @model_validator(mode="after")
    def _reachable(self) -> "Fleet":
        if ENDPOINT in self.tasks:
            raise ValueError(
                f"got a task {ENDPOINT!r}, which is what the process in front is called: name it otherwise"
            )
        if ":" in self.host:
            raise ValueError(f"got host {self.host}; give an IPv4 address, a name, or 0.0.0.0 for all")
        if self.port + self.servers > 65535:
            raise ValueError(
                f"got port {self.port} for {self.servers} servers, whose ports follow it: give a smaller one"
            )
        return self

    @property
    def local_host(self) -> str:
        """Where this machine reaches the endpoint."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "localhost") else self.host

    @property
    def servers(self) -> int:
        """Of all tasks."""
        return sum(member.replicas for member in self.tasks.values())

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the endpoint."""
        return self.local_host == "127.0.0.1" and self.host != "0.0.0.0"


class _Loader(yaml.SafeLoader):
    """Leaves numbers as they are written (`--revision, 1.10`), and takes no key twice, where YAML's has the last."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":bool", ":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = []
        for key, _ in node.value:
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} is there twice", key.start_mark)
            names.append(key.value)
        return node


def load_fleet(path: str | Path) -> Fleet:
    """Read `fleet.yaml`; checkpoints that are folders become absolute.

    Raises:
        ValueError: no such file, not YAML, a key that is there twice, an unknown or missing field, or a value that is
            not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no fleet at {path}: write one, as\n{__doc__.partition(chr(10) * 2)[2]}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    try:
        fleet = Fleet.model_validate(content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg'].removeprefix('Value error, ')}"
            + (f", got {item['input']}: put it in quotes" if isinstance(item["input"], bool) else "")
            for item in error.errors()[:5]
        ]
        raise ValueError(f"{path} is not a valid fleet:\n" + "\n".join(lines)) from error
    tasks = {name: _with_folder(member, path.parent) for name, member in fleet.tasks.items()}
    return fleet.model_copy(update={"tasks": tasks})


def _with_folder(member: TaskServers, base: Path) -> TaskServers:
    folder = (base / member.checkpoint).resolve()
    return member.model_copy(update={"checkpoint": str(folder)}) if folder.is_dir() else member
