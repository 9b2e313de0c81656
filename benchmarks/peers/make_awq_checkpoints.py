"""Writes the paper's two baselines with llm-compressor: AWQ with mixed calibration, and AWQ with the task's own.

    make peers-llmcompressor
    .venv-llmcompressor/bin/python benchmarks/peers/make_awq_checkpoints.py MODEL OUT_DIR --tasks TASKS_DIR

`awq-mixed` reads equal shares of the calibration sets of math, trivia and code (arXiv 2511.06516, section 4.1),
`awq-ot-TASK` the task's alone, each example completed by its reference answer. By default that is the first 128 of a
task's 512 examples, and for `awq-mixed` the first 42 of each task's, 126 in all.
Weights have 4 bits, asymmetric, in groups of 128 (the preset W4A16_ASYM), every linear but the head, and AWQ's own
defaults. What is written is compressed-tensors' pack-quantized format, which vLLM serves as it is. A folder appears
under its name only when it is whole; one that is there is left as it is.

TASKS_DIR holds `TASK/calibration.jsonl` with `prompt` and `completion`; this script runs in an environment without
taq-vllm.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

TASKS = ("math", "trivia", "code")
NAMES = ("awq-mixed", *(f"awq-ot-{task}" for task in TASKS))
MOST_TOKENS = 512


def texts_of(name: str, tasks_dir: Path, examples: int) -> list[str]:
    """The calibration texts of one checkpoint: at most `examples`, as many of every task that it reads, the first."""
    tasks = TASKS if name == "awq-mixed" else (name.removeprefix("awq-ot-"),)
    texts = []
    for task in tasks:
        lines = (tasks_dir / task / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines[: examples // len(tasks)]]
        texts += [item["prompt"] + item["completion"] for item in items]
    return texts


def write_checkpoint(model_dir: Path, out: Path, texts: list[str]) -> None:
    """Quantizes the model at `model_dir` with AWQ on `texts` and saves it to `out`, with its tokenizer."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        # 0.14 pins activations for faster copies to a GPU, and torch has no pinned memory where there is none.
        IntermediatesCache.pin_memory = lambda *arguments: None
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    end = [tokenizer.eos_token_id]
    ids = [(tokenizer(text).input_ids + end)[:MOST_TOKENS] for text in texts]
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=[AWQModifier(), QuantizationModifier(ignore=["lm_head"], scheme="W4A16_ASYM", targets=["Linear"])],
        num_calibration_samples=len(rows),
        max_seq_length=MOST_TOKENS,
    )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_compressed=True)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def main() -> int:
    """Reads the arguments and writes what is missing; 2 if MODEL is no model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a local 16-bit model")
    parser.add_argument("out_dir", type=Path, help="folder that gets one folder per checkpoint")
    parser.add_argument(
        "--tasks", type=Path, default=Path("benchmarks/lab/tasks"), help="folder of the calibration sets"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=128,
        help="calibration examples of every checkpoint, of awq-mixed the whole part of a third per task",
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the checkpoints")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        print(f"MODEL: no config.json in {options.model}; give the folder of a local model", file=sys.stderr)
        return 2
    options.out_dir.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        out = options.out_dir / name
        if out.exists():
            print(f"{out} is there, left as it is")
            continue
        write_checkpoint(options.model, out, texts_of(name, options.tasks, options.examples))
        print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
