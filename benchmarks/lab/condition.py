"""Gives the lab model's weights the uneven channels of a large language model, without changing its function.

A small model trained from nothing has channels of similar size, so 4-bit rounding costs it almost nothing. Large
models have a few channels far larger than the rest of their group. `condition` moves power-of-two scales
s = 2^round(N(0, sigma)), |log2 s| <= 4, across pairs of neighbouring weights whose product does not notice:

    input norm  * a     columns of q, k, v   / a
    middle norm * b     columns of gate, up  / b
    rows of up  * t     columns of down      / t
    rows of v   * u     columns of o         / u   (u repeated for the query heads that share a key-value head)

A power of two only shifts exponents, so every bf16 product and sum is the same up to that shift and the logits are
equal bit for bit; `check_same_function` proves it on prompts. This conditioning is artificial, and scaling methods
such as AWQ or SmoothQuant can undo it exactly: a win of such a method on this model shows nothing.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

LAB = Path(__file__).parent
MODEL = LAB / "model"
TASKS = tuple(LAB / "tasks" / name / "task.yaml" for name in ("trivia", "math", "code"))
RECORD = "conditioning.json"


def condition(
    model_dir: str | Path,
    out_dir: str | Path,
    sigma: float = 1.0,
    seed: int = 0,
) -> Path:
    """Writes a conditioned copy of a Qwen3 checkpoint; does nothing if `out_dir` already holds that very copy.

    Args:
        model_dir: Folder with config.json and one untied bf16 model.safetensors; its other files are copied.
        out_dir: Folder to create. It appears complete or not at all.
        sigma: Standard deviation of log2 of the channel scales before rounding to whole powers, at least 0.
        seed: Of the generator that draws the scales, layer by layer: a, b, t, u.

    Returns:
        `out_dir`.

    Raises:
        ValueError: Another architecture, tied embeddings, biases, sharded weights, a scale that bf16 cannot hold
            exactly, a negative sigma, or an `out_dir` that holds something else.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if not sigma >= 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    config = _supported_config(model_dir)
    weights_file = model_dir / "model.safetensors"
    record = {
        "version": 1,
        "sigma": float(sigma),
        "seed": seed,
        "source_sha256": sha256(weights_file.read_bytes()).hexdigest(),
    }
    if out_dir.exists():
        _expect_record(out_dir, record)
        return out_dir

    tensors = load_file(weights_file)
    _rescale(tensors, config, sigma, torch.Generator().manual_seed(seed))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model_dir, partial, ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    os.rename(partial, out_dir)
    return out_dir


def check_same_function(
    plain_dir: str | Path,
    conditioned_dir: str | Path,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
) -> int:
    """Raises unless two checkpoints give bit-equal bf16 logits in transformers, over prompts and greedy answers.

    Both models answer all prompts greedily in one left-padded batch; the logits of every generated token are
    compared, then those of every prompt position from a forward pass without a cache.

    Args:
        plain_dir: The checkpoint that `condition` read.
        conditioned_dir: The checkpoint that it wrote; the tokenizer is read from `plain_dir`.
        prompts: At least one text, used verbatim.
        max_new_tokens: Length of the greedy answers; those that end earlier are not compared beyond their end.

    Returns:
        The number of logit vectors that were compared, all of them equal.

    Raises:
        ValueError: No prompts, or a difference; names the prompt, the position and the size of the difference.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not prompts:
        raise ValueError("check_same_function needs at least one prompt, got none")
    tokenizer = AutoTokenizer.from_pretrained(plain_dir, padding_side="left")
    plain, conditioned = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for folder in (plain_dir, conditioned_dir)
    )
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    with torch.inference_mode(), _one_thread():
        compared = _expect_equal(
            plain(**inputs).logits, conditioned(**inputs).logits, inputs["attention_mask"].bool(), prompts
        )
        plain_answers, conditioned_answers = (
            model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for model in (plain, conditioned)
        )
    if not torch.equal(plain_answers.sequences, conditioned_answers.sequences):
        raise ValueError(
            f"{conditioned_dir}: the greedy answers differ from those of {plain_dir}; "
            "it is not a conditioned copy of that checkpoint: make it again with `condition`"
        )
    answers = plain_answers.sequences[:, inputs["input_ids"].shape[1] :]
    is_end = answers == tokenizer.eos_token_id
    not_past_end = is_end.cumsum(dim=1) - is_end.long() == 0
    return compared + _expect_equal(
        torch.stack(plain_answers.logits, dim=1),
        torch.stack(conditioned_answers.logits, dim=1),
        not_past_end,
        prompts,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """A second thread is no gain on matrices this small, and on a busy machine it made decoding ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _expect_equal(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, prompts: Sequence[str]) -> int:
    """Compares logits a, b [B, T, vocabulary] bit for bit where mask [B, T]; returns how many vectors that are."""
    differs = (a != b).any(dim=-1) & mask
    if differs.any():
        row, position = differs.nonzero()[0].tolist()
        gap = (a[row, position].float() - b[row, position].float()).abs().max().item()
        raise ValueError(
            f"prompt {row} ({prompts[row][:60]!r}): the logits at position {position} differ by up to {gap:.4g}; "
            "allowed is no difference: the second checkpoint is not a conditioned copy of the first"
        )
    return int(mask.sum())


def _supported_config(model_dir: Path) -> dict:
    """The config as a dict, or ValueError where the rescaling would not preserve the function."""
    config_file = model_dir / "config.json"
    if not config_file.is_file() or not (model_dir / "model.safetensors").is_file():
        raise ValueError(f"{model_dir}: needs config.json and one unsharded model.safetensors; is the path right?")
    config = json.loads(config_file.read_text())
    required = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False, "attention_bias": False}
    for field, allowed in required.items():
        if config.get(field) != allowed:
            raise ValueError(
                f"{config_file}: {field} is {config.get(field)!r}, allowed is {allowed!r}; "
                "conditioning is written for the lab model's architecture"
            )
    return config


def _expect_record(out_dir: Path, record: dict) -> None:
    """Raises unless `out_dir` is the finished result that `record` describes."""
    record_file = out_dir / RECORD
    found = json.loads(record_file.read_text()) if record_file.is_file() else None
    if found != record:
        raise ValueError(
            f"{out_dir} exists and is not this conditioning (found {found}, asked {record}); "
            "remove it or choose another folder"
        )


def _rescale(tensors: dict[str, torch.Tensor], config: dict, sigma: float, generator: torch.Generator) -> None:
    """Moves power-of-two scales between neighbouring weights of every layer, in place of the tensors in the dict."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]

    def scales(n: int) -> torch.Tensor:
        return torch.exp2((torch.randn(n, generator=generator) * sigma).round().clamp(-4, 4))

    def multiply(name: str, factor: torch.Tensor) -> None:
        before = tensors[f"{name}.weight"]
        after = (before.float() * factor).to(before.dtype)
        if not torch.equal(after.float() / factor, before.float()):
            raise ValueError(f"{name}.weight: {before.dtype} cannot hold the rescaled values exactly")
        tensors[f"{name}.weight"] = after

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        # The order of the four draws is part of the published variant: another order is another model.
        a, b = scales(config["hidden_size"]), scales(config["hidden_size"])
        t, u = scales(config["intermediate_size"]), scales(kv_heads * head_dim)

        multiply(f"{layer}.input_layernorm", a)
        for projection in ("q_proj", "k_proj", "v_proj"):
            multiply(f"{layer}.self_attn.{projection}", 1 / a)
        multiply(f"{layer}.post_attention_layernorm", b)
        for projection in ("gate_proj", "up_proj"):
            multiply(f"{layer}.mlp.{projection}", 1 / b)

        multiply(f"{layer}.mlp.up_proj", t[:, None])
        multiply(f"{layer}.mlp.down_proj", 1 / t)
        multiply(f"{layer}.self_attn.v_proj", u[:, None])
        u_per_query_head = u.view(kv_heads, head_dim).repeat_interleave(heads // kv_heads, dim=0).flatten()
        multiply(f"{layer}.self_attn.o_proj", 1 / u_per_query_head)


def _sample_prompts(per_task: int) -> list[str]:
    """The first test prompts of each lab task."""
    prompts = []
    for task in TASKS:
        lines = (task.parent / "test.jsonl").read_text().splitlines()
        prompts += [json.loads(line)["prompt"] for line in lines[:per_task]]
    return prompts


def main(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    model: Annotated[Path, typer.Option(help="Plain checkpoint.")] = MODEL,
    sigma: Annotated[float, typer.Option(help="Spread of the channel scales, in powers of two.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the scales.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Compare logits and greedy answers with the plain model's.")
    ] = False,
) -> None:
    """Write a conditioned copy of the lab model."""
    console = Console()
    try:
        condition(model, out, sigma, seed)
        console.print(f"conditioned at sigma {sigma:g}, seed {seed}: {out}")
        if check:
            prompts = _sample_prompts(per_task=4)
            compared = check_same_function(model, out, prompts)
            console.print(f"{len(prompts)} prompts, {compared} logit vectors: equal bit for bit")
    except ValueError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
