"""One progress bar for all steps: what is being done, how far, how long it took and will take (on stderr)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Iterate with a bar."""
    with _bar() as progress:
        yield from progress.track(items, total=total, description=description)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"


def gigabytes(size: float) -> str:
    """Bytes as GB, few of them as MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def steps(description: str, total: int) -> Iterator["Steps"]:
    """A bar that the caller advances, for work whose steps have different costs."""
    with _bar() as progress:
        yield Steps(progress, progress.add_task(description, total=total))


class Steps:
    """Handle of a bar made by `steps`."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress = progress
        self._task = task

    def advance(self, count: int = 1) -> None:
        """So many steps are done."""
        self._progress.advance(self._task, count)

    def say(self, text: str) -> None:
        """A line above the bar, which stays."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
