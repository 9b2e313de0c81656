"""`fleet.yaml`: which checkpoint answers for which task, with how much of the device's memory.

port: 8000                       # of the endpoint, on loopback unless `host` says otherwise
tasks:
  trivia:                        # the model's name in requests
    checkpoint: out/trivia       # a folder (relative to this file) or a hub id
    memory: 0.3                  # share of the device's memory, weights and KV cache together
  code:
    checkpoint: out/code
    memory: 0.3
    replicas: 2
    arguments: [--max-model-len, "4096"]   # of `vllm serve`
"""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from taq_vllm.plan import Record

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=63)]

_OURS = ("--host", "--port", "--served-model-name", "--model", "--api-key", "--gpu-memory-utilization", "--uds")


class Member(Record):
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
            if argument.partition("=")[0] in _OURS:
                raise ValueError(f"got {argument}, which the fleet sets itself: leave it out")
        return arguments

    @model_validator(mode="after")
    def _on_a_line(self) -> "Member":
        """What supervisor's configuration can hold."""
        if any("\n" in text for text in (self.checkpoint, *self.arguments, *self.environment.values())):
            raise ValueError("got a line break in the checkpoint, an argument or a variable; leave it out")
        if any('"' in value for value in self.environment.values()):
            raise ValueError('got a " in a variable; leave it out')
        return self

    @model_validator(mode="after")
    def _device_per_replica(self) -> "Member":
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(f"got {len(self.devices)} devices for {self.replicas} replicas; give one for each")
        return self

    def argument(self, name: str) -> str | None:
        """The value of one of `arguments`, written `--name value` or `--name=value`; None if it is not there."""
        for place, argument in enumerate(self.arguments):
            given, equals, value = argument.partition("=")
            if given == name:
                return value if equals else next(iter(self.arguments[place + 1 : place + 2]), None)
        return None


class Fleet(Record):
    """All tasks, and the endpoint in front of them."""

    host: str = "127.0.0.1"
    """Where the endpoint listens; the servers behind it are always on loopback."""
    port: int = Field(default=8000, ge=1, le=65535)
    tasks: dict[TaskName, Member] = Field(min_length=1)

    @property
    def servers(self) -> int:
        """Of all tasks."""
        return sum(member.replicas for member in self.tasks.values())

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the endpoint."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def load_fleet(path: str | Path) -> Fleet:
    """Read `fleet.yaml`; checkpoints that are folders become absolute.

    Raises:
        ValueError: no such file, not YAML, an unknown or missing field, or a value that is not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no fleet at {path}: write one, as\n{__doc__.partition(chr(10) * 2)[2]}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    try:
        fleet = Fleet.model_validate(content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()[:5]
        ]
        raise ValueError(f"{path} is not a valid fleet:\n" + "\n".join(lines)) from error
    tasks = {name: _with_folder(member, path.parent) for name, member in fleet.tasks.items()}
    return fleet.model_copy(update={"tasks": tasks})


def _with_folder(member: Member, base: Path) -> Member:
    folder = (base / member.checkpoint).resolve()
    return member.model_copy(update={"checkpoint": str(folder)}) if folder.is_dir() else member
