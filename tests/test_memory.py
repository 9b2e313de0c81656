"""How much memory there is, in a machine and in a container."""

import os

import pytest

from taq_vllm import memory

MIB = 1 << 20


def test_available_memory_counts_what_the_page_cache_gives_back(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\nBuffers: 5 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", file)
    assert memory.available_bytes() == 3000 * 1024
    file.write_text("MemTotal: 4000 kB\nMemFree: 10 kB\n")  # an old kernel; other systems have no such file
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for _ in range(2):
        assert 10 * 1024 < memory.available_bytes() <= everything
        file.unlink(missing_ok=True)
    monkeypatch.undo()
    assert 0 < memory.available_share() <= 1


def group(folder, limit, current, inactive_file=0):
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")
    return folder


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A group with a limit inside one with a larger one, as a container sees its own; more is free in the machine."""
    own = tmp_path / "self"
    own.write_text("0::/pod/container\n")
    (tmp_path / "meminfo").write_text("MemAvailable: 1000000000 kB\n")
    pod = group(tmp_path / "pod", 100 * MIB, 90 * MIB)
    group(pod / "container", 80 * MIB, 70 * MIB, 50 * MIB)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_CGROUP", own)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    return pod


def test_a_container_may_use_what_every_group_above_it_leaves(container):
    assert memory.total_bytes() == 80 * MIB
    assert memory.available_bytes() == 10 * MIB  # the pod's; its own limit leaves 60, its page cache counted as free
    assert memory.available_bytes(page_cache=False) == 10 * MIB  # its own
    group(container, 100 * MIB, 20 * MIB)
    assert memory.available_bytes() == 60 * MIB
    assert memory.available_bytes(page_cache=False) == 10 * MIB
    assert memory.available_share() == 10 / 80


def test_groups_without_limits_change_nothing(container):
    group(container, "max", 90 * MIB)
    group(container / "container", "max", 70 * MIB)
    assert memory.available_bytes() == 1000000000 * 1024
    assert memory.total_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_group_that_is_over_its_limit_has_nothing_left(container):
    group(container, 100 * MIB, 120 * MIB)
    assert memory.available_bytes() == 0
