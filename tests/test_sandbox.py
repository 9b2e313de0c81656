import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from taq_vllm import sandbox_child
from taq_vllm.sandbox import Candidate, Limits, extract_code, run_all, run_tests

QUICK = Limits(wall_s=5, cpu_s=1, memory_bytes=256 * 2**20)
CORRECT = "def f(x):\n    return x + 1\n"


def judge(code, *tests, limits=QUICK, **fields):
    return run_tests(Candidate(code, tests or ("assert f(1) == 2",), **fields), allow=True, limits=limits)


def test_code_is_not_run_unless_it_is_allowed(tmp_path):
    witness = tmp_path / "ran"
    with pytest.raises(ValueError, match="--allow-code-execution"):
        run_tests(Candidate(f"open({str(witness)!r}, 'w')", ("pass",)))
    assert not witness.exists()


def test_a_correct_solution_passes_all_its_tests():
    assert judge(CORRECT, "assert f(1) == 2", "assert f(-1) == 0").passed


def test_one_failing_test_fails_the_candidate_and_is_named():
    outcome = judge(CORRECT, "assert f(1) == 2", "assert f(1) == 3", "assert f(2) == 3")
    assert not outcome.passed
    assert outcome.detail == "test 2: AssertionError"


def test_setup_runs_between_the_code_and_the_tests():
    assert judge("class Node: pass", "assert node.value == 5", test_setup="node = Node()\nnode.value = 5").passed


def test_the_entry_point_must_be_defined():
    assert judge("def g(x): return 2", "pass", entry_point="f").detail == "code: defines no function f"


def test_a_test_that_defines_a_check_function_works():
    tests = ("def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3", "check(f)")
    assert judge(CORRECT, *tests).passed
    assert not judge("def f(x): return 2", *tests).passed


@pytest.mark.parametrize(
    "code",
    [
        "import math, re, collections, itertools, functools, heapq, random, string, datetime, typing, enum, bisect",
        "import operator, statistics, fractions, decimal, json, copy, abc, cmath, array, struct, hashlib, zoneinfo",
        "import datetime\ndatetime.datetime.strptime('2024', '%Y')",
        "import xml.etree.ElementTree, concurrent.futures, importlib.resources, encodings.idna, doctest",
        "import dataclasses, contextlib, io, textwrap, calendar, threading, unittest, traceback, inspect, warnings",
    ],
)
def test_the_standard_library_can_be_imported(code):
    assert judge(f"{code}\n{CORRECT}").passed


def test_dataclasses_and_counters_compare_as_they_should():
    code = (
        "from dataclasses import dataclass\nfrom collections import Counter, namedtuple\n"
        "@dataclass\nclass Point:\n    x: int\nPair = namedtuple('Pair', 'a b')\n"
    )
    assert judge(
        code, "assert Point(1) == Point(1)", "assert Counter('aab') == {'a': 2, 'b': 1}", "assert Pair(1, 2) == (1, 2)"
    ).passed
    assert not judge(code, "assert Point(1) == Point(2)").passed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(x):\n    while True: pass", "killed by SIGXCPU"),
        ("import time\ndef f(x): time.sleep(60)", "not finished after 1 s"),
        ("def f(x):\n    hog = []\n    while True: hog.append(bytearray(10**7))", "MemoryError"),
        ("def f(x): return f(x)", "RecursionError"),
        ("def f(x) return 2", "SyntaxError"),
    ],
)
def test_runaway_and_broken_code_fails_in_time(code, reason):
    started = time.monotonic()
    limits = Limits(wall_s=1, cpu_s=5) if "sleep" in code else QUICK
    outcome = judge(code, limits=limits)
    assert not outcome.passed
    assert reason in outcome.detail
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.fork()",
        "import os; os.system('true')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes",
        "import _posixsubprocess",
        "import _xxsubinterpreters",
        "import _interpreters",
        "import importlib.machinery as m; s = m.PathFinder.find_spec('_posixsubprocess'); "
        "m.ExtensionFileLoader('x._posixsubprocess', s.origin if s else '').create_module("
        "m.ModuleSpec('x._posixsubprocess', None, origin=s.origin if s else ''))",
        "import sys; del sys.modules['posix']; import posix",
    ],
)
def test_no_other_process_can_be_started_or_reached(attempt):
    outcome = judge(f"def f(x):\n    {attempt}\n    return 2")
    assert not outcome.passed
    assert "not allowed here" in outcome.detail


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no process descriptors on this system")
def test_the_evaluator_cannot_be_reached_through_a_process_descriptor():
    outcome = judge(
        "import os, signal\ndef f(x):\n    signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)\n    return 2"
    )
    assert "AttributeError" in outcome.detail


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def without_the_audit_hook(script, **names):
    """What a child may still do when only the kernel is in its way."""
    lines = [
        "import os, sys",
        f"sys.path.insert(0, {str(Path(sandbox_child.__file__).parent)!r})",
        "import sandbox_child",
        "sandbox_child._limit(5, 2**29, 2**20)",
        "sandbox_child._isolate()",
        *(f"{name} = {value!r}" for name, value in names.items()),
        script,
    ]
    command = [sys.executable, "-S", "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@as_root
@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        ("os.kill(os.getppid(), 0)", "PermissionError"),
        ("import signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)", "PermissionError"),
        ("os.fork()", "BlockingIOError"),
        ("open(outside, 'w')", "PermissionError"),
        ("os.remove(outside)", "PermissionError"),
        ("os.mkfifo(f'{outside}-2')", "PermissionError"),
        ("os.setuid(0)", "PermissionError"),
        ("os.setgroups([0])", "PermissionError"),
    ],
)
def test_without_the_audit_hook_the_kernel_binds_a_root_evaluators_candidate(attempt, reason):
    # Not below `tmp_path`, whose parents nobody but its owner may enter: here the file's own folder must refuse.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        outside = folder / "file"
        outside.write_text("kept")
        done = without_the_audit_hook(attempt, outside=str(outside))
        assert reason in done.stderr, done
        assert outside.read_text() == "kept"
        assert list(folder.iterdir()) == [outside]


@as_root
def test_a_root_evaluators_candidate_is_not_root(tmp_path):
    tmp_path.chmod(0o700)
    # Listing a folder is left to the kernel.
    assert "Errno 13" in judge(f"import os\ndef f(x):\n    os.listdir({str(tmp_path)!r})\n    return 2").detail


@as_root
def test_root_is_told_when_nobody_cannot_have_the_scratch_folder(monkeypatch):
    def refused(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.chown", refused)
    with pytest.raises(ValueError, match="evaluate as another user than root"):
        judge(CORRECT)


def test_the_network_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for module in ("socket", "_socket"):
            outcome = judge(
                f"import {module} as s\ndef f(x):\n    s.socket().connect(('127.0.0.1', {port}))\n    return 2"
            )
            assert not outcome.passed
            assert "not allowed here" in outcome.detail


def test_without_the_audit_hook_the_kernel_still_keeps_the_network_away():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = (
            "import os, sandbox_child as child\n"
            "before = os.readlink('/proc/self/ns/net')\n"
            "child._isolate()\n"
            "if before == os.readlink('/proc/self/ns/net'): raise SystemExit(3)\n"
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        )
        folder = Path(sandbox_child.__file__).parent
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this kernel does not allow network namespaces to this user; the audit hook stands alone")
    assert "Network is unreachable" in done.stderr


def test_files_outside_of_the_scratch_folder_can_neither_be_written_nor_read(tmp_path):
    outside = tmp_path / "file"
    outside.write_text("kept")
    for attempt in (
        f"open({str(outside)!r}, 'w')",
        f"open({str(outside)!r}, 'a')",
        f"open({str(outside)!r}).read()",
        f"open('../' * 20 + {str(outside)!r}[1:], 'w')",
        f"__import__('os').open({str(outside)!r}, 1)",
        f"__import__('os').remove({str(outside)!r})",
        f"__import__('os').truncate({str(outside)!r}, 0)",
        f"__import__('os').symlink({str(outside)!r}, 'link')",
        f"__import__('pathlib').Path({str(outside)!r}).unlink()",
        f"__import__('shutil').rmtree({str(tmp_path)!r})",
        f"__import__('os').mkdir({str(tmp_path / 'new')!r})",
        f"__import__('sqlite3').connect({str(tmp_path / 'new')!r})",
        f"__import__('dbm.gnu').gnu.open({str(tmp_path / 'new')!r}, 'n')",
        f"__import__('readline').write_history_file({str(tmp_path / 'new')!r})",
        f"__import__('io').FileIO(type('P', (str,), {{}})({str(tmp_path / 'new')!r}), 'w')",
    ):
        outcome = judge(f"def f(x):\n    {attempt}\n    return 2")
        assert "not allowed here" in outcome.detail, attempt
    assert outside.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == [outside]


def test_special_files_cannot_be_made(tmp_path):
    for attempt in (f"mkfifo({str(tmp_path / 'new')!r})", f"mknod({str(tmp_path / 'new')!r})"):
        for module in ("os", "posix"):
            assert "AttributeError" in judge(f"import {module}\ndef f(x):\n    {module}.{attempt}\n    return 2").detail
    assert not list(tmp_path.iterdir())


def test_a_folders_descriptor_is_no_way_out(tmp_path):
    code = (
        "import os\ndef f(x):\n"
        "    root = os.open('/', os.O_RDONLY)\n"
        f"    os.open({str(tmp_path / 'new')!r}[1:], os.O_WRONLY | os.O_CREAT, dir_fd=root)\n    return 2"
    )
    assert not judge(code).passed
    assert not list(tmp_path.iterdir())


def test_the_scratch_folder_can_be_used_and_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "def f(x):\n    with open('note', 'w') as file: file.write('2')\n    return int(open('note').read())"
    assert judge(code).passed
    assert not list(tmp_path.iterdir())


def test_a_file_cannot_grow_past_its_limit():
    assert "File too large" in judge("def f(x):\n    open('big', 'w').write('x' * 10**7)\n    return 2").detail


def test_many_files_cannot_fill_the_disk_and_one_written_often_counts_once():
    code = "def f(n, m):\n    for i in range(n): open(str(i % m), 'w').close()\n    return 2"
    limits = Limits(wall_s=5, cpu_s=1, files=8)
    assert judge(code, "assert f(8, 8) == 2", "assert f(100, 8) == 2", limits=limits).passed
    assert "writing more than 8 files is not allowed here" in judge(code, "f(9, 9)", limits=limits).detail
    assert "writing more than 64 files is not allowed here" in judge(code, "f(65, 65)").detail


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "def f(x): raise KeyboardInterrupt",
        "def f(x):\n    print('passed')\n    return 1",
        "import os\ndef f(x):\n    for fd in range(3, 30):\n        try: os.write(fd, b'passed')\n"
        "        except OSError: pass\n    os._exit(0)",
        "AssertionError = type('Mild', (BaseException,), {})\ndef f(x): return 1",
        "import builtins\nbuiltins.AssertionError = None\ndef f(x): return 1",
        "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(7)",
        "import sys\ndef f(x):\n    sys.excepthook = lambda *a: None\n    return 1",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 1",
        "class Bad(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise Bad",
    ],
)
def test_success_cannot_be_faked(code):
    assert not judge(code).passed


def test_patched_builtins_are_restored_before_the_tests():
    assert not judge(
        "import builtins\nbuiltins.len = lambda x: 2\ndef f(x): return [x]", "assert len(f(1)) == 2"
    ).passed


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "12345")
    assert judge("import os\ndef f(): return os.environ.get('SECRET_TOKEN')", "assert f() is None").passed


def test_the_order_of_a_set_is_the_same_in_every_run():
    code = "def f(): return str({'pear', 'apple', 'plum', 'fig', 'lime', 'kiwi'})"
    order = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(f())"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert judge(code, f"assert f() == {order!r}").passed


def test_many_candidates_are_judged_in_order():
    candidates = [Candidate(f"def f(x): return {number % 2 + 1}", ("assert f(1) == 2",)) for number in range(20)]
    assert [outcome.passed for outcome in run_all(candidates, allow=True)] == [False, True] * 10


def test_a_candidate_without_tests_is_an_error():
    with pytest.raises(ValueError, match="candidate 1 has no tests"):
        run_all([Candidate(CORRECT, ("pass",)), Candidate(CORRECT, ())], allow=True)


def test_the_kernel_refuses_threads_too():
    assert not judge("import threading\ndef f(x):\n    threading.Thread(target=print).start()\n    return 2").passed


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("\ndef f(x):\n    return 1\n", "def f(x):\n    return 1"),
        (" def f(x):\n     return 1", "def f(x):\n    return 1"),
        ("Sure!\n```python\ndef f(x):\n    return 1\n```\nIt returns 1.", "def f(x):\n    return 1"),
        ("```\ndef f(x):\n    return 1", "def f(x):\n    return 1"),
    ],
)
def test_the_program_is_found_in_the_output(output, code):
    assert extract_code(output, "Write f.", "f") == code


def test_a_function_that_the_prompt_began_is_continued():
    prompt = 'def f(x):\n    """Add one."""\n'
    assert extract_code("    return x + 1", prompt, "f") == prompt + "    return x + 1"
    assert extract_code("def f(x):\n    return x + 1", prompt, "f") == "def f(x):\n    return x + 1"


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_reference_solutions_of_mbpp_pass(part):
    if "TAQ_TASK_DATA" not in os.environ:
        pytest.skip("TAQ_TASK_DATA names no folder with mbpp")
    file = Path(os.environ["TAQ_TASK_DATA"], "mbpp", f"{part}.jsonl")
    items = [json.loads(line) for line in file.read_text().splitlines()[:60]]
    candidates = [Candidate(i["target"], tuple(i["tests"]), i.get("test_setup", "")) for i in items]
    outcomes = run_all(candidates, allow=True)
    failed = [(i["id"], o.detail) for i, o in zip(items, outcomes, strict=True) if not o.passed]
    assert not failed
