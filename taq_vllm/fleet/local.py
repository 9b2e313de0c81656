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

from taq_vllm.fleet import server
from taq_vllm.fleet.endpoint import ROUTER
from taq_vllm.fleet.services import ENDPOINT, Address, Service

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
    if not ROUTER.is_file():
        raise ValueError(f"no {ROUTER}: install what a fleet needs, `pip install 'taq-vllm[fleet]'`")
    if _supervisor(folder) is not None:
        raise ValueError(f"the fleet is up already ({folder}): see `taq fleet status`, or end it with `taq fleet down`")
    addresses = [service.address for service in services]
    _check_ports(addresses)
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
    deadline = time.monotonic() + timeout_s
    while _supervisor(folder) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        _wait_until_all_answer(folder, addresses, deadline, say)
    except BaseException:
        down(folder)
        raise


def _wait_until_all_answer(
    folder: Path, addresses: Sequence[Address], deadline: float, say: Callable[[str], None]
) -> None:
    waiting = {address.name: address for address in addresses}
    pids: dict[str, int] = {}
    while waiting or not _router_sees_all(addresses):
        for state in status(folder, addresses):
            if state.name not in waiting:
                continue
            # Another process than the first has taken its place: that one ended before it ever answered.
            has_failed = state.state in ("FATAL", "BACKOFF") or pids.setdefault(state.name, state.pid) != state.pid
            if state.healthy:
                say(f"{state.name} answers on {waiting.pop(state.name).url} after {state.seconds:.0f} s")
            elif has_failed:
                raise ValueError(
                    f"{state.name} did not start; the end of {folder / f'{state.name}.log'}:\n"
                    f"{_log_tail(folder, state.name)}"
                )
        if time.monotonic() > deadline:
            raise ValueError(f"{', '.join(waiting) or 'the router'} does not answer in time; see the logs in {folder}")
        time.sleep(_POLL_S)


def status(folder: Path, addresses: Sequence[Address]) -> list[State]:
    """What every process does.

    Raises:
        ValueError: the fleet is not up.
    """
    supervisor = _running(folder)
    found = {info["name"]: info for info in supervisor.getAllProcessInfo()}
    unknown = [address.name for address in addresses if address.name not in found]
    if unknown:
        raise ValueError(
            f"the fleet that runs has no {', '.join(unknown)}: fleet.yaml was changed since. End it with `taq fleet "
            "down` and start it again"
        )
    states = []
    for address in addresses:
        info = found[address.name]
        is_running = info["pid"] != 0
        seconds = info["now"] - info["start"] if is_running else 0
        states.append(State(address.name, info["statename"], info["pid"], seconds, is_running and _answers(address)))
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
    sections: dict[str, dict[str, str]] = {
        "unix_http_server": {"file": str(_socket(folder)), "chmod": "0700"},
        "supervisord": {
            "logfile": str(folder / "supervisord.log"),
            "pidfile": str(folder / "supervisord.pid"),
            "childlogdir": str(folder),
            "identifier": "taq-fleet",
        },
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for service in services:
        name = service.address.name
        launcher = [sys.executable, "-m", server.__name__, str(folder / f"{name}.group")]
        sections[f"program:{name}"] = {
            "command": shlex.join([*launcher, *service.command]),
            "environment": ",".join(f'{key}="{value}"' for key, value in service.environment.items()),
            "autorestart": "true",
            "startsecs": str(_STABLE_S),
            "startretries": str(_RETRIES),
            "stopasgroup": "true",
            "killasgroup": "true",
            "stopwaitsecs": "30",
            "redirect_stderr": "true",
            "stdout_logfile": str(folder / f"{name}.log"),
            "stdout_logfile_maxbytes": "20MB",
            "stdout_logfile_backups": "2",
        }
    parser = configparser.RawConfigParser()
    for section, values in sections.items():
        # supervisor reads % as the beginning of a variable.
        parser[section] = {name: value.replace("%", "%%") for name, value in values.items()}
    return parser


def _socket(folder: Path) -> Path:
    path = folder / "supervisor.sock"
    if len(str(path)) > _LONGEST_SOCKET:
        raise ValueError(f"{path} is too long for a socket: keep fleet.yaml in a folder with a shorter path")
    if "%" in str(path):
        raise ValueError(f"{path}: supervisor cannot keep logs under a path with a %: keep fleet.yaml somewhere else")
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


def _answers(address: Address) -> bool:
    try:
        return httpx.get(f"{address.url}/health", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _router_sees_all(addresses: Sequence[Address]) -> bool:
    """Whether the router, which asks for their health now and then, sends requests to all servers."""
    *servers, endpoint = addresses
    stats = httpx.get(f"{endpoint.url}/workers", timeout=5, trust_env=False).raise_for_status().json()["stats"]
    return stats["healthy_workers"] == len(servers)


def _check_ports(addresses: Sequence[Address]) -> None:
    for address in addresses:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", address.port))
            except OSError as error:
                rule = "" if address.name == ENDPOINT else ": the servers' ports follow the endpoint's"
                raise ValueError(
                    f"port {address.port} of {address.name} is taken{rule}. Give another `port` in fleet.yaml"
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
