"""A fleet on this machine: supervisor keeps its processes running, and starts those again that end.

`up` writes supervisor's configuration into a folder beside `fleet.yaml` (`fleet.run/`, with every process's log),
starts it in the background and waits until all servers answer. `status` and `down` talk to it through a socket in that
folder that only this user can open. The key for the API, if there is one, is in the processes' environment
(`VLLM_API_KEY`), never in a file or an argument.
"""

import configparser
import os
import shlex
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from taq_vllm.fleet.server import MARK
from taq_vllm.fleet.services import ENDPOINT, Service

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own
START_TIMEOUT_S = 900
_STABLE_S = 20  # a process that ends sooner has failed to start
_RETRIES = 3
_POLL_S = 1.0
_LOG_TAIL_BYTES = 3000
_LONGEST_SOCKET = 100  # of a Unix socket's path


@dataclass(frozen=True)
class State:
    """What one process does.

    Attributes:
        name: of its service.
        state: supervisor's word, as RUNNING, BACKOFF, FATAL.
        pid: 0 if there is none.
        seconds: since it was started last.
        healthy: it answers.
    """

    name: str
    state: str
    pid: int
    seconds: float
    healthy: bool


def run_folder(fleet_file: Path) -> Path:
    """Where a fleet's configuration, socket and logs lie."""
    return fleet_file.resolve().with_suffix(".run")


def up(
    folder: Path,
    services: Sequence[Service],
    api_key: str | None,
    say: Callable[[str], None],
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Start all processes and wait until they answer; if one does not start, all are ended.

    Args:
        folder: `run_folder`.
        services: what runs.
        api_key: asked of every request; None for no key.
        say: is told when a server answers.
        timeout_s: until all have to.

    Raises:
        ValueError: it is up already, a port is taken, or a process does not start: with the end of its log.
    """
    if _supervisor(folder) is not None:
        raise ValueError(f"the fleet is up already ({folder}): see `taq fleet status`, or end it with `taq fleet down`")
    _check_ports(services)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    configuration = folder / "supervisord.conf"
    with configuration.open("w", encoding="utf-8") as file:
        _configuration(folder, services).write(file)
    environment = dict(os.environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop(KEY_VARIABLE, None)
    if api_key:
        environment[KEY_VARIABLE] = api_key
    subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)], env=environment, check=True
    )
    waiting = {service.name: service for service in services}
    deadline = time.monotonic() + timeout_s
    try:
        while waiting:
            for state in status(folder, services):
                if state.name in waiting and state.healthy:
                    say(f"{state.name} answers on {waiting.pop(state.name).url} after {state.seconds:.0f} s")
                elif state.name in waiting and (state.state in ("FATAL", "BACKOFF") or time.monotonic() > deadline):
                    reason = "did not start" if state.state in ("FATAL", "BACKOFF") else "does not answer"
                    raise ValueError(
                        f"{state.name} {reason}; the end of {folder / f'{state.name}.log'}:\n"
                        f"{_log_tail(folder, state.name)}"
                    )
            time.sleep(_POLL_S)
    except BaseException:
        down(folder)
        raise


def status(folder: Path, services: Sequence[Service]) -> list[State]:
    """What every process does.

    Raises:
        ValueError: the fleet is not up.
    """
    supervisor = _running(folder)
    found = {info["name"]: info for info in supervisor.getAllProcessInfo()}
    unknown = [service.name for service in services if service.name not in found]
    if unknown:
        raise ValueError(
            f"the fleet that runs has no {', '.join(unknown)}: fleet.yaml was changed since. End it with `taq fleet "
            "down` and start it again"
        )
    states = []
    for service in services:
        info = found[service.name]
        is_running = info["pid"] != 0
        seconds = info["now"] - info["start"] if is_running else 0
        states.append(State(service.name, info["statename"], info["pid"], seconds, is_running and _answers(service)))
    return states


def down(folder: Path) -> None:
    """End all processes and wait until they have ended.

    Raises:
        ValueError: the fleet is not up.
    """
    supervisor = _running(folder)
    pid = supervisor.getPID()
    supervisor.shutdown()
    while _is_alive(pid):
        time.sleep(0.2)


def _configuration(folder: Path, services: Sequence[Service]) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser["unix_http_server"] = {"file": str(_socket(folder)), "chmod": "0700"}
    parser["supervisord"] = {
        "logfile": str(folder / "supervisord.log"),
        "pidfile": str(folder / "supervisord.pid"),
        "childlogdir": str(folder),
        "identifier": "taq-fleet",
    }
    parser["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    for service in services:
        variables = dict(service.environment) | {MARK: str(folder / service.name)}
        environment = ",".join(f'{name}="{_escaped(value)}"' for name, value in variables.items())
        parser[f"program:{service.name}"] = {
            "command": _escaped(shlex.join(service.command)),
            "environment": environment,
            "autorestart": "true",
            "startsecs": str(_STABLE_S),
            "startretries": str(_RETRIES),
            "stopasgroup": "true",
            "killasgroup": "true",
            "stopwaitsecs": "30",
            "redirect_stderr": "true",
            "stdout_logfile": str(folder / f"{service.name}.log"),
            "stdout_logfile_maxbytes": "20MB",
            "stdout_logfile_backups": "2",
        }
    return parser


def _escaped(text: str) -> str:
    """supervisor reads % as the beginning of a variable."""
    return text.replace("%", "%%")


def _socket(folder: Path) -> Path:
    path = folder / "supervisor.sock"
    if len(str(path)) > _LONGEST_SOCKET:
        raise ValueError(f"{path} is too long for a socket: keep fleet.yaml in a folder with a shorter path")
    return path


def _supervisor(folder: Path) -> Any:
    """supervisor's interface; None if it does not run."""
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(serverurl=f"unix://{_socket(folder)}")
    interface = xmlrpc.client.ServerProxy("http://supervisor", transport).supervisor
    try:
        interface.getState()
    except (OSError, xmlrpc.client.Error):
        return None
    return interface


def _running(folder: Path) -> Any:
    supervisor = _supervisor(folder)
    if supervisor is None:
        raise ValueError(f"the fleet is not up ({folder}): start it with `taq fleet up`")
    return supervisor


def _answers(service: Service) -> bool:
    try:
        return httpx.get(f"{service.url}/health", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _check_ports(services: Sequence[Service]) -> None:
    for service in services:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", service.port))
            except OSError as error:
                endpoint = service.name == ENDPOINT
                raise ValueError(
                    f"port {service.port} of {service.name} is taken: "
                    f"{'give another' if endpoint else 'the servers use those after the endpoint`s: give another'} "
                    "`port` in fleet.yaml"
                ) from error


def _log_tail(folder: Path, name: str) -> str:
    log = folder / f"{name}.log"
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace") if log.is_file() else "(no log)"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
