"""A file of finished work, one JSON object a line, which a killed run's successor reads.

Appending is not atomic: a kill can leave half a line behind, which `read` cuts off before anything is appended to it.
"""

import json
from pathlib import Path
from typing import Any

from taq_vllm.plan import write_atomically


def read(journal: Path, *, mend: bool = True) -> list[dict[str, Any]]:
    """The whole lines; none where there is no journal.

    Args:
        journal: as given to `append`.
        mend: cut half a line off; for the process that appends.
    """
    if not journal.is_file():
        return []
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        if mend:
            write_atomically(journal, "".join(lines))
    return [json.loads(line) for line in lines]


def append(journal: Path, entry: dict[str, Any]) -> None:
    """Add a line."""
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
