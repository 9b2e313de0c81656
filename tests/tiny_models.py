"""Small random checkpoints of the real architectures, made by transformers itself."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAB_MODEL = Path(__file__).parents[1] / "benchmarks" / "lab" / "model"

_COMMON = {
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ARCHITECTURES = {
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 64,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 64,
    },
    "llama": {},
    "mistral": {"sliding_window": 24},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}


def make_tiny(model_type: str, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides) -> Path:
    """A random checkpoint with the lab model's tokenizer.

    Weights are drawn larger than transformers' default, so that layers matter and quantizing changes outputs.
    """
    config = AutoConfig.for_model(model_type, **(_COMMON | ARCHITECTURES[model_type] | overrides))
    config.dtype = dtype
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # the experts of a block are one tensor of three
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LAB_MODEL / name, folder / name)
    return folder
