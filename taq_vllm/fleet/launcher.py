"""Becomes one of the fleet's processes, after ending what an earlier one in its place has left.

    python -m taq_vllm.fleet.launcher RUN_FOLDER/NAME.json

The file holds `command`, `environment`, and `gives_way_at`: the URL of a server whose priority is lowered once it
answers there, or null. (A server that starts needs half a minute of processor time before it does anything; beside busy
ones that took two minutes. Starting it with a higher priority would take a privilege.)

vLLM's engine and worker processes go on when their API server is killed,
and keep their memory. They stay in its process group, which is written down in RUN_FOLDER/NAME.group, with the start of
the supervisor that began it: after a restart of the machine the same numbers belong to others. (Their environment would
tell nothing: they overwrite it with their titles.)
"""

import json
import os
import sys
import time
from pathlib import Path

import httpx
import psutil

_NICER_BY = 5
_POLL_S = 1.0


def record_of(service_file: Path) -> Path:
    """Where the process group of a service is written down."""
    return service_file.with_suffix(".group")


def end_leftovers(record: Path, supervisor_started: float) -> list[int]:
    """End vLLM's processes in the group that the file names.

    Args:
        record: of a service.
        supervisor_started: seconds since 1970; a record of another supervisor counts for nothing.

    Returns:
        Their process ids.
    """
    try:
        group, started = json.loads(record.read_text())
    except (FileNotFoundError, ValueError):  # the first process in this place, or a file cut off by a kill
        return []
    if started != supervisor_started or group == os.getpgrp():
        return []
    leftovers = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and "vllm" in " ".join(process.cmdline()).lower():
                process.kill()
                leftovers.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    psutil.wait_procs(leftovers, timeout=10)
    return [process.pid for process in leftovers]


def answers(url: str) -> bool:
    """Whether the server there is healthy."""
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def give_way_at(url: str) -> None:
    """Leave a process behind that lowers the priority of this process's group once it answers, and ends with it."""
    leader = psutil.Process()
    leader.create_time()  # read now: is_running compares with it
    if child := os.fork():
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)  # so that nobody has to wait for the other
    try:
        while leader.is_running():
            if answers(url):
                os.setpriority(os.PRIO_PGRP, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _NICER_BY))
                break
            time.sleep(_POLL_S)
    finally:
        os._exit(0)


def main(service_file: Path) -> None:
    """Clean up, write the record, and become the service."""
    service = json.loads(service_file.read_text())
    started = psutil.Process(os.getppid()).create_time()
    if ended := end_leftovers(record_of(service_file), started):
        print(f"ended what an earlier process has left: {', '.join(map(str, ended))}", flush=True)
    record_of(service_file).write_text(json.dumps([os.getpgrp(), started]))
    if service["gives_way_at"]:
        give_way_at(service["gives_way_at"])
    os.execve(service["command"][0], service["command"], os.environ | service["environment"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
