"""How much of this machine's memory a process can have."""

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """What can be had without swapping: memory that is free, and what the system's page cache would give back.

    Free memory alone says little: after a model's files were read they fill most of it, as long as nobody else asks.
    """
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


def available_share() -> float:
    """The same as a share of all memory."""
    return available_bytes() / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
