"""Becomes a server of the fleet, after ending what an earlier one in its place has left.

    python -m taq_vllm.fleet.server RECORD COMMAND ARGUMENTS ...

vLLM's engine and worker processes go on when their API server is killed, and keep their memory. They stay in its
process group, which is written down in the file RECORD. (Their environment would tell nothing: they overwrite it with
their titles.)
"""

import os
import sys
from pathlib import Path

import psutil


def end_leftovers(record: Path) -> list[int]:
    """End vLLM's processes in the group that the file names.

    Returns:
        Their process ids.
    """
    try:
        group = int(record.read_text())
    except (FileNotFoundError, ValueError):  # the first server in this place, or a file cut off by a kill
        return []
    leftovers = []
    for process in psutil.process_iter():
        try:
            # The number may belong to others by now.
            if os.getpgid(process.pid) == group and "vllm" in " ".join(process.cmdline()).lower():
                process.kill()
                leftovers.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    psutil.wait_procs(leftovers, timeout=10)
    return [process.pid for process in leftovers]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    if ended := end_leftovers(file):
        print(f"ended what an earlier server has left: {', '.join(map(str, ended))}", flush=True)
    file.write_text(str(os.getpgrp()))
    os.execv(sys.argv[2], sys.argv[2:])
