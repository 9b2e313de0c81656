"""The whole way with one call: score, plan, quantize, verify. Each step finds its finished work and goes on there."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taq_vllm.allocate import Request, allocate, check_budget, decided_head
from taq_vllm.checkpoint import Calibration, Verified, quantize_model, verify
from taq_vllm.distributed import first
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan
from taq_vllm.scorers import DEFAULT_SCORER
from taq_vllm.scores import Scores
from taq_vllm.scoring import defaults, granularities, score
from taq_vllm.stream import HIDDEN_LIMIT_BYTES
from taq_vllm.tasks import Task
from taq_vllm.units import HEAD


@dataclass(frozen=True)
class Specialized:
    """What `specialize` made, and which steps had work to do."""

    scores: Scores
    plan: Plan
    verified: Verified
    scored_now: bool
    quantized_now: bool


def specialize(
    files: ModelFiles,
    task: Task,
    output: Path,
    request: Request,
    calibration: Calibration,
    scorer: str = DEFAULT_SCORER,
    scorer_settings: dict[str, Any] | None = None,
    device: str = "auto",
    force: bool = False,
    hidden_limit_bytes: float = HIDDEN_LIMIT_BYTES,
) -> Specialized:
    """Make a task's specialised checkpoint of a model.

    Args:
        files: the full-precision model.
        task: whose examples decide what each layer gets.
        output: the new checkpoint; scores and plan are kept in `OUTPUT.work` beside it, the scores under a name of
            their own for every request for scores.
        request: budget, allocation, granularity, edges and pins.
        calibration: how codes, scales and zero points are found.
        scorer: one of `scorers.SCORERS`; it scores what the plan decides on, or blocks if it can score nothing else.
        scorer_settings: overrides of the scorer's own settings.
        device: where blocks run.
        force: replace other scores of that name.
        hidden_limit_bytes: of hidden states in memory; the rest lies in files.

    Raises:
        ValueError: a scorer that cannot score the head, where that is to be decided by scores. Else see
            `score`, `allocate`, `quantize_model` and `verify`.
    """
    calibration.check()
    work = output.with_name(f"{output.name}.work")
    allocation, granularity = defaults(scorer)
    request = replace(
        request, allocation=request.allocation or allocation, granularity=request.granularity or granularity
    )
    check_budget(files, request)
    granularity = request.granularity if request.granularity in granularities(scorer) else "layer"
    head = request.head and not decided_head(files, request)
    if head and scorer == "taq":
        raise ValueError(
            f"scorer taq looks at hidden states of blocks and cannot score {HEAD}: pin it with --pin {HEAD}=8, or "
            "choose another --scorer"
        )
    asked = [scorer_settings or {}, granularity, head, task.calibration_sha256]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    scores, scored_now = score(
        files,
        task,
        scorer,
        work / f"scores-{scorer}-{key}.json",
        scorer_settings,
        device,
        force,
        granularity=granularity,
        head=head,
        hidden_limit_bytes=hidden_limit_bytes,
    )
    plan = allocate(files, scores, request)
    first(lambda: plan.save(work / "plan.json"))
    quantized_now = quantize_model(files, plan, output, calibration, task, device, hidden_limit_bytes)
    return Specialized(scores, plan, verify(output), scored_now, quantized_now)
