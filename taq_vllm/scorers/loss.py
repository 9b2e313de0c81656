"""What quantizing costs the task, estimated from gradients: every matrix and bitwidth from one backward pass. Labelled.

With nll_i the mean negative log-likelihood of example i's T_i answer tokens (the end included), g_i its gradient, and
dW = Q_b(W) - W (round to nearest) over all matrices of a unit,

    first_b  = E_i[ g_i . dW ]                     can be negative: rounding happens to help
    second_b = E_i[ T_i (h_i . dW)^2 ] / 2         the curvature dW' H dW / 2, H by a Fisher matrix
    cost_b   = first_b + second_b, or either (`terms`), nats per answer token

Positive means that the loss grows. T_i is there because the Fisher of a sequence is that of its summed likelihood: its
score is T_i g_i, E[(T_i g_i)(T_i g_i)'] is the Hessian of the sum where the model is right about its answers, and a
T_i-th of that the Hessian of the mean. `curvature` says what h_i is:
- `empirical`: g_i itself, from the same backward pass. Where the model knows an answer g_i is nearly zero, and so is
  this curvature, however much a change would hurt.
- `model`: a random vector of the same kind whose second moment is the model's own Fisher (Gauss-Newton) matrix at the
  answer's tokens: at the logits of a token with probabilities p, (sqrt(p) e - p (sqrt(p) . e)) / T_i with e standard
  normal. A second backward pass for `both`; KL(full || changed) per answer token to second order.

Products are summed over a unit's matrices before squaring, so matrices of a unit may help or hurt each other; between
units costs are additive by assumption. ModelOpt's AutoQuantize (Fisher) and AutoRound's AutoScheme (first order) do
this with generic text; here it is the task's answers.

No gradient of a weight is formed. For y = W x with d nll_i / d y_t = delta_t,  g_i . dW = sum_t delta_t . (dW x_t): one
matmul per matrix and bitwidth, and exact per example, which is where the standard errors come from.

The backward pass goes block by block: the forward walk keeps every block's input (N sets of hidden states, spilled to
disk beyond a limit), then each block from the last to the first is loaded once more, run with its graph, and left.

After a block of the backward walk its products are journalled, and at most once a minute the gradient is saved beside
the journal. A resumed run repeats the forward walk below that gradient, since inputs are not kept, and the backward
walk from there. With several processes nothing is saved.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taq_vllm import journal, units
from taq_vllm.distributed import gather, world
from taq_vllm.estimates import mean_and_stderr
from taq_vllm.experts import experts_in
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.progress import steps
from taq_vllm.rounding import Rounding, check_bits, is_quantizable
from taq_vllm.scores import UnitScore
from taq_vllm.scoring import Run
from taq_vllm.stream import Batch, StreamedModel, make_batches, matrices_of
from taq_vllm.units import HEAD

READS = "answers"
GRANULARITIES = units.GRANULARITIES
COST_UNIT = "nats per answer token"
KEEPS_ALL_HIDDEN_STATES = True

_SAVE_EVERY_S = 60.0
_HEAD_ROWS = 8192  # 8192 x 8192 in float32 are 256 MB


class Settings(BaseModel):
    """Which estimate, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    terms: Literal["first", "second", "both"] = "both"
    curvature: Literal["empirical", "model"] = "empirical"
    bits: tuple[int, ...] = (4, 8)
    symmetric: bool | None = None
    """None: what plans do at each bitwidth (asymmetric below 8)."""
    max_examples: int = Field(256, ge=2)
    batch_size: int = Field(8, ge=1)
    seed: int = 0
    """Of the model's own curvature."""

    _bits = field_validator("bits")(check_bits)


Products = dict[str, Tensor]
"""By matrix: g_i . dW for every example and bitwidth, [examples, bits] float64."""


def score_units(run: Run, settings: Settings) -> list[UnitScore]:
    """Score every unit by the loss that it alone is estimated to add.

    Raises:
        ValueError: logits or gradients that are not finite.
    """
    batches = make_batches(run.sequences, settings.batch_size)
    rounding = Rounding(settings.symmetric)
    of_answers = of_model = None
    if settings.terms != "second" or settings.curvature == "empirical":
        of_answers = inner_products(run, batches, settings.bits, rounding)
    if settings.terms != "first" and settings.curvature == "model":
        of_model = inner_products(run, batches, settings.bits, rounding, sampled=True, seed=settings.seed)
    tokens = torch.zeros(len(run.sequences), dtype=torch.float64)
    for batch in batches:
        tokens[batch.examples] = batch.is_predicted.sum(1).double()
    tokens = gather(tokens)[:, None]

    def of_unit(products: Products, unit: str) -> Tensor:
        return gather(sum(products[name] for name in run.units[unit]))

    scores = []
    for unit in run.units:
        terms = {}
        if settings.terms != "second":
            terms["first_order"] = of_unit(of_answers, unit)
        if settings.terms != "first":
            terms["second_order"] = tokens * of_unit(of_model or of_answers, unit).square() / 2
        scores.append(_unit_score(unit, terms, settings.bits))
    return scores


def inner_products(
    run: Run, batches: Sequence[Batch], bits: Sequence[int], rounding: Rounding, sampled: bool = False, seed: int = 0
) -> Products:
    """g_i . dW of every matrix of `run.units`, for this process's examples.

    Args:
        run: model, units and journal.
        batches: of `run.sequences`.
        bits: bitwidths.
        rounding: gives Q_b(W).
        sampled: with pseudo-gradients whose second moment is the model's own Fisher, not the answers' gradients.
        seed: of the pseudo-gradients.

    Raises:
        ValueError: logits or gradients that are not finite.
    """
    model = run.model
    finished = run.journal.with_name(f"{run.journal.name}.model") if sampled else run.journal
    saved = finished.with_name(f"{finished.name}.gradient")
    description = "loss: the model's curvature" if sampled else "loss: the answers' gradients"
    products = {
        name: torch.zeros(len(run.sequences), len(bits), dtype=torch.float64)
        for matrices in run.units.values()
        for name in matrices
    }
    alone = world()[1] == 1
    resumed = None
    if alone:
        done = {
            entry["matrix"]: torch.tensor(entry["products"], dtype=torch.float64) for entry in journal.read(finished)
        }
        products |= done
        if set(products) == set(done):
            return products
        resumed = model.resume(saved)
    gradient, last = resumed or (None, model.layers)

    def finish(names: Sequence[str]) -> None:
        for name in names if alone else ():
            journal.append(finished, {"matrix": name, "products": products[name].tolist()})

    with steps(description, len(batches) * 2 * last) as progress:
        inputs = [model.embed(batches)]
        started = time.monotonic()
        for layer in range(last if gradient is None else last - 1):
            with model.block(layer) as block:
                inputs.append(inputs[-1].map(lambda states, layer=layer, block=block: model.run(layer, block, states)))
            progress.advance(len(batches))
            if layer == 0:
                # Back through a block: its run once more, the backward pass, and a matmul per bitwidth.
                estimate = (time.monotonic() - started) * last * (3 + len(bits))
                progress.say(f"{description}: estimated time {estimate:.0f} s")
        if gradient is None:
            gradient = _through_head(model, batches, inputs.pop(), bits, rounding, products, sampled, seed)
            finish([HEAD] if HEAD in products else [])
        else:
            progress.advance(len(batches))
        saved_at = time.monotonic()
        for layer in reversed(range(last)):
            _through_block(model, layer, batches, inputs.pop(), gradient, bits, rounding, products)
            progress.advance(len(batches))
            finish([name for name in products if name.startswith(f"model.layers.{layer}.")])
            if alone and time.monotonic() - saved_at >= _SAVE_EVERY_S:
                gradient.save(saved, blocks=layer)
                saved_at = time.monotonic()
    return products


def _through_head(
    model: StreamedModel,
    batches: Sequence[Batch],
    hidden: HiddenStates,
    bits: Sequence[int],
    rounding: Rounding,
    products: Products,
    sampled: bool,
    seed: int,
) -> HiddenStates:
    """d nll_i / d (last block's output) of every batch, [B, T, d]; the head's products where they are asked for."""
    of_batch = iter(batches)
    rank, processes = world()
    if HEAD in products:
        products[HEAD].zero_()  # a run that was killed before it saved a gradient left them whole in the journal
    with model.head() as head:
        dtype = _gradient_dtype(model)
        norm = head.norm.to(dtype)
        errors = _errors(HEAD, head.weight, bits, rounding, model, head.weight.dtype) if HEAD in products else []

        def backward(states: Tensor) -> Tensor:
            batch = next(of_batch)
            predicted = batch.is_predicted
            targets = batch.input_ids.roll(-1, dims=1)[predicted].to(states.device)
            owners = batch.examples[:, None].expand_as(predicted)[predicted]
            shares = (1 / predicted.sum(1, keepdim=True)).expand_as(predicted)[predicted].to(states.device)
            gradient = torch.zeros(states.shape, dtype=dtype, device=states.device)
            places = predicted.nonzero().to(states.device)
            for place, target, owner, share in zip(
                *(part.split(head.rows_at_once) for part in (places, targets, owners, shares)), strict=True
            ):
                rows = states[place[:, 0], place[:, 1]]
                probabilities = head.logits(rows).softmax(-1)
                if sampled:
                    tokens = zip((owner * processes + rank).tolist(), place[:, 1].tolist(), strict=True)
                    draw = torch.stack([_standard_normal(probabilities.shape[1], seed, *token) for token in tokens])
                    of_logits = fisher_root(probabilities, draw.to(probabilities.device))
                else:
                    of_logits = probabilities
                    of_logits[torch.arange(len(target)), target] -= 1
                of_logits = of_logits * share[:, None]
                with torch.enable_grad():
                    rows = rows.to(dtype).clone().requires_grad_()
                    normed = norm(rows)
                of_normed = torch.zeros_like(rows)
                moved = torch.zeros(len(rows), len(errors), dtype=torch.float64)
                # In parts: in float32 the head of a large model would be the largest thing in memory.
                for first in range(0, head.weight.shape[0], _HEAD_ROWS):
                    part = slice(first, first + _HEAD_ROWS)
                    of_part = of_logits[:, part]
                    of_normed += of_part.to(dtype) @ head.weight[part].to(dtype)
                    for i, error in enumerate(errors):
                        by_error = nn.functional.linear(normed.detach(), error[part].to(dtype))
                        moved[:, i] += (of_part * by_error.float()).sum(-1).double().cpu()
                if errors:
                    products[HEAD].index_add_(0, owner, moved)
                (of_rows,) = torch.autograd.grad(normed, rows, of_normed)
                gradient[place[:, 0], place[:, 1]] = of_rows
            return gradient

        return hidden.map(backward)


def _through_block(
    model: StreamedModel,
    layer: int,
    batches: Sequence[Batch],
    inputs: HiddenStates,
    gradient: HiddenStates,
    bits: Sequence[int],
    rounding: Rounding,
    products: Products,
) -> None:
    """The gradient at a block's output becomes that at its input, batch by batch; its matrices' products are added."""
    of_batch = iter(zip(batches, inputs, strict=True))
    with model.block(layer) as block:
        examples, positions, experts = torch.empty(0), 0, experts_in(block)

        def record(name: str, matrix: nn.Linear) -> None:
            errors = _errors(name, matrix.weight, bits, rounding, model, _gradient_dtype(model))

            def at_forward(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
                x = arguments[0].detach()  # [B, T, K], an expert's [tokens sent, K]
                rows = experts.tokens.cpu() // positions if x.dim() == 2 else None

                def at_backward(delta: Tensor) -> None:  # [..., N]; zero at padding, which no answer sees
                    for place, error in enumerate(errors):
                        moved = nn.functional.linear(x, error)
                        by_token = (delta.float() * moved.float()).sum(-1).double().cpu()
                        if rows is None:
                            products[name][examples, place] = by_token.sum(1)
                        else:
                            of_row = torch.zeros(len(examples), dtype=torch.float64).index_add_(0, rows, by_token)
                            products[name][examples, place] = of_row

                output.register_hook(at_backward)

            handles.append(matrix.register_forward_hook(at_forward))

        handles: list[RemovableHandle] = []
        for inside, matrix in matrices_of(block).items():
            name = f"model.layers.{layer}.{inside}"
            if name in products and is_quantizable(matrix.in_features):
                record(name, matrix)
        block.to(_gradient_dtype(model))

        def backward(after: Tensor) -> Tensor:
            nonlocal examples, positions
            batch, states = next(of_batch)
            examples, positions = batch.examples, batch.input_ids.shape[1]
            with torch.enable_grad():
                states = states.to(after.dtype).clone().requires_grad_()
                (before,) = torch.autograd.grad(model.run_with_gradient(layer, block, states), states, after)
            if not torch.isfinite(before).all():
                raise ValueError(
                    f"the loss's gradient is not finite in model.layers.{layer}: a weight there is damaged, or "
                    "activations overflow; check the checkpoint, or use one in bfloat16"
                )
            return before

        gradient.replace(backward)
        for handle in handles:
            handle.remove()


def fisher_root(probabilities: Tensor, draw: Tensor) -> Tensor:
    """A linear map of draws whose square is the Fisher matrix of a softmax: B e with B B' = diag(p) - p p'.

    Args:
        probabilities: [..., vocabulary], each row sums to 1.
        draw: [..., vocabulary]; standard normal ones give vectors of second moment diag(p) - p p'.
    """
    scaled = probabilities.sqrt() * draw
    return scaled - probabilities * scaled.sum(-1, keepdim=True)


def _standard_normal(size: int, seed: int, example: int, place: int) -> Tensor:
    """The same for a token however examples are batched or shared out."""
    digest = hashlib.sha256(f"{seed} {example} {place}".encode()).digest()
    return torch.randn(size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def _errors(
    name: str, weight: Tensor, bits: Sequence[int], rounding: Rounding, model: StreamedModel, dtype: torch.dtype
) -> list[Tensor]:
    """Q_b(W) - W [N, K] for each bitwidth."""
    stored = weight.to(model.dtype)
    if not is_quantizable(stored.shape[1]):
        return []
    return [(rounding(name, stored, width).float() - stored.float()).to(dtype) for width in bits]


def _gradient_dtype(model: StreamedModel) -> torch.dtype:
    """Gradients of a mean over tokens underflow in fp16."""
    return torch.float32 if model.compute_dtype == torch.float16 else model.compute_dtype


def _unit_score(unit: str, terms: Mapping[str, Tensor], bits: Sequence[int]) -> UnitScore:
    """From the terms of a unit's cost, each [examples, bits]; bits ascend."""
    cost = sum(terms.values())
    found = [mean_and_stderr(cost[:, place]) for place in range(len(bits))]
    details = {}
    for name, term in terms.items():
        details[name], details[f"{name}_stderr"] = mean_and_stderr(term[:, 0])
    return UnitScore(
        unit=unit,
        score=found[0][0],
        stderr=found[0][1],
        costs={width: mean for width, (mean, _) in zip(bits, found, strict=True)},
        cost_stderrs={width: stderr for width, (_, stderr) in zip(bits, found, strict=True)},
        details=details,
    )
