"""`taq score`: what a task needs of each part of a model."""

from pathlib import Path
from typing import Annotated

import typer

from taq_vllm.cli.options import (
    DEFAULT_HIDDEN_MEMORY,
    Device,
    Force,
    HiddenMemory,
    Json,
    Model,
    ScorerOption,
    Setting,
    SpillFolder,
    memory_of,
    out,
    print_json,
    print_scores,
    settings_of,
)
from taq_vllm.model_files import ModelFiles
from taq_vllm.scorers import DEFAULT_SCORER
from taq_vllm.units import GRANULARITIES


def score(
    model: Model,
    task: Annotated[Path | None, typer.Option(help="Task header (task.yaml), its folder, or a bare .jsonl.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The scores file.")] = Path("scores.json"),
    scorer: ScorerOption = DEFAULT_SCORER,
    setting: Setting = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help=f"What is scored: {', '.join(GRANULARITIES)}. If not given, module (a matrix) where the scorer "
            "measures costs, layer where it only ranks."
        ),
    ] = None,
    head: Annotated[bool, typer.Option("--head", help="Score lm_head as well.")] = False,
    device: Device = "auto",
    hidden_memory: HiddenMemory = DEFAULT_HIDDEN_MEMORY,
    spill_folder: SpillFolder = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run two blocks, and print what the whole will read, hold and take.")
    ] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Permit taqo to run generated Python (pass@1).")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score every unit of a model for a task: layers, fused layers or matrices."""
    from taq_vllm.distributed import start, world
    from taq_vllm.scoring import score as run
    from taq_vllm.tasks import load_task

    if granularity not in (None, *GRANULARITIES):
        raise typer.BadParameter(f"got granularity {granularity!r}; there are {', '.join(GRANULARITIES)}")
    settings = settings_of(setting)
    if allow_code_execution:
        settings["allow_code_execution"] = True
    files, chosen = ModelFiles(model), load_task(task) if task else None
    on, limit = start(device), memory_of(hidden_memory)
    if dry_run:
        from taq_vllm.preflight import score_estimate  # it loads all that quantizing needs

        asked = (files, chosen, scorer, output, settings, on, granularity, head, limit, spill_folder, force)
        estimate = score_estimate(*asked)
        if world()[0] == 0:
            print_json(estimate.record()) if as_json else out.print("\n".join(estimate.lines()))
        return
    scores, fresh = run(files, chosen, scorer, output, settings, on, force, granularity, head, limit, spill_folder)
    if world()[0] > 0:
        return
    left = _of_other_requests(output)
    left_bytes = sum(file.stat().st_size for file in left)
    if as_json:
        beside = {"unfinished_files": len(left), "unfinished_bytes": left_bytes}
        print_json(scores.model_dump(mode="json") | {"done_before": not fresh} | beside)
        return
    print_scores(scores)
    out.print(f"{output} {'written' if fresh else 'was finished already; nothing was run'}")
    if left:
        out.print(
            f"{len(left)} files of other requests that did not finish lie beside it ({left_bytes / 1e6:.1f} MB), as "
            f"{left[0]}: the same command goes on with them; delete them if it is not to be run again"
        )


def _of_other_requests(output: Path) -> list[Path]:
    """Journals of scores that were begun for this output: those of the request at hand are gone when it is done."""
    begun = (file for start in ("", ".") for file in output.parent.glob(f"{start}{output.name}.*.journal*"))
    return sorted(file for file in begun if file.is_file())
