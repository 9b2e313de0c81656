"""The child's side of the sandbox: run as a script by `taq_vllm.sandbox`, one process per candidate; stdlib only.

Reads one job (marshal) from standard input, limits itself, runs the candidate's code, then the task's tests, and
answers on standard output: the job's secret if every test passed, else what went wrong. Whatever ends the process
earlier leaves no secret, and so counts as a failure.

Three walls. The kernel: resource limits (CPU time, address space, file size, processes) and, where user namespaces
are allowed, a network namespace without any interface. The interpreter: an audit hook, which Python code cannot
remove, refuses sockets, processes, native calls, and files outside the scratch folder and Python's own library; it
also covers root, whom the kernel's process limit does not bind. The harness: built-ins are restored before the tests,
and a candidate's own `__eq__` cannot declare itself equal to the expected value.

Imports little: a process per candidate costs what its imports cost (json, re, ast, signal and typing would double it).
"""

from __future__ import annotations

import builtins
import marshal
import os
import resource
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9
_OPEN_FILES = 64
_DETAIL_CHARACTERS = 300
EQUAL = "__equal__"
"""What `==` in a test's assertions has become (`sandbox.py` rewrites it)."""

_DENIED_PREFIXES = ("ctypes.", "gc.", "pty.", "resource.", "shutil.", "socket.", "subprocess.", "syslog.")
_DENIED_EVENTS = frozenset(
    (
        "os.chflags",
        "os.chmod",
        "os.chown",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.killpg",
        "os.link",
        "os.lockf",
        "os.mkdir",
        "os.posix_spawn",
        "os.remove",
        "os.removexattr",
        "os.rename",
        "os.rmdir",
        "os.setxattr",
        "os.spawn",
        "os.symlink",
        "os.system",
        "os.truncate",
        "os.utime",
        "code.__new__",
        "signal.pthread_kill",
    )
)
# Modules whose functions reach the kernel without an audit event.
_DENIED_MODULES = frozenset({"_ctypes", "_multiprocessing", "_posixshmem", "_posixsubprocess", "_socket", "ctypes"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_READABLE_ELSEWHERE = ("/dev/null", "/dev/urandom", "/usr/share/zoneinfo")


def main() -> None:
    """Run the job and answer."""
    job = marshal.load(sys.stdin.buffer)
    answer_file = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    scratch = os.path.realpath(os.getcwd())
    _limit(job["cpu_s"], job["memory_bytes"], job["file_bytes"])
    _isolate()
    # Bound before the candidate runs, which could replace them in their modules.
    write, leave = os.write, os._exit
    passed = job["secret"].encode()
    sys.addaudithook(_audit_hook(scratch))
    failure = _run(job["code"], job["test_setup"], job["tests"], job["entry_point"])
    write(answer_file, passed if failure is None else failure[:_DETAIL_CHARACTERS].encode(errors="replace"))
    leave(0)


def _limit(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    # One second between the signal that says why and the one that cannot be ignored.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _isolate() -> None:
    """Die with the parent, and leave its network; best effort, the audit hook refuses sockets in any case."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if hasattr(libc, "unshare"):
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    for name in [name for name in sys.modules if name.partition(".")[0] in _DENIED_MODULES]:
        del sys.modules[name]


def _audit_hook(scratch: str) -> Callable[[str, tuple[Any, ...]], None]:
    realpath, fsdecode, isabs = os.path.realpath, os.fsdecode, os.path.isabs
    readable = (scratch, *(realpath(folder) for folder in sys.path), *_READABLE_ELSEWHERE)

    def inside(path: str, folders: tuple[str, ...]) -> bool:
        return any(path == folder or path.startswith(f"{folder}/") for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            writing = bool(flags & _WRITING)
            path = fsdecode(path)
            # os.open (no mode) takes a folder's descriptor that the event does not show.
            relative_to_unknown = mode is None and not isabs(path)
            if relative_to_unknown or not inside(realpath(path), (scratch,) if writing else readable):
                raise PermissionError(f"opening {path} is not allowed here")
        elif event == "import":
            if arguments[0] in _DENIED_MODULES:
                raise ImportError(f"{arguments[0]} is not allowed here")
        elif event in _DENIED_EVENTS or event.startswith(_DENIED_PREFIXES):
            raise PermissionError(f"{event} is not allowed here")

    return hook


def _run(code: str, test_setup: str, tests: list[str], entry_point: str | None) -> str | None:
    """None if all tests passed, else the first thing that went wrong."""
    originals = dict(vars(builtins))
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses look their module up
    scope = vars(module)
    stage = "code"
    try:
        exec(compile(code, "<candidate>", "exec"), scope)
        sys.settrace(None)
        sys.setprofile(None)
        vars(builtins).update(originals)
        scope["__builtins__"] = builtins
        if entry_point is not None and not callable(scope.get(entry_point)):
            return f"code: defines no function {entry_point}"
        stage = "test_setup"
        exec(compile(test_setup, "<test_setup>", "exec"), scope)
        for number, test in enumerate(tests, start=1):
            stage = f"test {number}"
            scope[EQUAL] = _equality(scope)
            exec(compile(test, "<test>", "exec"), scope)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are ways to fail, too
        return f"{stage}: {_describe(error)}"
    return None


def _equality(scope: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """`==`, except that a type's own `__eq__` from the candidate's code decides only between two such types."""

    def decides_itself(value: object) -> bool:
        methods = (vars(kind).get("__eq__") for kind in type.mro(type(value)))
        return any(isinstance(method, types.FunctionType) and method.__globals__ is scope for method in methods)

    def equal(left: object, right: object) -> object:
        if decides_itself(left) != decides_itself(right):
            return False
        return left == right

    return equal


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # the candidate's exception may fail while it is printed
        return "an exception that cannot be printed"


if __name__ == "__main__":
    main()
