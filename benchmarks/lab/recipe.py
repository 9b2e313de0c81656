"""Makes a lab model from nothing: tokenizer, data, training phases, and the checkpoint that transformers loads.

`python -m benchmarks.lab.recipe OUT` (`--dense` for the dense one) writes

    OUT/tasks/                       the task files
    OUT/phase_1.pt, OUT/phase_2.pt   training state (the dense model has one phase); a killed run continues from them
    OUT/model/                       config, bf16 weights and tokenizer

Running it again continues, and does nothing once OUT/model exists. Phase 1 learns the form of all tasks and the first
4,080 facts; phase 2 adds 3,550 facts, uses smaller numbers and lets the learning rate fall. The dense model learns
14,600 facts at once, with a quarter of the parameters. README.md says which parts of the published models this repeats
exactly.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.lab import tokenizer as lab_tokenizer
from benchmarks.lab.corpus import (
    DENSE_PHASE,
    PHASE_1,
    PHASE_2,
    Document,
    Mixture,
    Phase,
    training_documents,
    write_tasks,
)
from benchmarks.lab.packing import pack
from benchmarks.lab.train import Schedule, StepReport, dense_config, lab_config, new_model, train

SCHEDULE_1 = Schedule(steps=553, warmup_steps=80, decay_fraction=0.0, momentum_steps=300)
SCHEDULE_2 = Schedule(steps=751, warmup_steps=25, decay_fraction=0.7, momentum_steps=100)
DENSE_SCHEDULE = Schedule(
    steps=3606, warmup_steps=60, decay_fraction=0.75, momentum_steps=100, muon_learning_rate=0.018
)


@dataclass(frozen=True)
class Recipe:
    """A model and what it is trained on, phase after phase; the last phase's facts are asked by its trivia task."""

    config: Qwen3Config
    phases: tuple[tuple[Phase, Schedule], ...]


def lab_recipe() -> Recipe:
    """The first lab model."""
    return Recipe(lab_config(), ((PHASE_1, SCHEDULE_1), (PHASE_2, SCHEDULE_2)))


def dense_recipe() -> Recipe:
    """The dense lab model."""
    return Recipe(dense_config(), ((DENSE_PHASE, DENSE_SCHEDULE),))


def make(recipe: Recipe, out_dir: Path, console: Console, part: float = 1.0, save_every: int = 25) -> None:
    """Runs or continues a whole recipe.

    Args:
        recipe: What to make.
        out_dir: Folder for everything it writes.
        console: Where progress goes.
        part: Share of the documents and of the steps; below 1 for a trial.
        save_every: Steps between two training checkpoints.

    Raises:
        ValueError: `part` outside (0, 1], or `out_dir` holds a run with other settings.
    """
    if not 0 < part <= 1:
        raise ValueError(f"part must be above 0 and at most 1, got {part}")
    model_dir = out_dir / "model"
    if model_dir.exists():
        console.print(f"{model_dir} is there already; nothing to do")
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    write_tasks(out_dir / "tasks", recipe.phases[-1][0])
    console.print("task files written; making the documents and the tokenizer")
    # Both models have the first one's tokenizer.
    documents = training_documents(PHASE_1)
    tokenizer = lab_tokenizer.train(lab_tokenizer.sample(documents))

    model = new_model(recipe.config)
    for phase, schedule in recipe.phases:
        if part < 1:
            phase = replace(phase, mixture=_part_of(phase.mixture, part))
            schedule = replace(schedule, steps=max(1, round(part * schedule.steps)))
        _run_phase(model, phase, schedule, tokenizer.backend_tokenizer, out_dir, console, save_every)
    _export(model, tokenizer, model_dir)
    console.print(f"done: {model_dir}")


def _run_phase(
    model: Qwen3ForCausalLM,
    phase: Phase,
    schedule: Schedule,
    tokenizer: Tokenizer,
    out_dir: Path,
    console: Console,
    save_every: int,
) -> None:
    """Trains one phase to its end, from its checkpoint if there is one, with a fresh optimizer otherwise."""
    documents: dict[str, list[Document]] = training_documents(phase)
    rows = pack(documents, tokenizer, phase)
    console.print(f"phase {phase.number}: {sum(map(len, documents.values())):,} documents, {rows.tokens.size:,} tokens")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"phase {phase.number}", total=schedule.steps, losses="")

        def show(report: StepReport) -> None:
            losses = "  ".join(f"{kind} {loss:.3f}" for kind, loss in report.losses.items())
            progress.update(bar, completed=report.step, losses=losses)
            if report.step == 1 or report.step % 10 == 0:
                progress.console.print(f"step {report.step}: {losses}")

        train(model, rows, schedule, out_dir / f"phase_{phase.number}.pt", save_every, show)
        progress.update(bar, completed=schedule.steps)


def _part_of(mixture: Mixture, part: float) -> Mixture:
    """The same mixture, smaller."""
    return Mixture(*(max(1, round(part * count)) for count in vars(mixture).values()))


def _export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    """Writes the bf16 checkpoint and its tokenizer; the folder appears complete or not at all."""
    partial = model_dir.with_name(model_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.rename(partial, model_dir)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to create or continue.")],
    dense: Annotated[bool, typer.Option("--dense", help="The dense lab model instead of the first.")] = False,
    part: Annotated[float, typer.Option(help="Share of documents and steps, for a trial.")] = 1.0,
    save_every: Annotated[int, typer.Option(help="Steps between two training checkpoints.")] = 25,
) -> None:
    """Make a lab model from nothing."""
    try:
        make(dense_recipe() if dense else lab_recipe(), out, Console(), part, save_every)
    except ValueError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
