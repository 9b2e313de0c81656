"""Walks a model block by block: the one pass that scoring and quantizing share.

Only one transformer block's weights are in memory at a time. They are read from the safetensors files into a
skeleton of Hugging Face modules on the meta device and given back afterwards; the hidden states of the calibration
batches are carried from block to block. A model larger than memory is walked like a small one.

Batches are padded on the right. Under causal attention no real token sees the padding, so no mask is needed and
statistics only have to leave the padded positions out. Works for the architectures in `model_files.ARCHITECTURES`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taq_vllm.hidden_states import HiddenStates
from taq_vllm.model_files import ModelFiles
from taq_vllm.tasks import TokenizedExample


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
    """

    def __init__(self, files: ModelFiles, device: str = "cpu") -> None:
        """Build the skeleton; loads no weight.

        Raises:
            ValueError: an architecture that is not supported, or a checkpoint that is already quantized.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        files.check_plannable()
        self.files = files
        self.device = torch.device(device)
        self.config = AutoConfig.from_pretrained(files.path)
        self.dtype = self.config.dtype if self.config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        self.compute_dtype = _compute_dtype(self.device, self.dtype)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                self.config, dtype=self.compute_dtype, attn_implementation="sdpa"
            )
        self._decoder = skeleton.model.eval().requires_grad_(False)
        # Its buffers are computed, not stored: build it again off the meta device.
        self._rotary = type(self._decoder.rotary_emb)(config=self.config).to(self.device)
        self._positions: dict[tuple[int, int, bool], dict[str, Any]] = {}

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self._decoder.layers)

    @torch.inference_mode()
    def embed(self, batches: Sequence[Batch]) -> HiddenStates:
        """Hidden states entering the first block."""
        # The one tensor that can be larger than blocks: kept in 16 bits, only what is looked up is converted.
        with self._loaded(self._decoder.embed_tokens, "model.embed_tokens.", self.dtype) as embedding:
            return HiddenStates(embedding(batch.input_ids.to(self.device)).to(self.compute_dtype) for batch in batches)

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
        """One block on one batch: [B, T, d] to [B, T, d]."""
        return self.run_with_gradient(layer, block, hidden)

    def run_with_gradient(self, layer: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """`run`, recorded for a backward pass where `hidden` or the block's weights ask for a gradient."""
        sliding = getattr(self.config, "sliding_window", None) is not None
        if layer_types := getattr(self.config, "layer_types", None):
            sliding = layer_types[layer] == "sliding_attention"
        # Masks and rotary embeddings depend on the batch's shape alone: all blocks of a kind share them.
        kind = (*hidden.shape[:2], sliding)
        if kind not in self._positions:
            self._positions[kind] = self._position_arguments(hidden, sliding)
        return block(hidden, **self._positions[kind])

    def _position_arguments(self, hidden: Tensor, sliding: bool) -> dict[str, Any]:
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        make_mask = create_sliding_window_causal_mask if sliding else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return {
            "attention_mask": mask,
            "position_ids": positions,
            "position_embeddings": self._rotary(hidden, positions),
        }

    @contextmanager
    def head(self) -> Iterator["Head"]:
        """The final norm and the language-model head, loaded."""
        name = "lm_head.weight" if "lm_head.weight" in self.files.tensors else "model.embed_tokens.weight"
        with self._loaded(self._decoder.norm, "model.norm.") as norm:
            yield Head(norm, self._read(name))

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> Iterator[nn.Module]:
        expected = module.state_dict()
        state = {name: self._read(prefix + name, dtype) for name in expected}
        for name, tensor in state.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(
                    f"{self.files.path} holds {prefix}{name} as {tuple(tensor.shape)}, its config.json asks for "
                    f"{tuple(expected[name].shape)}: config and weights are not of one model"
                )
        module.load_state_dict(state, assign=True)
        try:
            yield module
        finally:
            module.to("meta")

    def _read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.files.read(name).to(device=self.device, dtype=dtype or self.compute_dtype)


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
    """[vocabulary, d]"""

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] to [..., vocabulary] float32."""
        return nn.functional.linear(self.norm(hidden), self.weight).float()


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
