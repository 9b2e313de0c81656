"""`taq scores`: what several scorers say about the same model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from taq_vllm.cli.options import Json, out, print_json

_SHOWN = 3

scores = typer.Typer(no_args_is_help=True, help="Work with scores files.")


@scores.callback()
def _group() -> None:
    """Work with scores files."""


@scores.command()
def compare(
    files: Annotated[list[Path], typer.Argument(help="Two or more scores files of one model.")],
    as_json: Json = False,
) -> None:
    """Rank correlation of every pair of scorers, and the units on which they disagree most."""
    from taq_vllm.scores import Scores
    from taq_vllm.scores_compare import compare_scores

    comparisons = compare_scores({str(file): Scores.load(file) for file in files})
    if as_json:
        print_json({"comparisons": [asdict(comparison) for comparison in comparisons]})
        return
    table = Table(title=f"Kendall's tau-b over {comparisons[0].units} units")
    for column in ("first", "second", "tau", "95%", "over", "p", "most different ranks (first, second)"):
        table.add_column(column, justify="right" if column in ("tau", "95%", "p") else "left")
    for c in comparisons:
        interval = f"[{c.low:+.2f}, {c.high:+.2f}]"
        ranks = [f"{d.unit.removeprefix('model.')} ({d.first_rank:g}, {d.second_rank:g})" for d in c.disagreements]
        table.add_row(
            c.first, c.second, f"{c.tau:+.2f}", interval, c.interval, f"{c.p_value:.3f}", "\n".join(ranks[:_SHOWN])
        )
    out.print(table)
