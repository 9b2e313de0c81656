"""TAQO (TAQ-O): the oracle. What the task loses when one layer alone is quantized.

Delta_l = metric(full precision) - metric(layer l alone at low bits), on labelled calibration examples
(arXiv 2511.06516, eq. 7). The metric is exact match by teacher forcing: greedy decoding gives exactly the gold
completion if and only if every gold token, the end included, is the most likely one given its gold prefix, so one
forward pass replaces a generation. Differences are paired over examples, which is where their standard errors come
from. Layers whose drop cannot be told from zero are not ranked by it but by the increase of the answer's negative
log-likelihood, which comes from the same pass.

Quantizing layer l changes nothing before it, so the hidden states entering l are kept and only blocks l..N run. Each
layer is journalled when done; the same command resumes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from taq_vllm.hidden_states import HiddenStates
from taq_vllm.plan import GROUP_SIZE, write_atomically
from taq_vllm.progress import steps
from taq_vllm.quantizer import quantize
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.stream import Batch, StreamedModel, make_batches, matrices_of, replace_weight
from taq_vllm.units import layer_of

READS = "answers"
GRANULARITIES = ("layer",)
COST_UNIT = "nats per answer token"

_LOGIT_ROWS = 2048  # predicted tokens per chunk: 2048 x 128k logits in float32 are 1 GB
_DISTINGUISHABLE = 1.96  # standard errors; two-sided 95%


class Settings(BaseModel):
    """How each layer is perturbed and measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[4, 8] = 4
    symmetric: bool = False
    gamma: float = Field(0.01, ge=0)
    """Layers whose exact match drops by at least this much are critical (eq. 7)."""
    max_examples: int = Field(256, ge=2)
    batch_size: int = Field(32, ge=1)


@dataclass(frozen=True)
class Answers:
    """What a model makes of the gold completions.

    Attributes:
        exact: [examples] float64, 1 where every token of the completion is the most likely one.
        nll: [examples] float64, mean negative log-likelihood per completion token, nats.
    """

    exact: Tensor
    nll: Tensor


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Score every unit by the drop that it alone causes."""
    model, sequences, journal = run.model, run.sequences, run.journal
    batches = make_batches(sequences, settings.batch_size)
    done = _read_journal(journal)
    waiting = [layer for layer in range(model.layers) if layer not in done]
    runs = len(batches) * (model.layers + sum(model.layers - layer for layer in waiting))
    hidden = model.embed(batches)
    with steps("taqo: one layer at a time", runs) as progress:
        for layer in range(model.layers):
            with model.block(layer) as block:
                after = hidden.map(lambda states, layer=layer, block=block: model.run(layer, block, states))
                progress.advance(len(batches))
                if layer in waiting:
                    for matrix in matrices_of(block).values():
                        if matrix.in_features % GROUP_SIZE == 0:
                            stored = matrix.weight.to(model.dtype)
                            replace_weight(matrix, quantize(stored, settings.bits, settings.symmetric).dequantize())
                    perturbed = hidden.map(lambda states, layer=layer, block=block: model.run(layer, block, states))
                    progress.advance(len(batches))
            if layer in waiting:
                for later in range(layer + 1, model.layers):
                    with model.block(later) as block:
                        perturbed.replace(lambda states, later=later, block=block: model.run(later, block, states))
                    progress.advance(len(batches))
                done[layer] = read_answers(model, batches, perturbed, len(sequences))
                _append(journal, layer, done[layer])
            hidden = after
    full = read_answers(model, batches, hidden, len(sequences))
    return [_unit_score(unit, full, done[layer_of(unit)], settings) for unit in run.units]


def read_answers(model: StreamedModel, batches: Sequence[Batch], hidden: HiddenStates, examples: int) -> Answers:
    """Exact match and NLL of the completions from the last block's hidden states.

    Args:
        model: gives the final norm and the head.
        batches: the calibration batches.
        hidden: the last block's output, [B, T, d] per batch.
        examples: number of calibration examples.
    """
    wrong = torch.zeros(examples, dtype=torch.float64)
    nll = torch.zeros(examples, dtype=torch.float64)
    tokens = torch.zeros(examples, dtype=torch.float64)
    with model.head() as head:
        for batch, states in zip(batches, hidden, strict=True):
            predicted = batch.is_predicted
            targets = batch.input_ids.roll(-1, dims=1)[predicted]
            owners = batch.examples[:, None].expand_as(predicted)[predicted]
            selected = states[predicted.to(states.device)]
            for rows, target, owner in zip(
                selected.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), owners.split(_LOGIT_ROWS), strict=True
            ):
                logits = head.logits(rows).cpu()
                wrong.index_add_(0, owner, (logits.argmax(-1) != target).double())
                loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
                nll.index_add_(0, owner, loss.double())
                tokens.index_add_(0, owner, torch.ones(len(target), dtype=torch.float64))
    return Answers(exact=(wrong == 0).double(), nll=nll / tokens)


def _unit_score(unit: str, full: Answers, perturbed: Answers, settings: Settings) -> UnitScore:
    drop, drop_stderr = _mean_and_stderr(full.exact - perturbed.exact)
    increase, increase_stderr = _mean_and_stderr(perturbed.nll - full.nll)
    return UnitScore(
        unit=unit,
        score=drop,
        stderr=drop_stderr,
        from_zero=abs(drop) > _DISTINGUISHABLE * drop_stderr,
        tiebreak=increase,
        costs={settings.bits: increase},
        cost_stderrs={settings.bits: increase_stderr},
        details={
            "critical": drop >= settings.gamma,
            "nll_increase": increase,
            "nll_increase_stderr": increase_stderr,
            "nll_from_zero": abs(increase) > _DISTINGUISHABLE * increase_stderr,
            "full_exact_match": full.exact.mean().item(),
        },
    )


def _mean_and_stderr(differences: Tensor) -> tuple[float, float]:
    return differences.mean().item(), (differences.std(unbiased=True) / len(differences) ** 0.5).item()


def _read_journal(journal: Path) -> dict[int, Answers]:
    if not journal.is_file():
        return {}
    done = {}
    whole = []
    for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            write_atomically(journal, "".join(whole))  # cut off by a killed run: its layer is run again
            break
        whole.append(line)
        entry = json.loads(line)
        done[entry["layer"]] = Answers(
            exact=torch.tensor(entry["exact"], dtype=torch.float64), nll=torch.tensor(entry["nll"], dtype=torch.float64)
        )
    return done


def _append(journal: Path, layer: int, answers: Answers) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"layer": layer, "exact": answers.exact.tolist(), "nll": answers.nll.tolist()}) + "\n")
