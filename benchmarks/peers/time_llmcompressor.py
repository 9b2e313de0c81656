"""Times one quantizer of llm-compressor on a model and calibration tokens; `benchmarks/quantizers.py --peer` runs it.

    make peers-llmcompressor
    .venv-llmcompressor/bin/python benchmarks/peers/time_llmcompressor.py METHOD MODEL TOKENS.json --bits 4

METHOD is this project's name, and what is timed is its counterpart: every linear but the head, group 128, asymmetric,
settings as llm-compressor has them (AutoRound without torch.compile and with as many iterations as `learned` has steps,
as on the other side), until all codes are packed in memory. The model is loaded before the clock starts, nothing is
written. The last line of the output is JSON: seconds, CPU seconds, version, AutoRound's iterations.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

COUNTERPARTS = {
    "rtn": "QuantizationModifier",
    "clip": "QuantizationModifier, imatrix_mse",
    "gptq": "GPTQModifier",
    "awq": "AWQModifier",
    "learned": "AutoRoundModifier",
}
BATCH = 8
TOKENIZER = Path(__file__).parents[1] / "lab" / "model"


def recipe_of(method: str, bits: int, iterations: int) -> list[Any]:
    """The modifiers that do what a method of this project does."""
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    if method == "clip":  # the search that weights errors by E[x^2], as `clip` does
        weights["observer"] = "imatrix_mse"
    targets = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**targets)]
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(**targets)]
    if method == "learned":
        return [AutoRoundModifier(**targets, enable_torch_compile=False, batch_size=BATCH, iters=iterations)]
    return [QuantizationModifier(**targets)]


def main() -> None:
    """Reads the arguments, times once and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=COUNTERPARTS)
    parser.add_argument("model", type=Path, help="folder of a local model")
    parser.add_argument("tokens", type=Path, help="JSON: a list of token id lists")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    options = parser.parse_args()

    import torch
    from compressed_tensors.compressors import ModelCompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():
        # 0.14 pins activations for faster copies to a GPU, and torch has no pinned memory where there is none.
        IntermediatesCache.pin_memory = lambda *arguments: None
    torch.set_num_threads(1)
    ids = json.loads(options.tokens.read_text())
    rows = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    recipe = recipe_of(options.method, options.bits, options.iterations)
    started, cpu_started = time.perf_counter(), time.process_time()
    if options.method == "rtn":
        oneshot(model=model, recipe=recipe, pipeline="datafree")
    else:
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),  # asked for, though the tokens are given
            dataset=rows,
            recipe=recipe,
            batch_size=BATCH,
            num_calibration_samples=len(ids),
            max_seq_length=max(map(len, ids)),
            shuffle_calibration_samples=False,
        )
    ModelCompressor.from_pretrained_model(model).compress_model(model)  # what `save_pretrained` does first
    answer = {
        "counterpart": COUNTERPARTS[options.method],
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "version": version("llmcompressor"),
        "iterations": options.iterations if options.method == "learned" else None,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
