"""A fleet on this machine: supervisor keeps its processes running, and starts those again that end.

`up` writes supervisor's configuration into a folder beside `fleet.yaml` (`fleet.run/`, with every process's command and
log), starts it in the background, and then the servers, one after another: vLLM measures what is free when it starts,
and others that start with it would falsify that. `status` and `down` talk to supervisor through a socket in that folder
that only this user can open. What a killed supervisor has left is ended by `down`, and by the next `up`. The key for
the API, if there is one, is passed on in the processes' environment (`VLLM_API_KEY`), in no file and no argument.
"""

import configparser
import contextlib
import importlib.util
import json
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
import psutil

from taq_vllm.fleet import launcher
from taq_vllm.fleet.services import Address, Service, bearer, check_key
from taq_vllm.fleet.spec import ENDPOINT, KEY_VARIABLE

START_TIMEOUT_S = 1800
STOP_TIMEOUT_S = 120
_STABLE_S = 20  # a process that ends sooner has failed to start
# supervisor waits a second longer before each retry and then gives up for good, where `up` fails at the first: what
# keeps a server from starting may pass, as a full disk or a GPU that is busy.
_RETRIES = 1_000_000
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
        ValueError: it is up already, a port is taken, a key cannot be, or a process does not start: with the end of
            its log.
    """
    if importlib.util.find_spec("vllm_router") is None:
        raise ValueError("no vllm-router: install what a fleet needs, `pip install 'taq-vllm[fleet]'`")
    check_key(api_key)
    if _supervisor(folder) is not None:
        raise ValueError(f"the fleet is up already ({folder}): see `taq fleet status`, or end it with `taq fleet down`")
    if ended := _end_leftovers(folder):
        say(f"ended what an earlier fleet has left: {', '.join(map(str, ended))}")
    addresses = [service.address for service in services]
    _check_ports(addresses)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for service in services:
        content = {"command": service.command, "environment": dict(service.environment)}
        content["gives_way_at"] = service.address.url if service.gives_way else None
        _file(folder, service.address).write_text(json.dumps(content, indent=2), encoding="utf-8")
    configuration = folder / "supervisord.conf"
    with configuration.open("w", encoding="utf-8") as file:
        _configuration(folder, addresses).write(file)
    environment = dict(os.environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop(KEY_VARIABLE, None)
    # A server is three processes of thousands of modules: importing them without bytecode takes half as long again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if api_key:
        environment[KEY_VARIABLE] = api_key
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)]
    started = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if started.returncode:
        raise ValueError(f"supervisor did not start: {started.stdout}{started.stderr}")
    deadline = time.monotonic() + timeout_s
    while _supervisor(folder) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        for address in addresses:
            _start(folder, address, deadline, say)
        while not _router_sees_all(addresses, bearer(api_key)):
            if time.monotonic() > deadline:
                raise ValueError(f"the router does not find all servers in time; see the logs in {folder}")
            time.sleep(_POLL_S)
    except BaseException:
        with contextlib.suppress(ValueError):  # the first error says why
            down(folder)
        raise


def _start(folder: Path, address: Address, deadline: float, say: Callable[[str], None]) -> None:
    _running(folder).startProcess(address.name, False)
    pid = None
    while True:
        (state,) = status(folder, [address])
        pid = pid or state.pid
        if state.healthy:
            say(f"{address.name} answers on {address.url} after {state.seconds:.0f} s")
            return
        # Another process than the first has taken its place: that one ended before it ever answered.
        has_failed = state.state in ("FATAL", "BACKOFF", "EXITED") or state.pid not in (0, pid)
        if has_failed or time.monotonic() > deadline:
            raise ValueError(
                f"{address.name} {'did not start' if has_failed else 'does not answer in time'}; the end of "
                f"{folder / f'{address.name}.log'}:\n{_log_tail(folder, address.name)}"
            )
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
        states.append(
            State(address.name, info["statename"], info["pid"], seconds, is_running and launcher.answers(address.url))
        )
    return states


def down(folder: Path) -> None:
    """End all processes, also what killed ones have left, and wait until they have ended.

    Raises:
        ValueError: the fleet is not up and has left nothing, is ending already, or does not end.
    """
    if _supervisor(folder) is None and _end_leftovers(folder):
        return
    supervisor = psutil.Process(_running(folder).getPID())
    _running(folder).shutdown()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    # A process that has ended stays as a zombie where nobody waits for it, as in some containers.
    while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            raise ValueError(f"supervisor (pid {supervisor.pid}) does not end; see {folder / 'supervisord.log'}")
        time.sleep(0.2)
    _end_leftovers(folder)


def _end_leftovers(folder: Path) -> list[int]:
    """End what the services have left where no supervisor runs; their process ids.

    Raises:
        ValueError: their supervisor does run, and does not answer.
    """
    ended = []
    for record in folder.glob("*.group"):
        if (named := launcher.read_record(record)) is None:
            continue  # perhaps another machine's, which sees the same folder
        if _is_supervisor(pid := named[1]):
            raise ValueError(
                f"the fleet's supervisor (pid {pid}) runs and does not answer, as while it ends: try again in a "
                f"minute; if it still does not, end it with `kill -9 {pid}`"
            )
        ended += launcher.end_leftovers(record)
        record.unlink()
    return ended


def _is_supervisor(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return "supervisord" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _configuration(folder: Path, addresses: Sequence[Address]) -> configparser.RawConfigParser:
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
    for address in addresses:
        command = [sys.executable, "-m", launcher.__name__, str(_file(folder, address))]
        sections[f"program:{address.name}"] = {
            "command": shlex.join(command),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": str(_STABLE_S),
            "startretries": str(_RETRIES),
            "stopasgroup": "true",
            "killasgroup": "true",
            "stopwaitsecs": "30",
            "redirect_stderr": "true",
            "stdout_logfile": str(folder / f"{address.name}.log"),
            "stdout_logfile_maxbytes": "20MB",
            "stdout_logfile_backups": "2",
        }
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    return parser


def _file(folder: Path, address: Address) -> Path:
    """What the launcher reads."""
    return folder / f"{address.name}.json"


def _socket(folder: Path) -> Path:
    path = folder / "supervisor.sock"
    if len(str(path)) > _LONGEST_SOCKET:
        raise ValueError(f"{path} is too long for a socket: keep fleet.yaml in a folder with a shorter path")
    if set("%;#'\"") & set(str(path)):
        raise ValueError(f"{path}: supervisor's files cannot have % ; # or quotes in their path: move fleet.yaml")
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


def _router_sees_all(addresses: Sequence[Address], headers: dict[str, str]) -> bool:
    """Whether the router, which asks for their health now and then, sends requests to all servers."""
    *servers, endpoint = addresses
    try:
        answer = httpx.get(f"{endpoint.url}/workers", headers=headers, timeout=5, trust_env=False).raise_for_status()
    except httpx.HTTPError:
        return False
    return answer.json()["stats"]["healthy_workers"] == len(servers)


def _check_ports(addresses: Sequence[Address]) -> None:
    for address in addresses:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, address.port))
            except OSError as error:
                rule = "" if address.name == ENDPOINT else ": the servers' ports follow the endpoint's"
                raise ValueError(
                    f"port {address.port} of {address.name} is taken{rule}. Give another `port` in fleet.yaml"
                ) from error


def _log_tail(folder: Path, name: str) -> str:
    log = folder / f"{name}.log"
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace") if log.is_file() else "(no log)"
