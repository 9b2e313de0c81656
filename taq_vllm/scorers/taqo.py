"""TAQO (TAQ-O): the oracle. What the task loses when one unit alone is quantized.

Delta_l = metric(full precision) - metric(unit l alone at low bits), on labelled calibration examples
(arXiv 2511.06516, eq. 7). Differences are paired over examples, which is where their standard errors come from. Units
whose drop cannot be told from zero are not ranked by it but by the increase of the answer's negative log-likelihood
(NLL), which is also the cost per bitwidth; the score is that of the lowest bitwidth.

`measure`:
- `teacher-forced` (default): exact match of the reference completion. Greedy decoding gives exactly these tokens, the
  end included (`tasks.tokenize`: the end-of-sequence token, or of plain prompts with stop strings a stop string), if
  and only if every one of them is the most likely given those before, so one forward pass replaces a generation, and
  the NLL comes from the same pass. The same answer in other words, or the same text in other tokens, counts as wrong.
  `metric=task` says that this is meant as the task's em, and needs examples whose completion is their only answer.
- `generate`: the task's own metric (em, f1, math, pass@1) of greedy outputs, by the whole model in memory
  (`generate.py`); outputs that a unit does not change are recognised by teacher forcing and not generated again. The
  NLL is measured as before.

Quantizing unit l changes nothing before it, so only what follows is run (`one_at_a_time.py`, which also journals).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from taq_vllm import units
from taq_vllm.distributed import gather
from taq_vllm.estimates import mean_and_stderr
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.one_at_a_time import Key, Values, walk
from taq_vllm.progress import steps
from taq_vllm.rounding import Rounding, check_bits
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.stream import Batch, Head, make_batches
from taq_vllm.tasks import Task

READS = "answers"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = "nats per answer token"

_DISTINGUISHABLE = 1.96  # standard errors; two-sided 95%
_TOO_FEW_EXACT = 0.05  # where so few references are reproduced, there is next to nothing to lose


class Settings(BaseModel):
    """How each unit is perturbed and measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: tuple[int, ...] = (4,)
    symmetric: bool | None = None
    """None: what plans do at each bitwidth (asymmetric below 8)."""
    measure: Literal["teacher-forced", "generate"] = "teacher-forced"
    metric: Literal["exact", "task"] | None = None
    """`exact` match of the reference completion, or the `task`'s metric (teacher-forced: em, of examples whose
    completion is their one answer); None for what `measure` gives."""
    allow_code_execution: bool = False
    """Permission to run the Python code that the model writes (generating for pass@1)."""
    gamma: float = Field(0.01, ge=0)
    """Units whose metric drops by at least this much are critical (eq. 7)."""
    max_examples: int = Field(256, ge=2)
    batch_size: int = Field(32, ge=1)

    _bits = field_validator("bits")(check_bits)

    @model_validator(mode="after")
    def _metric_fits_measure(self) -> "Settings":
        if self.measure == "generate" and self.metric == "exact":
            raise ValueError(
                "got measure generate with metric exact; exact match of the reference needs no generation: use "
                "measure=teacher-forced, or metric=task"
            )
        return self


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Score every unit by the drop that it alone causes.

    Raises:
        ValueError: a metric or an example that cannot be teacher-forced, code to run without permission, an example or
            a model that is too large to generate with, or logits that are not finite.
    """
    if settings.measure == "teacher-forced" and settings.metric == "task":
        _check_teacher_forced(run.task, settings.max_examples)
    rounding = Rounding(settings.symmetric)
    outputs = None
    if settings.measure == "generate":
        from taq_vllm.generate import TaskOutputs

        outputs = TaskOutputs(run, rounding, settings.batch_size, settings.allow_code_execution)
    batches = make_batches(run.sequences, settings.batch_size)

    def read(changed: Key | None, hidden: HiddenStates, head: Head, _: Head) -> Values:
        values = read_answers(batches, hidden, head, len(run.sequences))
        if outputs is not None:
            values["task"] = outputs.full if changed is None else outputs.changed(*changed)
        return values

    found, hidden = walk(run, batches, settings.bits, rounding, read, "taqo: one unit at a time")
    with steps("taqo: full model", len(batches)) as progress:
        with run.model.head() as head:
            full = read(None, hidden, head, head)
        progress.advance(len(batches))
        exact = full["exact"].mean().item()
        if settings.measure == "teacher-forced" and exact < _TOO_FEW_EXACT:
            progress.say(
                f"taqo: warning: the full-precision model gives {exact:.1%} of the reference completions token by "
                "token, so that exact match has nothing to lose and the ranking is that of the completions' "
                "likelihood: use measure=generate, or check that the model knows this task, its template and its stop "
                "strings"
            )
    return [
        _unit_score(unit, full, {bits: found[unit, bits] for bits in settings.bits}, settings) for unit in run.units
    ]


def _check_teacher_forced(task: Task, examples: int) -> None:
    """Whether the task's metric is that of one reference completion."""
    if task.metric != "em":
        raise ValueError(
            f"{task.path} is judged by {task.metric}, which needs the model's own words and cannot be teacher-forced: "
            "add measure=generate, or take metric=exact (the reference completion, token by token)"
        )
    for example in task.calibration[:examples]:
        if (example.completion.strip(),) != tuple(answer.strip() for answer in example.answers):
            raise ValueError(
                f"{task.path}, example {example.id}: got {len(example.answers)} answers and the completion "
                f"{example.completion!r}; em can be teacher-forced only where the completion is the one answer: add "
                "measure=generate, or take metric=exact (the reference completion, token by token)"
            )


def read_answers(batches: Sequence[Batch], hidden: HiddenStates, head: Head, examples: int) -> Values:
    """Exact match and NLL of the completions from the last block's hidden states.

    Args:
        batches: this process's calibration batches.
        hidden: the last block's output, [B, T, d] per batch.
        head: final norm and head.
        examples: number of calibration examples of this process.

    Returns:
        `exact`: 1 where every token of the completion is the most likely one; `nll`: mean negative log-likelihood per
        completion token, nats. [examples of all processes] float64.
    """
    wrong = torch.zeros(examples, dtype=torch.float64)
    nll = torch.zeros(examples, dtype=torch.float64)
    tokens = torch.zeros(examples, dtype=torch.float64)
    for batch, states in zip(batches, hidden, strict=True):
        predicted = batch.is_predicted
        targets = batch.input_ids.roll(-1, dims=1)[predicted]
        owners = batch.examples[:, None].expand_as(predicted)[predicted]
        selected = states[predicted.to(states.device)]
        for rows, target, owner in zip(
            *(part.split(head.rows_at_once) for part in (selected, targets, owners)), strict=True
        ):
            logits = head.logits(rows).cpu()
            wrong.index_add_(0, owner, (logits.argmax(-1) != target).double())
            loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            nll.index_add_(0, owner, loss.double())
            tokens.index_add_(0, owner, torch.ones(len(target), dtype=torch.float64))
    return {"exact": gather((wrong == 0).double()), "nll": gather(nll / tokens)}


def _unit_score(unit: str, full: Values, perturbed: dict[int, Values], settings: Settings) -> UnitScore:
    lowest = settings.bits[0]
    metric = "task" if settings.measure == "generate" else "exact"
    drop, drop_stderr = mean_and_stderr(full[metric] - perturbed[lowest][metric])
    increases = {bits: mean_and_stderr(values["nll"] - full["nll"]) for bits, values in perturbed.items()}
    increase, increase_stderr = increases[lowest]
    return UnitScore(
        unit=unit,
        score=drop,
        stderr=drop_stderr,
        from_zero=abs(drop) > _DISTINGUISHABLE * drop_stderr,
        tiebreak=increase,
        costs={bits: cost for bits, (cost, _) in increases.items()},
        cost_stderrs={bits: stderr for bits, (_, stderr) in increases.items()},
        details={
            "critical": drop >= settings.gamma,
            "nll_increase": increase,
            "nll_increase_stderr": increase_stderr,
            "nll_from_zero": abs(increase) > _DISTINGUISHABLE * increase_stderr,
            "full_exact_match": full["exact"].mean().item(),
            "full_metric": full[metric].mean().item(),
        },
    )
