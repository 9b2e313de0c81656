"""Runs a model's Python code against unit tests, in a child process that cannot do much else.

One process per candidate: own process group, empty environment, scratch folder that is deleted, limits on CPU time,
wall-clock time, memory, number and sizes of files, and processes, no network, and not as root; `sandbox_child.py` says
how. A verdict counts only if it carries a secret that the child was given, so code that exits early, prints whatever,
or is killed has failed.

This holds off the accidents and common tricks of generated code. It is no security boundary against a program that
was written to attack this very file: it shares an interpreter with its tests, and what Python's audit events do not
show is left to the kernel's limits and permissions. Nothing runs unless it is allowed explicitly.
"""

import ast
import marshal
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taq_vllm.sandbox_child import EQUAL, NOBODY

_CHILD = Path(__file__).with_name("sandbox_child.py")
# No site packages, no bytecode files, no user folder, no script folder on the path. Not -I, which would ignore
# PYTHONHASHSEED: without it the order of sets, and with that some verdicts, would differ from run to run.
_PYTHON = (sys.executable, "-S", "-B", "-s", "-P")
_FENCE = re.compile(r"```[a-zA-Z0-9]*\s*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_ANSWER_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What one candidate may use."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 * 2**20
    """Address space, the interpreter's own included."""
    file_bytes: int = 2**20
    """Largest file in the scratch folder."""
    files: int = 64
    """Files that may be written there, counted by the audit hook; times `file_bytes`, what fits on the disk."""


@dataclass(frozen=True)
class Candidate:
    """Code to judge and the tests that judge it."""

    code: str
    tests: tuple[str, ...]
    test_setup: str = ""
    """Runs between the code and the tests."""
    entry_point: str | None = None
    """Function that the code must define."""


@dataclass(frozen=True)
class Outcome:
    """Whether all tests passed, and if not, what was the first to go wrong."""

    passed: bool
    detail: str


def extract_code(output: str, prompt: str = "", entry_point: str | None = None) -> str:
    """The program in a model's output: the first fenced block if there is one, else all of it, dedented.

    Where the prompt itself begins the function (HumanEval) and the output only continues it, both together.
    """
    fenced = _FENCE.search(output)
    code = fenced.group(1) if fenced else output
    if entry_point is not None:
        header = re.compile(rf"^[ \t]*(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
        if header.search(prompt) and not header.search(code):
            return prompt + code
    return textwrap.dedent(code.strip("\n"))


def run_tests(candidate: Candidate, *, allow: bool = False, limits: Limits = Limits()) -> Outcome:
    """Judge one candidate.

    Args:
        candidate: code and tests.
        allow: permission to run code that a model wrote.
        limits: of the child process.

    Raises:
        ValueError: `allow` is not given, or there are no tests.
    """
    return next(run_all([candidate], allow=allow, limits=limits, workers=1))


def run_all(
    candidates: Sequence[Candidate], *, allow: bool = False, limits: Limits = Limits(), workers: int | None = None
) -> Iterator[Outcome]:
    """Judge many candidates, a few at a time; outcomes come in order.

    Args:
        candidates: code and tests.
        allow: permission to run code that a model wrote.
        limits: of each child process.
        workers: processes at a time; by default as many as there are CPUs to run on.

    Raises:
        ValueError: `allow` is not given, or a candidate has no tests.
    """
    require_permission(allow)
    for number, candidate in enumerate(candidates):
        if not candidate.tests:
            raise ValueError(f"candidate {number} has no tests; without tests nothing can pass or fail")
    return _run_all(candidates, limits, workers or len(os.sched_getaffinity(0)))


def require_permission(allow: bool) -> None:
    """Stop before code that a model wrote is run, unless that is allowed and root can give its rights up for it.

    Raises:
        ValueError: it is not, or the evaluator is root and `nobody` could not read Python's library.
    """
    if not allow:
        raise ValueError(
            "this metric runs Python code that the model wrote, which is off by default: add --allow-code-execution "
            "(in Python: allow_code_execution=True) on a machine where that is acceptable"
        )
    if os.getuid() == 0:
        for path, needed in ((os.path.dirname(os.__file__), 0o005), (os.__file__, 0o004)):
            if os.stat(path).st_mode & needed != needed:
                raise _not_as_root(f"{path} can be read by root only")
        if not os.path.isdir("/proc/self/fd"):
            raise _not_as_root("/proc is not mounted")


def _not_as_root(reason: str) -> ValueError:
    return ValueError(
        f"an evaluator that is root runs the model's code as nobody (user {NOBODY}), but {reason}; "
        "evaluate as another user than root"
    )


def _run_all(candidates: Sequence[Candidate], limits: Limits, workers: int) -> Iterator[Outcome]:
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda candidate: _run(candidate, limits), candidates)


def _run(candidate: Candidate, limits: Limits) -> Outcome:
    secret = secrets.token_hex(16)
    job = {
        "secret": secret,
        "code": candidate.code,
        "tests": [_with_checked_equality(test) for test in candidate.tests],
        "test_setup": candidate.test_setup,
        "entry_point": candidate.entry_point,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "files": limits.files,
    }
    with (
        tempfile.TemporaryDirectory(prefix="taq-sandbox-") as scratch,
        tempfile.TemporaryFile() as job_file,
        # A file, not a pipe: the limit on file sizes bounds what a candidate could write into it.
        tempfile.TemporaryFile() as answer_file,
    ):
        if os.getuid() == 0:
            try:
                os.chown(scratch, NOBODY, NOBODY)
            except OSError as error:
                raise _not_as_root(f"its scratch folder cannot be given to it ({error})") from error
        job_file.write(marshal.dumps(job))
        job_file.seek(0)
        process = subprocess.Popen(
            [*_PYTHON, str(_CHILD)],
            stdin=job_file,
            stdout=answer_file,
            stderr=subprocess.DEVNULL,
            cwd=scratch,
            env={"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(limits.wall_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answer_file.seek(0)
        answer = answer_file.read(_ANSWER_BYTES).decode(errors="replace")
    if timed_out:
        return Outcome(False, f"not finished after {limits.wall_s:g} s")
    if answer == secret:
        return Outcome(True, "passed")
    return Outcome(False, answer.replace(secret, "") or _end(process.returncode))


def _with_checked_equality(test: str) -> str:
    """The test, with `a == b` inside of assertions decided by the child's `equal`."""
    try:
        tree = ast.parse(test)
    except SyntaxError:
        return test  # fails in the child, with its reason
    for statement in [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]:
        statement.test = _Equations().visit(statement.test)
    return ast.unparse(ast.fix_missing_locations(tree))


class _Equations(ast.NodeTransformer):
    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        return ast.Call(ast.Name(EQUAL, ast.Load()), [node.left, node.comparators[0]], [])


def _end(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode} before the tests were through"
