"""Becomes a server of the fleet, after ending what an earlier one of the same name has left.

    python -m taq_vllm.fleet.server COMMAND ARGUMENTS ...

vLLM's engine and worker processes go on when their API server is killed, and keep their memory. All of them carry the
variable `TAQ_FLEET_SERVICE` in their environment, by which they are found.
"""

import os
import sys

import psutil

MARK = "TAQ_FLEET_SERVICE"


def end_leftovers(mark: str) -> list[int]:
    """End every process of this user that carries the mark, but for this one.

    Returns:
        Their process ids.
    """
    leftovers = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                process.kill()
                leftovers.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    psutil.wait_procs(leftovers, timeout=10)
    return [process.pid for process in leftovers]


if __name__ == "__main__":
    ended = end_leftovers(os.environ[MARK])
    if ended:
        print(f"ended what an earlier server has left: {', '.join(map(str, ended))}", flush=True)
    os.execv(sys.argv[1], sys.argv[1:])
