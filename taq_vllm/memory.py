"""How much of this machine's memory a process can have: what the machine has, or its container (cgroup v2) allows."""

import os
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")


def available_bytes(page_cache: bool = True) -> int:
    """What can be had without swapping: memory that is free, and what the system's page cache would give back.

    Free memory alone says little: after a model's files were read they fill most of it, as long as nobody else asks.

    Args:
        page_cache: False to count a container's own page cache as taken, as vLLM does before it starts on a CPU.
    """
    return min([_machine_bytes(), *(max(0, limit - used) for limit, used in _cgroup_limits(page_cache))])


def total_bytes() -> int:
    """All memory of the machine, or as much as the container may use."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in _cgroup_limits(page_cache=True))])


def available_share() -> float:
    """What vLLM takes to be available, as a share of all memory."""
    return available_bytes(page_cache=False) / total_bytes()


def _machine_bytes() -> int:
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits(page_cache: bool) -> Iterator[tuple[int, int]]:
    """(limit, used) of this process's group and of those it lies in; without what can be dropped if `page_cache`."""
    lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines() if _OWN_CGROUP.is_file() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return
    for group in (_CGROUPS / own, *(_CGROUPS / own).parents):
        limit = group / "memory.max"
        if limit.is_file() and (value := limit.read_text(encoding="ascii").strip()) != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            used = int((group / "memory.current").read_text(encoding="ascii"))
            yield int(value), used - page_cache * sum(int(stat.get(kind, 0)) for kind in _RECLAIMABLE)
        if group == _CGROUPS:
            return
