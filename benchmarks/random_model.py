"""Llama-shaped models with random weights: as fast and as large as real ones, and no more to download."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from taq_vllm.model_files import ModelFiles
    from taq_vllm.plan import Plan


@dataclass(frozen=True)
class Shape:
    """Sizes of the random model."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int


ONE_BILLION = Shape("llama-1.1B", 2048, 16, 8192, 32000, 32, 8)
LLAMA_8B = Shape("llama-8B", 4096, 32, 14336, 128256, 32, 8)
TINY = Shape("llama-tiny", 256, 6, 512, 512, 4, 2)

CHARACTERS_FROM = 259
"""Tokens below are three special ones and the 256 bytes, the others a character each."""


def make_model(shape: Shape, work: Path) -> Path:
    """A random model of this shape with a tokenizer in `work`, bf16, untied; one that is there is left as it is."""
    folder = work / shape.name / "bf16"
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    partial = folder.with_name(f".{folder.name}.partial")
    model = LlamaForCausalLM._from_config(config_of(shape), dtype=torch.bfloat16)
    model.lm_head.weight.data[:CHARACTERS_FROM] = 0  # never the argmax: what is generated is text
    model.save_pretrained(partial)
    make_tokenizer(shape.vocabulary, partial)
    shutil.rmtree(folder, ignore_errors=True)  # of a version that made no tokenizer
    partial.rename(folder)
    return folder


def w4a16(files: "ModelFiles") -> "Plan":
    """Uniform 4 bits, symmetric as llm-compressor's W4A16 preset; this project's default is asymmetric."""
    from taq_vllm.allocate import Request, allocate

    return allocate(files, None, Request("4.2bits", "uniform", symmetric={4: True, 8: True, 16: True}))


def quantize_cached(files: "ModelFiles", plan: "Plan", folder: Path) -> None:
    """Round a model to a plan, unless that is what the folder holds."""
    from taq_vllm.checkpoint import Calibration, quantize_model

    try:
        quantize_model(files, plan, folder, Calibration(method="rtn"))
    except ValueError:  # what is there was made of another model, plan or version of this project
        shutil.rmtree(folder)
        quantize_model(files, plan, folder, Calibration(method="rtn"))


def config_of(shape: Shape) -> "LlamaConfig":
    """The model's config.json."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer in which every token but the 256 bytes and three special ones is one rare character.

    Any token ids without special ones and bytes are a text that becomes those ids again, in every engine: what a
    benchmark of random prompts asks for.

    Args:
        vocabulary: number of tokens, at least `CHARACTERS_FROM`.
        folder: where tokenizer.json and its config go.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    assert len(tokens) == CHARACTERS_FROM
    # The planes from 2 on, without the last two code points of each, which are no characters.
    rare = (chr(point) for point in range(0x20000, 0x110000) if point & 0xFFFE != 0xFFFE)
    tokens += itertools.islice(rare, vocabulary - len(tokens))
    model = models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.init_kwargs |= {"add_bos_token": False, "add_prefix_space": False}
    fast.save_pretrained(folder)


def make_prompts(
    count: int, tokens: int, vocabulary: int, seed: int | Sequence[int], first: int = 0
) -> list[list[int]]:
    """Random token ids from `first` on: nothing here depends on what a text says."""
    import numpy

    return numpy.random.default_rng(seed).integers(first, vocabulary, (count, tokens)).tolist()
