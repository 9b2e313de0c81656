"""`taq score`: what a task needs of each part of a model."""

from pathlib import Path
from typing import Annotated

import typer

from taq_vllm.cli.options import (
    Device,
    Force,
    Json,
    Model,
    ScorerOption,
    Setting,
    out,
    print_json,
    print_scores,
    settings_of,
)
from taq_vllm.model_files import ModelFiles
from taq_vllm.units import GRANULARITIES


def score(
    model: Model,
    task: Annotated[Path | None, typer.Option(help="Task header (task.yaml), its folder, or a bare .jsonl.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The scores file.")] = Path("scores.json"),
    scorer: ScorerOption = "taq",
    setting: Setting = None,
    granularity: Annotated[str, typer.Option(help=f"What is scored: {', '.join(GRANULARITIES)}.")] = "layer",
    head: Annotated[bool, typer.Option("--head", help="Score lm_head as well.")] = False,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score every layer of a model for a task."""
    from taq_vllm.scoring import score as run
    from taq_vllm.tasks import load_task

    scores, fresh = run(ModelFiles(model), load_task(task), scorer, output, settings_of(setting), device, force)
    if as_json:
        print_json(scores.model_dump(mode="json") | {"done_before": not fresh})
        return
    print_scores(scores)
    out.print(f"{output} {'written' if fresh else 'was finished already; nothing was run'}")
