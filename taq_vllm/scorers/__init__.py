"""Scorers: what a task needs of each layer. One file each; add a file and name it in `SCORERS`.

A scorer is a module with `Settings` (a pydantic model), `WITH_COMPLETION` (whether it reads labelled answers) and
`score_layers(model, sequences, settings, journal) -> list[LayerScore]`. `score` runs one and writes `scores.json`.
"""

import hashlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import ScorerRef, TaskRef
from taq_vllm.scorers import taq, taqo
from taq_vllm.scores import Scores
from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import Task, TokenizedExample, tokenize

SCORERS = {"taq": taq, "taqo": taqo}


def score(
    files: ModelFiles,
    task: Task,
    scorer: str,
    output: Path,
    settings: dict[str, Any] | None = None,
    device: str = "cpu",
    force: bool = False,
) -> tuple[Scores, bool]:
    """Score every layer of a model for a task and write `scores.json`.

    Args:
        files: the full-precision model.
        task: its calibration examples are read.
        scorer: a key of `SCORERS`.
        output: where the scores go; a journal lies beside them until they are whole.
        settings: overrides of the scorer's own settings.
        device: where blocks run.
        force: replace scores of another request that are at `output`.

    Returns:
        The scores, and whether they were made now (False: they were there already).

    Raises:
        ValueError: no such scorer or setting, or examples that do not fit the model.
    """
    if scorer not in SCORERS:
        raise ValueError(f"got scorer {scorer!r}; there are {', '.join(SCORERS)}")
    module = SCORERS[scorer]
    try:
        chosen = module.Settings(**(settings or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "settings"
        allowed = ", ".join(module.Settings.model_fields)
        raise ValueError(f"scorer {scorer}, {where}: {first['msg']}; its settings are {allowed}") from error
    recorded = chosen.model_dump(mode="json")
    examples = task.calibration[: chosen.max_examples]
    if len(examples) < 2:
        raise ValueError(f"{task.path} has {len(examples)} calibration examples; a scorer needs at least 2")
    task_ref = TaskRef(name=task.name, data_sha256=task.calibration_sha256, examples=len(examples))
    if output.is_file():
        previous = Scores.load(output)
        if previous.answers(files.ref, task_ref, scorer, recorded):
            return previous, False
        if not force:
            name = previous.task.name if previous.task else "no task"
            raise ValueError(
                f"{output} holds other scores ({previous.scorer.name} on {name}, {previous.model.id}): choose another "
                "output, or replace them with --force"
            )

    started = time.monotonic()
    model = StreamedModel(files, device)
    sequences = calibration_sequences(model, task, len(examples), module.WITH_COMPLETION)
    # What was computed elsewhere differs in its last bits, and is not continued here.
    computed = [model.device.type, str(model.compute_dtype)]
    request = json.dumps([files.ref.fingerprint, task_ref.model_dump(), scorer, recorded, computed], sort_keys=True)
    key = hashlib.sha256(request.encode()).hexdigest()[:12]
    journal = output.with_name(f"{output.name}.{key}.journal")
    output.parent.mkdir(parents=True, exist_ok=True)
    layers = module.score_layers(model, sequences, chosen, journal)
    scores = Scores(
        model=files.ref,
        task=task_ref,
        scorer=ScorerRef(name=scorer, settings=recorded),
        layers=tuple(layers),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )
    scores.save(output)
    journal.unlink(missing_ok=True)
    return scores, True


def calibration_sequences(
    model: StreamedModel, task: Task, count: int, with_completion: bool
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
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
