"""Becomes one of the fleet's processes, after ending what an earlier one in its place has left.

    python -m taq_vllm.fleet.launcher RUN_FOLDER/NAME.json

The file holds `command`, `environment`, and `gives_way_at`: the URL of a server whose priority is lowered once it
answers there, or null. (A server that starts needs half a minute of processor time before it does anything; beside busy
ones that took two minutes. Starting it with a higher priority would take a privilege.)

vLLM's engine and worker processes go on when their API server is killed, and keep their memory. They stay in its
process group and in the supervisor's session, and both numbers are written down in RUN_FOLDER/NAME.group. Neither is
given away again as long as a process has it; after a restart of the machine or container the same numbers belong to
others, so that the record says in which of its lives they held. (Their environment would tell nothing: they overwrite
it with their titles.)
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


def write_record(record: Path) -> None:
    """Write down the group of this process."""
    record.write_text(json.dumps([os.getpgrp(), os.getsid(0), _life()]))


def read_record(record: Path) -> tuple[int, int] | None:
    """Process group and session; None where there is no record, or one of another life of this machine."""
    try:
        group, session, life = json.loads(record.read_text())
    except (FileNotFoundError, ValueError, TypeError):  # the first process in this place, or a file cut off by a kill
        return None
    return (group, session) if life == _life() else None


def end_leftovers(record: Path) -> list[int]:
    """End the processes in the group that the file names.

    Returns:
        Their process ids.
    """
    named = read_record(record)
    if named is None or named[0] == os.getpgrp():
        return []
    leftovers = []
    for process in psutil.process_iter():
        try:
            ids = (os.getpgid(process.pid), os.getsid(process.pid))
            if ids != named or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # Python's own helper in the group is left alone: it frees shared memory, and ends by itself.
            if "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                process.kill()
                leftovers.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    psutil.wait_procs(leftovers, timeout=10)
    return [process.pid for process in leftovers]


def _life() -> str:
    """Of this machine or container: differs after every restart of it."""
    boot, first = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/1/stat")
    # When process 1 started, in ticks since the machine did. Some machines show nobody the processes of others.
    return f"{boot} {first.read_text().rpartition(')')[2].split()[19] if os.access(first, os.R_OK) else ''}"


def answers(url: str) -> bool:
    """Whether the server there is healthy; the endpoint that asks for a key is, and is asked without one."""
    try:
        answer = httpx.get(f"{url}/health", timeout=2, trust_env=False)
        return answer.is_success or answer.status_code == httpx.codes.UNAUTHORIZED
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
    if ended := end_leftovers(record_of(service_file)):
        print(f"ended what an earlier process has left: {', '.join(map(str, ended))}", flush=True)
    write_record(record_of(service_file))
    if service["gives_way_at"]:
        give_way_at(service["gives_way_at"])
    os.execve(service["command"][0], service["command"], os.environ | service["environment"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
