"""Walks a model block by block: the one pass that scoring and quantizing share.

Only one transformer block's weights are in memory at a time. They are read from the safetensors files into a
skeleton of Hugging Face modules on the meta device and given back afterwards; the hidden states of the calibration
batches are carried from block to block, beyond a limit in files (`hidden_states.py`). Of the embedding only the rows
that are looked up are read; the head stays in 16 bits. A model larger than memory is walked like a small one.

Batches are padded on the right. Under causal attention no real token sees the padding, so no mask is needed and
statistics only have to leave the padded positions out. Works for the architectures in `model_files.ARCHITECTURES`.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taq_vllm.distributed import device_of
from taq_vllm.experts import separate_experts
from taq_vllm.hidden_states import HiddenStates, Storage
from taq_vllm.model_files import ModelFiles
from taq_vllm.tasks import TokenizedExample

HIDDEN_LIMIT_BYTES = 2 << 30
_EMBEDDING = "model.embed_tokens.weight"
_LOGITS_BYTES = 256 << 20  # of one call of the head: [rows, vocabulary] in float32
_HEAD_PART_BYTES = 128 << 20  # of the head's rows that are converted at a time


@dataclass(frozen=True)
class Batch:
    """Token sequences of similar length, padded on the right.

    Attributes:
        input_ids: [B, T] int64.
        lengths: [B] int64, real tokens of each row.
        prompt_lengths: [B] int64, tokens before the completion.
        examples: [B] int64, each row's place in the calibration set.
    """

    input_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    examples: Tensor

    @property
    def is_token(self) -> Tensor:
        """[B, T] bool: False at padding."""
        return torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]

    @property
    def is_predicted(self) -> Tensor:
        """[B, T] bool: True where the *next* token belongs to the completion."""
        place = torch.arange(self.input_ids.shape[1])
        return (place >= self.prompt_lengths[:, None] - 1) & (place < self.lengths[:, None] - 1)


def make_batches(sequences: Sequence[TokenizedExample], batch_size: int, max_tokens: int | None = None) -> list[Batch]:
    """Group sequences of similar length, shortest first.

    Args:
        sequences: the tokenized calibration set.
        batch_size: rows per batch.
        max_tokens: cut every sequence after so many tokens.
    """
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i].input_ids))
    batches = []
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        rows = [sequences[i].input_ids[:max_tokens] for i in chosen]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        prompts = torch.tensor([min(sequences[i].prompt_len, len(row)) for i, row in zip(chosen, rows, strict=True)])
        batches.append(Batch(input_ids, lengths, prompts, torch.tensor(chosen)))
    return batches


class StreamedModel:
    """A causal language model on disk whose blocks are loaded one at a time.

    Attributes:
        files: the model's folder.
        dtype: bf16 or fp16, as the config says; fp32 models become bf16, as vLLM serves them.
        compute_dtype: of weights and hidden states during the walk: `dtype`, or float32 on a CPU without bf16
            instructions, where it is three times as fast (and the weights are the same numbers).
        device: where blocks run.
        storage: of the hidden states.
    """

    def __init__(
        self,
        files: ModelFiles,
        device: str = "auto",
        hidden_limit_bytes: float = HIDDEN_LIMIT_BYTES,
        spill_folder: str | Path | None = None,
    ) -> None:
        """Build the skeleton; loads no weight.

        Args:
            files: the model's folder.
            device: as `cuda:1` or `cpu`; `auto` is a GPU if there is one.
            hidden_limit_bytes: of hidden states in memory; the rest lies in files.
            spill_folder: on whose disk these files are; the system's folder for temporary files if not given.

        Raises:
            ValueError: an architecture that is not supported, a checkpoint that is already quantized, or no such
                device.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        files.check_plannable()
        self.files = files
        self.device = torch.device(device_of(device))
        self.storage = Storage(hidden_limit_bytes, spill_folder)
        self.config = AutoConfig.from_pretrained(files.path)
        self.dtype = self.config.dtype if self.config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        self.compute_dtype = _compute_dtype(self.device, self.dtype)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                self.config, dtype=self.compute_dtype, attn_implementation="sdpa"
            )
        separate_experts(skeleton.model)
        self._decoder = skeleton.model.eval().requires_grad_(False)
        # Its buffers are computed, not stored: build it again off the meta device.
        self._rotary = type(self._decoder.rotary_emb)(config=self.config).to(self.device)
        # Gemma's embedding multiplies what it looks up, by a number in the model's dtype.
        scale = getattr(self._decoder.embed_tokens, "scalar_embed_scale", 1.0)
        self._embedding_scale = float(torch.tensor(scale, dtype=self.dtype))
        self._positions: dict[tuple[int, int, str], dict[str, Any]] = {}

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self._decoder.layers)

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> HiddenStates:
        """Hidden states entering the first block.

        Raises:
            ValueError: the embedding is missing, has another shape, or holds numbers that are not finite.
        """
        shape = (self.config.vocab_size, self.config.hidden_size)
        self._check_shape(_EMBEDDING, self.files.info(_EMBEDDING).shape, shape)
        return HiddenStates((self._look_up(batch.input_ids) for batch in batches), self.storage)

    def _look_up(self, input_ids: Tensor) -> Tensor:
        tokens, places = input_ids.unique(return_inverse=True)
        # The dtype of the checkpoint comes first: stored float32 weights are rounded as everywhere else.
        rows = self.files.read_rows(_EMBEDDING, tokens.tolist()).to(self.dtype)
        states = rows.to(device=self.device, dtype=self.compute_dtype)[places.to(self.device)] * self._embedding_scale
        return _finite(states, "model.embed_tokens", self)

    def resume(self, file: Path) -> tuple[HiddenStates, int] | None:
        """Hidden states that `HiddenStates.save` wrote, and the number of blocks behind them; None if it did not.

        Raises:
            ValueError: the file is damaged.
        """
        return HiddenStates.load(file, self.storage, self.device)

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """The block `layer` with its weights; they are given back on leaving.

        Raises:
            ValueError: a tensor of the block is missing or has another shape.
        """
        with self._loaded(self._decoder.layers[layer], f"model.layers.{layer}.") as block:
            yield block

    @torch.no_grad()
    def run(self, layer: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block on one batch: [B, T, d] to [B, T, d].

        Raises:
            ValueError: something in the output is not finite.
        """
        return self.run_with_gradient(layer, block, hidden)

    def run_with_gradient(self, layer: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """`run`, recorded for a backward pass where `hidden` or the block's weights ask for a gradient."""
        layer_types = getattr(self.config, "layer_types", None)
        windowed = getattr(self.config, "sliding_window", None) is not None
        layer_type = layer_types[layer] if layer_types else "sliding_attention" if windowed else "full_attention"
        # Masks and rotary embeddings depend on the batch's shape alone: all blocks of a kind share them.
        kind = (*hidden.shape[:2], layer_type)
        if kind not in self._positions:
            self._positions[kind] = self._position_arguments(hidden, layer_type)
        return _finite(block(hidden, **self._positions[kind]), f"model.layers.{layer}", self)

    def _position_arguments(self, hidden: Tensor, layer_type: str) -> dict[str, Any]:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        is_sliding = layer_type == "sliding_attention"
        make_mask = create_sliding_window_causal_mask if is_sliding else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        # Frequencies may differ between kinds of layers, as Gemma's do.
        kind = (layer_type,) if hasattr(self._rotary, "layer_types") else ()
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": self._rotary(hidden, positions, *kind),
        }

    @contextmanager
    def head(self) -> Iterator["Head"]:
        """The final norm and the language-model head, loaded; the head in 16 bits."""
        name = "lm_head.weight" if "lm_head.weight" in self.files.tensors else _EMBEDDING
        with self._loaded(self._decoder.norm, "model.norm.") as norm:
            yield Head(norm, self._read(name, self.dtype))

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        expected = module.state_dict()
        state = {}
        for name, meta in expected.items():
            state[name] = self._read(prefix + name, self.compute_dtype)
            self._check_shape(prefix + name, state[name].shape, meta.shape)
        module.load_state_dict(state, assign=True)
        del state
        try:
            yield module
        finally:
            module.to("meta")
            _return_freed_memory()

    def _check_shape(self, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            raise ValueError(
                f"{self.files.path} holds {name} as {tuple(found)}, its config.json asks for {tuple(expected)}: "
                "config and weights are not of one model"
            )

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        # Through 16 bits whatever the file holds and the walk computes in: what is served has no more.
        return self.files.read(name).to(self.dtype).to(device=self.device, dtype=dtype)


def _return_freed_memory() -> None:
    """Give the system what the C library would keep: measured, three blocks' worth of smaller tensors."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _finite(states: Tensor, name: str, model: StreamedModel) -> Tensor:
    """The same states [B, T, d], if all of them are numbers."""
    if torch.isfinite(states).all():
        return states
    overflows = " or let it compute in bfloat16 (dtype in config.json)," if model.dtype == torch.float16 else ""
    raise ValueError(
        f"{name} of {model.files.path} gives hidden states that are not finite: compare its weights with the model's "
        f"source,{overflows} and look for examples that are not what the model expects"
    )


def _compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    if device.type != "cpu":
        return dtype
    # The key is x86's; other processors are taken to have the instructions.
    return dtype if torch.cpu.get_capabilities().get("avx512_bf16", True) else torch.float32


@dataclass(frozen=True)
class Head:
    """Hidden states to next-token logits."""

    norm: nn.Module
    weight: Tensor
    """[vocabulary, d], 16-bit"""

    @property
    def rows_at_once(self) -> int:
        """Rows of hidden states for one call of `logits`, so that its result stays below 256 MiB."""
        return max(1, _LOGITS_BYTES // (4 * self.weight.shape[0]))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] to [..., vocabulary] float32.

        Raises:
            ValueError: one of them is not finite.
        """
        states = self.norm(hidden)
        if states.dtype == self.weight.dtype:
            return _finite_logits(nn.functional.linear(states, self.weight).float())
        # In float32 the head of a large model would be the largest thing in memory: converted part by part.
        logits = torch.empty(*states.shape[:-1], self.weight.shape[0], dtype=torch.float32, device=states.device)
        rows = max(1, _HEAD_PART_BYTES // (self.weight.shape[1] * states.dtype.itemsize))
        for start in range(0, self.weight.shape[0], rows):
            part = self.weight[start : start + rows].to(states.dtype)
            logits[..., start : start + rows] = nn.functional.linear(states, part)
        return _finite_logits(logits)


def _finite_logits(logits: Tensor) -> Tensor:
    """The same logits, if all of them are numbers."""
    if torch.isfinite(logits).all():
        return logits
    raise ValueError(
        "lm_head gives logits that are not finite: the final norm or the head of this model is damaged, or its dtype "
        "overflows on this task; check the checkpoint, or use one in bfloat16"
    )


def replace_weight(matrix: nn.Linear, weight: Tensor) -> None:
    """Put another weight into a matrix, on its device and in its dtype.

    Args:
        matrix: of a loaded block.
        weight: [N, K].
    """
    weight = weight.to(device=matrix.weight.device, dtype=matrix.weight.dtype)
    matrix.weight = nn.Parameter(weight, requires_grad=False)


def matrices_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The weight matrices of a block by their name inside it (`self_attn.q_proj`)."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
