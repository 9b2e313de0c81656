"""What benchmarks that take minutes have in common."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Progress:
    """What is being done, with the time since the start, on stderr."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, step: str) -> None:
        """Print a line."""
        print(f"{time.monotonic() - self._started:6.0f} s  {step}", file=sys.stderr, flush=True)


def read_files(path: Path) -> None:
    """Read a checkpoint's weights, or one file, so that what loads it next finds it in the page cache."""
    for file in path.glob("*.safetensors") if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A size in /proc/PID/status, for example RssAnon or VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {field}; measure on Linux")


def print_and_exit(parts: Sequence[Any], requirements: Mapping[str, bool]) -> NoReturn:
    """Print tables and sentences; exit 1 if a requirement does not hold."""
    from rich.console import Console

    for part in parts:
        Console(width=160).print(part, highlight=False)
    sys.exit(0 if all(requirements.values()) else 1)
