"""Trains transformers' own Qwen3 on packed rows: one process, answer-only loss, resumable at any saved step.

Muon (torch.optim.Muon: orthogonalised momentum, five Newton-Schulz steps, every projection its own matrix) updates
the linear layers; AdamW updates embedding, head and norms, with their gradients clipped to norm 1. All of it is
float32: bf16 matrix products are five times slower on a CPU without bf16 instructions. The learning rate follows the
step count, not the clock, and the batch of a step is a function of the step alone: a run that was killed and resumed
ends with the parameters, bit for bit, of one that was not, given the same machine and number of threads.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.lab.packing import KINDS, Rows

EMBEDDING_LEARNING_RATE = 6e-3
HEAD_AND_NORM_LEARNING_RATE = 4e-3
LEARNING_RATE_FLOOR = 0.02


@dataclass(frozen=True)
class Schedule:
    """How long a phase trains and how its rates move.

    Attributes:
        steps: Optimizer steps in all.
        warmup_steps: Steps over which the learning rates rise linearly from zero.
        decay_fraction: Last part of the steps over which they fall linearly to 2%; 0 keeps them constant.
        momentum_steps: Steps over which Muon's momentum rises from 0.85 to 0.95.
        batch_rows: Rows per step.
        muon_learning_rate: Of the linear layers, before the factor.
    """

    steps: int
    warmup_steps: int
    decay_fraction: float
    momentum_steps: int
    batch_rows: int = 24
    muon_learning_rate: float = 0.014

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied by in `step`, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        if self.decay_fraction == 0:
            return warmup
        left = 1 - step / self.steps
        return warmup * min(1.0, max(LEARNING_RATE_FLOOR, left / self.decay_fraction))

    def momentum(self, step: int) -> float:
        """Muon's momentum in `step`, counted from 0."""
        return min(0.95, 0.85 + 0.1 * step / self.momentum_steps)


@dataclass(frozen=True)
class StepReport:
    """What one step did: its number counted from 1, and the mean loss in nats per learned token, by kind."""

    step: int
    losses: dict[str, float]


def lab_config() -> Qwen3Config:
    """The lab model: 8.66 M parameters, 7.09 M of them in linear layers whose dimensions are multiples of 128."""
    return _config(hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4)


def dense_config() -> Qwen3Config:
    """The dense lab model: 2.36 M parameters, 1.57 M of them in linear layers."""
    return _config(hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=2)


def _config(num_attention_heads: int, **sizes: int) -> Qwen3Config:
    return Qwen3Config(
        **sizes,
        vocab_size=3072,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads // 2,
        head_dim=64,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=False,
        hidden_act="silu",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def new_model(config: Qwen3Config, seed: int = 0) -> Qwen3ForCausalLM:
    """A float32 model with fresh weights; the matrices that write to the residual stream start small."""
    model = Qwen3ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        if "embed_tokens" in name or "lm_head" in name:
            std = 0.02
        else:
            std = 0.6 * parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= 0.3
        nn.init.normal_(parameter, std=std, generator=generator)
    return model


def train(
    model: Qwen3ForCausalLM,
    rows: Rows,
    schedule: Schedule,
    checkpoint: Path,
    save_every: int = 25,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> None:
    """Trains `model` in place, continuing from `checkpoint` if it exists and leaving the final state there.

    Args:
        model: Float32 weights; replaced by the checkpoint's if there is one.
        rows: At least one batch of packed rows.
        schedule: Must be the one that the checkpoint was made with.
        checkpoint: File for weights, optimizer states and step; always complete, written every `save_every` steps.
        save_every: Steps that a killed run loses at most.
        on_step: Called after every step.

    Raises:
        ValueError: Fewer rows than a batch, or a checkpoint of another run.
    """
    if len(rows.tokens) < schedule.batch_rows:
        raise ValueError(f"{len(rows.tokens)} rows are less than a batch of {schedule.batch_rows}; make more documents")
    muon, adamw, clipped_groups = _optimizers(model, schedule.muon_learning_rate)
    run = {**asdict(schedule), "rows": len(rows.tokens)}
    first_step = _resume(checkpoint, run, model, muon, adamw)
    model.train()
    for step in range(first_step, schedule.steps):
        factor = schedule.learning_rate_factor(step)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = group["full_lr"] * factor
        for group in muon.param_groups:
            group["momentum"] = schedule.momentum(step)

        tokens, kinds = _batch(rows, schedule.batch_rows, step)
        losses, kinds = _answer_losses(model, tokens, kinds)
        losses.mean().backward()
        for parameters in clipped_groups:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()

        if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
            _save(checkpoint, run, step + 1, model, muon, adamw)
        on_step(StepReport(step + 1, _mean_by_kind(losses.detach(), kinds)))


def _optimizers(
    model: Qwen3ForCausalLM, muon_learning_rate: float
) -> tuple[torch.optim.Muon, torch.optim.AdamW, list[list[nn.Parameter]]]:
    """Muon, AdamW, and the parameter lists whose gradients are clipped, each on its own."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    embedding, head = [model.model.embed_tokens.weight], [model.lm_head.weight]
    muon = torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [
            {"params": embedding, "lr": EMBEDDING_LEARNING_RATE, "weight_decay": 0.0},
            {"params": norms, "lr": HEAD_AND_NORM_LEARNING_RATE, "weight_decay": 0.0},
            {"params": head, "lr": HEAD_AND_NORM_LEARNING_RATE, "weight_decay": 0.01},
        ],
        betas=(0.9, 0.95),
    )
    for group in (*muon.param_groups, *adamw.param_groups):
        group["full_lr"] = group["lr"]
    return muon, adamw, [embedding + norms, head]


def _batch(rows: Rows, batch_rows: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and kinds [batch_rows, 257] int64 of a step: the stored order first, then one shuffle per epoch."""
    epoch, batch = divmod(step, len(rows.tokens) // batch_rows)
    if epoch == 0:
        order = torch.arange(len(rows.tokens))
    else:
        order = torch.randperm(len(rows.tokens), generator=torch.Generator().manual_seed(epoch))
    chosen = order[batch * batch_rows : (batch + 1) * batch_rows].numpy()
    return torch.from_numpy(rows.tokens[chosen]).long(), torch.from_numpy(rows.kinds[chosen]).long()


def _answer_losses(
    model: Qwen3ForCausalLM, tokens: torch.Tensor, kinds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy [learned tokens] in nats and the kind of each; the head sees the learned positions only."""
    learned = kinds[:, 1:] > 0
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    losses = F.cross_entropy(model.lm_head(hidden[learned]), tokens[:, 1:][learned], reduction="none")
    return losses, kinds[:, 1:][learned]


def _mean_by_kind(losses: torch.Tensor, kinds: torch.Tensor) -> dict[str, float]:
    return {kind: losses[kinds == i].mean().item() for kind, i in KINDS.items() if (kinds == i).any()}


def _save(
    checkpoint: Path,
    run: dict,
    step: int,
    model: Qwen3ForCausalLM,
    muon: torch.optim.Muon,
    adamw: torch.optim.AdamW,
) -> None:
    """Replaces the checkpoint in one step, so that a kill leaves the old one or the new one."""
    state = {
        "run": run,
        "step": step,
        "model": model.state_dict(),
        "muon": muon.state_dict(),
        "adamw": adamw.state_dict(),
    }
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, checkpoint)


def _resume(
    checkpoint: Path,
    run: dict,
    model: Qwen3ForCausalLM,
    muon: torch.optim.Muon,
    adamw: torch.optim.AdamW,
) -> int:
    """Loads the checkpoint if there is one; returns the steps that are done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["run"] != run:
        raise ValueError(
            f"{checkpoint} was made with {state['run']}, this run is {run}; "
            "use the same settings or another output folder"
        )
    model.load_state_dict(state["model"])
    muon.load_state_dict(state["muon"])
    adamw.load_state_dict(state["adamw"])
    return state["step"]
