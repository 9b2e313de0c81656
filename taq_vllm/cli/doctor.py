"""`taq doctor`: what this machine has, and what is wrong with it."""

import typer
from rich.table import Table

from taq_vllm.cli.options import Json, out, print_json


def doctor(as_json: Json = False) -> None:
    """Print versions, devices, the kernel that would serve, and what is wrong; exit code 1 if something is."""
    from taq_vllm.doctor import examine

    findings = examine()
    wrong = [finding for finding in findings if finding.wrong]
    if as_json:
        print_json({"findings": [finding.__dict__ for finding in findings]})
    else:
        table = Table()
        for column in ("", "found", "what to do"):
            table.add_column(column)
        for finding in findings:
            table.add_row(finding.what, finding.found, finding.wrong or "", style="red" if finding.wrong else None)
        out.print(table)
        out.print(f"{len(wrong)} wrong" if wrong else "nothing is wrong")
    if wrong:
        raise typer.Exit(1)
