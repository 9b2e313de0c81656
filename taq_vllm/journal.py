"""A file of finished work, one JSON object a line, which a killed run's successor reads.

Appending is not atomic: a kill can leave half a line behind, a failing machine worse. What is read ends before the
first line that is not whole, and nothing is appended behind such a line: it is cut off, with all that follows it.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from taq_vllm.plan import write_atomically


def read(journal: Path, *, mend: bool = True) -> list[dict[str, Any]]:
    """The lines before the first that is not whole; none where there is no journal.

    Args:
        journal: as given to `append`.
        mend: cut off what is not read; for the process that appends.
    """
    if not journal.is_file():
        return []
    lines = journal.read_bytes().splitlines(keepends=True)
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # not JSON, or not even text
            entry = None
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    if mend and len(entries) < len(lines):
        replace(journal, entries)
    return entries


def append(journal: Path, entry: dict[str, Any]) -> None:
    """Add a line; it is on disk when this returns."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace(journal: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Leave these lines alone in the journal."""
    write_atomically(journal, "".join(json.dumps(entry) + "\n" for entry in entries))
