"""Where the compiled CPU kernel comes from: the wheel, a cache of earlier builds, or the compiler, in this order.

    library()       the loaded library, or None if this machine can't have one (`cpu` then uses torch's int4 kernel)
    compile_to()    what setup.py and library() compile with

The wheel holds `lowbit-<digest of the sources>.so` if there was a compiler when it was built, so a library never serves
sources that have changed since. Elsewhere the first use compiles for some seconds into $XDG_CACHE_HOME/taq_kernels
(default: ~/.cache/taq_kernels), under a name that holds the digest of sources, flags and compiler version. A finished
file is renamed into place, and one process at a time compiles, while the others wait. $CXX names another compiler.
What the wheel holds may not load (it was built with a newer glibc): then it is compiled here too.

This module needs the standard library alone: setup.py runs it where there is no torch.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("lowbit.cpp", "lowbit_isa.h")
# No -march: functions carry target attributes. -w: gcc 12 warns of its own AVX-512 header.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
COMPILERS = ("c++", "g++", "clang++")

_logger = logging.getLogger(__name__)


class BuildError(Exception):
    """There is no library for this machine; the message says why."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, loaded once per process; None, with one warning that names the cause, if there is none.

    torch must be imported first: its OpenMP runtime is what the library calls.
    """
    try:
        return _load()
    except (BuildError, OSError) as error:
        _logger.warning("No CPU kernel of our own, torch's int4 kernel instead (slower): %s", error)
        return None


def compile_to(target: Path) -> None:
    """Compile the library; `target` appears complete or not at all.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the folder can't be written to.
    """
    # In the same folder: a rename is atomic within one file system only.
    handle, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        command = [*compiler(), *FLAGS, str(FOLDER / SOURCES[0]), "-o", unfinished]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            cause = next((line for line in lines if "error" in line), lines[-1] if lines else "no output")
            raise BuildError(f"`{shlex.join(command)}` failed (exit {done.returncode}): {cause}")
        os.chmod(unfinished, 0o755)  # mkstemp's files are private
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else the first of `COMPILERS` on the path.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(wanted)
    except ValueError as error:  # a quotation mark without its other
        raise BuildError(f"CXX={wanted} is not a command: {error}") from error
    for command in [chosen] if chosen else ([name] for name in COMPILERS):
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({f'CXX={chosen[0]} not found' if chosen else ', '.join(COMPILERS)})")


def packaged() -> Path:
    """Where a wheel of these sources holds their library."""
    return FOLDER / f"lowbit-{_digest([])[:16]}.so"


def cache_folder() -> Path:
    """Where this user keeps what was compiled and measured on this machine.

    Raises:
        OSError: the user has no home, as in containers, and XDG_CACHE_HOME is not set.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):
        raise OSError(f"no folder for caches: {folder} names no home, and XDG_CACHE_HOME is not set to a path")
    return Path(folder, "taq_kernels")


def check_machine() -> None:
    """Refuses machines that the kernel is not written for.

    Raises:
        BuildError: not x86-64 Linux.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise BuildError(f"it is for x86-64 Linux, and this is {platform.machine()} {sys.platform}")


def _load() -> ctypes.CDLL:
    check_machine()
    if packaged().exists():
        try:
            return ctypes.CDLL(str(packaged()))
        except OSError as error:
            _logger.warning("The packaged CPU kernel does not load, one is compiled for this machine: %s", error)
    version = subprocess.run(
        [*compiler(), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    ).stdout
    name = f"lowbit-{_digest([*compiler(), version])[:16]}.so"
    try:
        return _load_cached(cache_folder(), name)
    except OSError as error:
        _logger.info("compiling the CPU kernel for this process alone: %s", error)
    # A loaded library needs its file no more.
    with tempfile.TemporaryDirectory(prefix="taq_kernels-") as folder:
        compile_to(Path(folder, name))
        return ctypes.CDLL(str(Path(folder, name)))


def _load_cached(folder: Path, name: str) -> ctypes.CDLL:
    path = folder / name
    if path.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    folder.mkdir(parents=True, exist_ok=True)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:  # or each process would take a whole library for a damaged one
        raise OSError(f"libraries can't be loaded from {folder}: it is mounted noexec")
    with _locked(folder / f"{name}.lock"):
        if path.exists():  # it is damaged, or another process compiled it while this one waited
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                _logger.warning("The CPU kernel in the cache does not load and is compiled again: %s", error)
        else:
            _logger.info("compiling the CPU kernel into %s (some seconds, once)", path)
        compile_to(path)
        return ctypes.CDLL(str(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(compiled_by: list[str]) -> str:
    digest = hashlib.sha256(repr([*FLAGS, *compiled_by]).encode())
    for source in SOURCES:
        digest.update((FOLDER / source).read_bytes())
    return digest.hexdigest()
