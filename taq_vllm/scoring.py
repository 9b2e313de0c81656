"""Runs a scorer on a model and a task, and writes what it found to `scores.json`; finished work is not repeated."""

import hashlib
import importlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from taq_vllm import distributed, scorers
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import ScorerRef, TaskRef
from taq_vllm.scorers import SCORERS
from taq_vllm.scores import MADE_BY, Scores, defaults_for
from taq_vllm.settings import settings_from
from taq_vllm.stream import HIDDEN_LIMIT_BYTES, StreamedModel
from taq_vllm.tasks import Task, TokenizedExample, require_labels, tokenize
from taq_vllm.units import Granularity, units_of


@dataclass(frozen=True)
class Run:
    """What a scorer works on.

    Attributes:
        files: the full-precision model.
        device: where blocks run, as `cuda:0`.
        model: the same as a walk over its blocks; None for scorers that read no examples.
        task: whose examples are scored; None for scorers that read no examples.
        sequences: the examples as tokens, with completions where the scorer reads answers; with several processes
            (`distributed.py`) this process's share of them.
        granularity: of `units`.
        units: the matrices of every unit to score, by the unit's name, in the model's order; the last may be the head.
        journal: a file for finished work, which the same command finds again; rank 0 writes it. It and files whose
            names begin with its name are removed when the scores are written.
    """

    files: ModelFiles
    device: str
    model: StreamedModel | None
    task: Task | None
    sequences: list[TokenizedExample]
    granularity: Granularity
    units: Mapping[str, tuple[str, ...]]
    journal: Path


def score(
    files: ModelFiles,
    task: Task | None,
    scorer: str,
    output: Path,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    force: bool = False,
    granularity: Granularity | None = None,
    head: bool = False,
    hidden_limit_bytes: float = HIDDEN_LIMIT_BYTES,
    spill_folder: Path | None = None,
) -> tuple[Scores, bool]:
    """Score every unit of a model for a task and write `scores.json`.

    Processes that joined by `distributed.start` share the examples; all return the same scores, rank 0 writes them.

    Args:
        files: the full-precision model.
        task: its calibration examples are read; not needed by scorers that read none.
        scorer: one of `SCORERS`.
        output: where the scores go; a journal lies beside them until they are whole.
        settings: overrides of the scorer's own settings.
        device: where blocks run; `auto` is a GPU if there is one.
        force: replace scores of another request that are at `output`.
        granularity: what is scored (`units.py`); that of `defaults` if not given.
        head: score `lm_head` as well.
        hidden_limit_bytes: of hidden states in memory; the rest lies in files.
        spill_folder: on whose disk these files are; the output's folder if not given.

    Returns:
        The scores, and whether they were made now (False: they were there already, made by this version).

    Raises:
        ValueError: no such scorer or setting, one that cannot do what is asked, or examples that do not fit the model.
    """
    asked = check_request(files, task, scorer, output, settings, force, granularity, head)
    if asked.finished is not None:
        return asked.finished, False
    module, chosen, task, examples = asked.module, asked.settings, asked.task, asked.examples

    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    model = None if task is None else StreamedModel(files, device, hidden_limit_bytes, spill_folder or output.parent)
    sequences = [] if task is None else calibration_sequences(model, task, examples, asked.reads == "answers")
    # What was computed elsewhere, or split otherwise, differs in its last bits, and is not continued here.
    computed = [model.device.type, str(model.compute_dtype), distributed.world()[1]] if model else []
    key = hashlib.sha256(json.dumps([asked.request, computed], sort_keys=True).encode()).hexdigest()[:12]
    journal = output.with_name(f"{output.name}.{key}.journal")
    units = units_of([*files.matrices, *(files.head if head else ())], asked.granularity)
    on = str(model.device) if model else distributed.device_of(device)
    run = Run(files, on, model, task, distributed.share(sequences), asked.granularity, units, journal)
    found = tuple(module.score_units(run, chosen))

    def finish() -> Scores:
        scores = Scores(
            model=files.ref,
            task=asked.task_ref,
            scorer=ScorerRef(name=scorer, settings=asked.request["settings"]),
            granularity=asked.granularity,
            cost_unit=module.COST_UNIT,
            units=found,
            seconds=time.monotonic() - started,
            peak_memory_bytes=peak_memory_bytes(),
            made_by=MADE_BY,
        )
        scores.save(output)
        return scores

    scores = distributed.first(finish)
    if distributed.world()[0] == 0:
        for left in output.parent.iterdir():
            if left.name.startswith(journal.name) or left.name.startswith(f".{journal.name}"):
                left.unlink()
    return scores, True


@dataclass(frozen=True)
class Asked:
    """A request for scores that can be met.

    Attributes:
        module: the scorer.
        settings: its own, overrides applied.
        task: None for scorers that read no examples.
        task_ref: how the task is recorded.
        reads: `weights`, `prompts` or `answers`.
        examples: how many of its calibration examples are read.
        granularity: what is scored.
        request: what the scores are the answer to.
        finished: the answer, if it is at the output already.
    """

    module: ModuleType
    settings: Any
    task: Task | None
    task_ref: TaskRef | None
    reads: str
    examples: int
    granularity: Granularity
    request: dict[str, Any]
    finished: Scores | None


def check_request(
    files: ModelFiles,
    task: Task | None,
    scorer: str,
    output: Path,
    settings: dict[str, Any] | None = None,
    force: bool = False,
    granularity: Granularity | None = None,
    head: bool = False,
) -> Asked:
    """Check a request for scores before anything runs; arguments and errors are those of `score`."""
    module = _module(scorer)
    chosen = settings_from(module, f"scorer {scorer}", settings or {})
    granularity = granularity or defaults(scorer)[1]
    if granularity not in module.GRANULARITIES:
        raise ValueError(
            f"scorer {scorer} scores {', '.join(module.GRANULARITIES)}, got granularity {granularity!r}; "
            "plans of any granularity can be made from its scores"
        )
    files.check_plannable()
    task_ref, examples = None, 0
    reads = getattr(chosen, "reads", module.READS)
    if reads == "weights":
        task = None
    else:
        task_ref, examples = _examples(task, scorer, reads, getattr(chosen, "max_examples", None))
        if examples < distributed.world()[1]:
            raise ValueError(
                f"{examples} examples cannot be split over {distributed.world()[1]} processes: start fewer"
            )
    request = {
        "fingerprint": files.ref.fingerprint,
        "task": task_ref and task_ref.model_dump(),
        "scorer": scorer,
        "settings": chosen.model_dump(mode="json"),
        "granularity": granularity,
        "head": head,
        "made_by": MADE_BY,
    }
    finished = distributed.first(lambda: _finished(output, request, force))
    return Asked(module, chosen, task, task_ref, reads, examples, granularity, request, finished)


def _finished(output: Path, request: dict[str, Any], force: bool) -> Scores | None:
    """What is at `output` already, if it is the answer to this request."""
    if not output.is_file():
        return None
    previous = Scores.load(output)
    made = _request_of(previous)
    if made == request:
        return previous
    if force or made | {"made_by": MADE_BY} == request:
        return None
    name = previous.task.name if previous.task else "no task"
    raise ValueError(
        f"{output} holds other scores ({previous.scorer.name} on {name}, {previous.model.id}): choose another output, "
        "or replace them with --force"
    )


def granularities(scorer: str) -> tuple[str, ...]:
    """What a scorer can score.

    Raises:
        ValueError: there is no such scorer.
    """
    return _module(scorer).GRANULARITIES


def defaults(scorer: str) -> tuple[str, Granularity]:
    """Allocation and granularity of a scorer's plans, where none is asked for.

    Raises:
        ValueError: there is no such scorer.
    """
    return defaults_for(_module(scorer).COST_UNIT)


def baseline(
    files: ModelFiles,
    scorer: str,
    settings: dict[str, Any] | None = None,
    granularity: Granularity | None = None,
    head: bool = False,
) -> Scores:
    """Scores by a scorer that reads no examples; nothing is written.

    Raises:
        ValueError: no such scorer or setting, or a scorer that reads examples.
    """
    module = _module(scorer)
    chosen = settings_from(module, f"scorer {scorer}", settings or {})
    if module.READS != "weights":
        raise ValueError(f"scorer {scorer} reads a task's {module.READS}; use `score`")
    granularity = granularity or defaults(scorer)[1]
    started = time.monotonic()
    units = units_of([*files.matrices, *(files.head if head else ())], granularity)
    run = Run(files, "cpu", None, None, [], granularity, units, Path(os.devnull))
    return Scores(
        model=files.ref,
        task=None,
        scorer=ScorerRef(name=scorer, settings=chosen.model_dump(mode="json")),
        granularity=granularity,
        cost_unit=module.COST_UNIT,
        units=tuple(module.score_units(run, chosen)),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
        made_by=MADE_BY,
    )


def calibration_sequences(
    model: StreamedModel, task: Task, count: int, with_completion: bool | Literal["if present"]
) -> list[TokenizedExample]:
    """The first `count` calibration examples as tokens, with the model's own tokenizer.

    Raises:
        ValueError: the tokenizer cannot be loaded, or an example is longer than the model's context.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.files.path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no tokenizer in {model.files.path} ({reason}): add its tokenizer files") from error
    limit = model.config.max_position_embeddings
    return tokenize(task.calibration[:count], tokenizer, task, with_completion=with_completion, max_length=limit)


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far (`VmHWM`)."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; its `ru_maxrss` would count the parent's memory until this program was started
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _module(scorer: str) -> ModuleType:
    if scorer not in SCORERS:
        raise ValueError(f"got scorer {scorer!r}; there are {', '.join(SCORERS)}")
    return importlib.import_module(f"{scorers.__name__}.{scorer.replace('-', '_')}")


def _examples(task: Task | None, scorer: str, reads: str, most: int | None) -> tuple[TaskRef, int]:
    """Which examples are read."""
    if task is None:
        raise ValueError(f"scorer {scorer} reads a task's {reads}: give --task")
    count = len(task.calibration[:most])
    if count < 2:
        raise ValueError(f"{task.path} has {count} calibration examples; a scorer needs at least 2")
    if reads == "answers":
        require_labels(task, task.calibration[:count], f"scorer {scorer}")
    return TaskRef(name=task.name, data_sha256=task.calibration_sha256, examples=count), count


def _request_of(scores: Scores) -> dict[str, Any]:
    """What these scores are the answer to."""
    return {
        "fingerprint": scores.model.fingerprint,
        "task": scores.task and scores.task.model_dump(),
        "scorer": scores.scorer.name,
        "settings": scores.scorer.settings,
        "granularity": scores.granularity,
        "head": any(entry.unit == "lm_head" for entry in scores.units),
        "made_by": scores.made_by,
    }
