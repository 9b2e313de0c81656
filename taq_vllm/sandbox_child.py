"""The child's side of the sandbox: run as a script by `taq_vllm.sandbox`, one process per candidate; stdlib only.

Reads one job (marshal) from standard input, limits itself, runs the candidate's code, then the task's tests, and
answers on standard output: the job's secret if every test passed, else what went wrong. Whatever ends the process
earlier leaves no secret, and so counts as a failure.

Three walls. The kernel: resource limits (CPU time, address space, file size, processes); where namespaces are allowed,
a network namespace without any interface; and for an evaluator that is root, the user `nobody`, which the kernel keeps
from signalling the evaluator and from writing what is not open to everybody. The interpreter: an audit hook refuses the
events of sockets, processes, native calls, modules known to go around it, and files outside the scratch folder and
Python's own library. The harness: built-ins are restored before the tests, and a candidate's own `__eq__` cannot
declare itself equal to the expected value.

The hook sees only what Python reports to it, which is not every call of every module: it stops ordinary code, not code
that looks for a way around it. Behind it stands the kernel's wall alone, and for an evaluator that is not root that
leaves this user's own files and processes within reach.

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
_PR_SET_NO_NEW_PRIVS = 38
_SIGKILL = 9
NOBODY = 65534
"""User and group of the candidate if the evaluator is root."""
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
# Modules whose functions reach the kernel, or an interpreter without the hook, and raise no audit event; by the last
# component of a name, which is what the interpreter looks an extension module's code up by.
_DENIED_MODULES = frozenset(
    (
        "_ctypes",
        "_ctypes_test",
        "_curses",
        "_dbm",
        "_gdbm",
        "_interpreters",
        "_multiprocessing",
        "_posixshmem",
        "_posixsubprocess",
        "_remote_debugging",
        "_socket",
        "_sqlite3",
        "_ssl",
        "_testcapi",
        "_testinternalcapi",
        "_testlimitedcapi",
        "_tkinter",
        "_xxsubinterpreters",
        "ctypes",
        "nis",
        "ossaudiodev",
        "readline",
    )
)
# Functions that raise no audit event either, of modules that cannot be denied: taken out of them, and of those that
# repeat them.
_REMOVED_FUNCTIONS = (
    "chroot",
    "mkfifo",
    "mknod",
    "pidfd_open",
    "pidfd_send_signal",
    "sched_setaffinity",
    "sched_setparam",
    "sched_setscheduler",
    "setns",
    "setpriority",
    "unshare",
)
_REDUCED_MODULES = ("posix", "os", "_signal", "signal")
_LOADED_ONCE = frozenset({"posix", "_signal"})
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
    library = tuple(os.path.realpath(folder) for folder in sys.path)
    _limit(job["cpu_s"], job["memory_bytes"], job["file_bytes"])
    _isolate()
    _remove()
    # Bound before the candidate runs, which could replace them in their modules.
    write, leave = os.write, os._exit
    passed = job["secret"].encode()
    sys.addaudithook(_audit_hook(scratch, library, job["files"]))
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
    """Leave the network, cease to be root, and die with the parent.

    Leaving the network is best effort: the audit hook refuses sockets in any case.

    Raises:
        OSError: the process is root and cannot become `nobody`.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    unshare = getattr(libc, "unshare", lambda flags: -1)
    alone = False
    if os.getuid() == 0:
        alone = unshare(_CLONE_NEWNET) == 0
        _become_nobody()
    if not alone:
        unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # a change of user would clear it


def _become_nobody() -> None:
    """Change user and group for good, and keep Python's library importable where its path is closed to others.

    An interpreter below /root is the rule in containers; its folders are then reached through descriptors opened here.
    """
    opened = []
    for folder in sys.path:
        try:
            opened.append((folder, os.open(folder, os.O_PATH | os.O_DIRECTORY)))
        except OSError:  # the library as a zip file, which mostly does not exist
            continue
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    moved = {}
    for folder, descriptor in opened:
        if os.access(folder, os.R_OK | os.X_OK):
            os.close(descriptor)
        else:
            moved[folder] = f"/proc/self/fd/{descriptor}"
    sys.path[:] = [moved.get(folder, folder) for folder in sys.path]
    for module in sys.modules.values():
        if hasattr(module, "__path__"):
            parents = [os.path.split(folder) for folder in module.__path__]
            module.__path__ = [os.path.join(moved.get(parent, parent), name) for parent, name in parents]


def _remove() -> None:
    """Take out what the audit hook would not see."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _DENIED_MODULES]:
        del sys.modules[name]
    for name in _REDUCED_MODULES:
        for function in _REMOVED_FUNCTIONS if name in sys.modules else ():
            vars(sys.modules[name]).pop(function, None)


def _audit_hook(scratch: str, library: tuple[str, ...], files: int) -> Callable[[str, tuple[Any, ...]], None]:
    realpath, fsdecode, isabs = os.path.realpath, os.fsdecode, os.path.isabs
    readable = (scratch, *library, *_READABLE_ELSEWHERE)
    written: set[str] = set()

    def inside(path: str, folders: tuple[str, ...]) -> bool:
        return any(path == folder or path.startswith(f"{folder}/") for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            if type(path) not in (str, bytes):  # could name one path here and another to the kernel
                raise PermissionError(f"opening a path of type {type(path).__name__} is not allowed here")
            writing = bool(flags & _WRITING)
            path = fsdecode(path)
            # os.open (no mode) takes a folder's descriptor that the event does not show.
            relative_to_unknown = mode is None and not isabs(path)
            real = realpath(path)
            if relative_to_unknown or not inside(real, (scratch,) if writing else readable):
                raise PermissionError(f"opening {path} is not allowed here")
            if writing:
                if real not in written and len(written) >= files:
                    raise PermissionError(f"writing more than {files} files is not allowed here")
                written.add(real)
        elif event == "import":
            name = arguments[0]
            if type(name) is not str or name.rpartition(".")[2] in _DENIED_MODULES or name in _LOADED_ONCE:
                raise ImportError(f"{name} is not allowed here")
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
