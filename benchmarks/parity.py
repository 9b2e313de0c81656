"""Do served logits equal those of transformers? The same checkpoint, several ways to serve it, one yardstick.

Transformers loads the checkpoint through compressed-tensors, without this project, in a process of its own. The plugin
serves it eagerly, compiled, over two tensor-parallel ranks and by `vllm serve` over HTTP. The yardstick is stock vLLM
serving the *same weights*, dequantized to bf16 into a plain checkpoint: what it differs from transformers is the noise
of bf16 kernels adding in another order. Compared are the log-probabilities of every prompt token of 100 prompts, and
greedy texts: where two differ, the gap between the two most likely tokens at that place must lie within the noise.

    python -m benchmarks.parity --out benchmarks/results/parity-cpu.jsonl

With `--peers DIR`, checkpoints that another tool wrote (benchmarks/peers/) are served by the plugin and compared with
transformers in the same way, and where stock vLLM can serve them too, with stock vLLM.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.server import vllm_serve

LAB = Path(__file__).parent / "lab"
TASKS = ("trivia", "math", "code")
MAX_NEW_TOKENS = 48
BUDGET = "7bits"
MIXED_LAYER = ("layers.3.self_attn.q_proj=4", "layers.3.self_attn.k_proj=8", "layers.3.self_attn.v_proj=16")

WAYS: dict[str, dict[str, Any]] = {
    "plugin, eager": {"checkpoint": "taq", "engine": {"quantization": "taq", "enforce_eager": True}},
    "plugin, compiled": {"checkpoint": "taq", "engine": {"quantization": "taq"}},
    "plugin, tensor parallel 2": {
        "checkpoint": "taq",
        "engine": {"quantization": "taq", "enforce_eager": True, "tensor_parallel_size": 2},
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    },
    "plugin, vllm serve over HTTP": {"checkpoint": "taq", "http": ["--quantization", "taq", "--enforce-eager"]},
    "plugin, quantized while loading": {
        "checkpoint": "online",
        "engine": {"quantization": "taq", "enforce_eager": True},
    },
    "stock vLLM, dequantized weights": {
        "checkpoint": "dequantized",
        "engine": {"enforce_eager": True},
        "env": {"VLLM_PLUGINS": ""},
    },
}

YARDSTICK = "stock vLLM, dequantized weights"
MOST_TIMES_STOCK = 1.2  # a plugin's distance to transformers, in yardsticks
STOCK_SERVES = ("w4a16", "w4a16-asym")  # of the peers' checkpoints; stock vLLM has no 8-bit kernel on a CPU


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """The plain lab model's mixed checkpoint, the plain model with the plan beside it, and a dequantized copy."""
    import shutil

    from safetensors.torch import load_file, save_file

    from taq_vllm.allocate import Request, allocate
    from taq_vllm.checkpoint import Calibration, quantize_model
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.plan import PLAN_FILE
    from taq_vllm.quantizer import quantize
    from taq_vllm.scoring import baseline

    files = ModelFiles(LAB / "model")
    plan = allocate(files, baseline(files, "random"), Request(BUDGET, pins=MIXED_LAYER))
    paths = {name: folder / name for name in ("taq", "online", "dequantized")}
    if not paths["taq"].exists():
        quantize_model(files, plan, paths["taq"], Calibration(method="rtn"))
    for name in ("online", "dequantized"):
        shutil.copytree(LAB / "model", paths[name], dirs_exist_ok=True)
    plan.save(paths["online"] / PLAN_FILE)
    tensors = load_file(LAB / "model" / "model.safetensors")
    for name, entry in plan.matrices.items():
        if entry.bits < 16:
            key = f"{name}.weight"
            tensors[key] = quantize(tensors[key], entry.bits, entry.symmetric).dequantize()
    save_file(tensors, paths["dequantized"] / "model.safetensors", metadata={"format": "pt"})
    return paths


def make_prompts(count: int) -> list[dict[str, list[int]]]:
    """Token ids of test questions alone (`question`) and with their answers (`whole`), the three tasks in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB / "model")
    items = [
        [json.loads(line) for line in (LAB / "tasks" / task / "test.jsonl").read_text().splitlines()] for task in TASKS
    ]
    chosen = [items[i % 3][i // 3] for i in range(count)]
    return [
        {
            "question": tokenizer(item["prompt"]).input_ids,
            "whole": tokenizer(item["prompt"]).input_ids
            + tokenizer(item["completion"], add_special_tokens=False).input_ids,
        }
        for item in chosen
    ]


def run_transformers(checkpoint: Path, prompts: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """Log-probabilities and greedy tokens by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt["whole"]])
        with torch.inference_mode():
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            generated = model.generate(
                torch.tensor([prompt["question"]]),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        gaps = [s[0].float().topk(2).values.diff().abs().item() for s in generated.scores]
        results.append(
            {
                "logprobs": logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist(),
                "greedy": generated.sequences[0, len(prompt["question"]) :].tolist(),
                "gaps": gaps,
            }
        )
    assert not [m for m in sys.modules if m.startswith(("taq_", "vllm"))], "transformers must stand alone here"
    return results


def run_engine(checkpoint: Path, prompts: list[dict[str, list[int]]], engine: dict[str, Any]) -> list[dict[str, Any]]:
    """The same from vLLM's offline engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(checkpoint), max_model_len=512, seed=0, **engine)
    scored = llm.generate(
        [{"prompt_token_ids": p["whole"]} for p in prompts],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    generated = llm.generate(
        [{"prompt_token_ids": p["question"]} for p in prompts],
        SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS),
        use_tqdm=False,
    )
    return [
        {
            "logprobs": [at[token].logprob for at, token in zip(s.prompt_logprobs[1:], p["whole"][1:], strict=True)],
            "greedy": list(g.outputs[0].token_ids),
        }
        for p, s, g in zip(prompts, scored, generated, strict=True)
    ]


def run_http(checkpoint: Path, prompts: list[dict[str, list[int]]], arguments: list[str]) -> list[dict[str, Any]]:
    """The same from `vllm serve`, asked with the openai client."""
    results = []
    with vllm_serve(checkpoint, [*arguments, "--max-model-len", "512"]) as client:
        for prompt in prompts:
            scored = client.completions.create(
                model=str(checkpoint),
                prompt=prompt["whole"],
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": 0},
            )
            generated = client.completions.create(
                model=str(checkpoint),
                prompt=prompt["question"],
                max_tokens=MAX_NEW_TOKENS,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            places = zip(scored.choices[0].prompt_logprobs[1:], prompt["whole"][1:], strict=True)
            results.append(
                {
                    "logprobs": [at[str(token)]["logprob"] for at, token in places],
                    "greedy": generated.choices[0].token_ids,
                }
            )
    return results


def compare(found: list[dict[str, Any]], reference: list[dict[str, Any]], noise: float | None = None) -> dict[str, Any]:
    """Distance of log-probabilities in nats, and greedy texts token by token up to the first difference.

    Args:
        found: one way's results.
        reference: transformers' results, with the gap between its two most likely tokens at every place.
        noise: the largest gap at which a differing token is put down to noise: the largest difference of a
            log-probability that the yardstick shows.
    """
    differences = [
        abs(a - b)
        for f, r in zip(found, reference, strict=True)
        for a, b in zip(f["logprobs"], r["logprobs"], strict=True)
    ]
    flips = []
    for one, other in zip(found, reference, strict=True):
        places = zip_longest(one["greedy"], other["greedy"])  # a text that ends earlier differs there
        place = next((i for i, (a, b) in enumerate(places) if a != b), None)
        if place is not None:
            flips.append(other["gaps"][min(place, len(other["gaps"]) - 1)])
    return {
        "prompts": len(found),
        "tokens": len(differences),
        "mean_abs_logprob_difference": sum(differences) / len(differences),
        "max_abs_logprob_difference": max(differences),
        "texts_equal": len(found) - len(flips),
        "flips_within_noise": None if noise is None else sum(gap <= noise for gap in flips),
        "largest_gap_at_a_flip": max(flips, default=0.0),
    }


def requirements(lines: list[dict[str, Any]]) -> list[str]:
    """What must hold of the plugin's lines and does not."""
    missed = []
    for line in lines:
        if "plugin" not in line["way"]:
            continue
        if line["ratio_to_stock"] > MOST_TIMES_STOCK:
            missed.append(f"MISSES: {line['way']}: {line['ratio_to_stock']:.2f}x of the yardstick")
        if line["flips_within_noise"] < line["prompts"] - line["texts_equal"]:
            missed.append(
                f"MISSES: {line['way']}: a text differs where the likeliest two tokens are further apart than noise"
            )
    return missed


def _compare_peer(checkpoint: Path, prompts: list[dict[str, list[int]]], noise: float) -> list[dict[str, Any]]:
    """Another tool's checkpoint: the plugin against transformers, and against stock vLLM where that serves it."""
    call = {"checkpoint": str(checkpoint), "prompts": prompts}
    reference = _in_a_process(call, {})
    engine = {"enforce_eager": True}
    served = _in_a_process(call | {"engine": engine | {"quantization": "taq"}}, {})
    lines = [{"way": f"peer {checkpoint.name}: plugin", **compare(served, reference, noise)}]
    if checkpoint.name in STOCK_SERVES:
        stock = _in_a_process(call | {"engine": engine}, {"VLLM_PLUGINS": ""})
        lines.append({"way": f"peer {checkpoint.name}: stock vLLM", **compare(stock, reference, noise)})
        equal = sum(a["greedy"] == b["greedy"] for a, b in zip(served, stock, strict=True))
        lines[0]["texts_equal_to_stock"] = equal
    return lines


def _in_a_process(call: dict[str, Any], env: dict[str, str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps(call))
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"} | env
        subprocess.run(
            [sys.executable, "-m", "benchmarks.parity", "--worker", str(request), str(answer)],
            check=True,
            env=environment,
        )
        return json.loads(answer.read_text())


def _work(request: Path, answer: Path) -> None:
    call = json.loads(request.read_text())
    checkpoint, prompts = Path(call["checkpoint"]), call["prompts"]
    if "engine" in call:
        result = run_engine(checkpoint, prompts, call["engine"])
    elif "http" in call:
        result = run_http(checkpoint, prompts, call["http"])
    else:
        result = run_transformers(checkpoint, prompts)
    answer.write_text(json.dumps(result))


def main() -> None:
    """Run all ways, print the table, write one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity-cpu.jsonl"))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--only", action="append", choices=list(WAYS), help="ways to run, besides the yardstick")
    parser.add_argument("--peers", type=Path, help="folder of checkpoints by benchmarks/peers")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(*arguments.worker)
        return
    from rich.console import Console
    from rich.table import Table

    from benchmarks.provenance import provenance
    from taq_vllm.plan import write_atomically

    with tempfile.TemporaryDirectory() as folder:
        paths = make_checkpoints(Path(folder))
        prompts = make_prompts(arguments.prompts)
        reference = _in_a_process({"checkpoint": str(paths["taq"]), "prompts": prompts}, {})
        ways = [YARDSTICK] + [w for w in WAYS if w != YARDSTICK and (not arguments.only or w in arguments.only)]
        results = {}
        for way in ways:
            spec = WAYS[way]
            call = {"checkpoint": str(paths[spec["checkpoint"]]), "prompts": prompts}
            call |= {key: spec[key] for key in ("engine", "http") if key in spec}
            results[way] = _in_a_process(call, spec.get("env", {}))
        noise = compare(results[YARDSTICK], reference)["max_abs_logprob_difference"]
        lines = [{"way": way, **compare(found, reference, noise)} for way, found in results.items()]
        for checkpoint in sorted(arguments.peers.iterdir()) if arguments.peers else []:
            lines += _compare_peer(checkpoint, prompts, noise)
    for line in lines:
        line["ratio_to_stock"] = line["mean_abs_logprob_difference"] / lines[0]["mean_abs_logprob_difference"]
    table = Table(title="distance to transformers, lab model (plain), mixed plan")
    for column in ("way", "mean |dlogp|", "x stock", "max", "texts equal", "other texts: within noise"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for line in lines:
        other = line["prompts"] - line["texts_equal"]
        to_stock = f", {line['texts_equal_to_stock']} equal stock vLLM's" if "texts_equal_to_stock" in line else ""
        table.add_row(
            line["way"],
            f"{line['mean_abs_logprob_difference']:.4f}",
            f"{line['ratio_to_stock']:.2f}",
            f"{line['max_abs_logprob_difference']:.3f}",
            f"{line['texts_equal']}/{line['prompts']}{to_stock}",
            f"{line['flips_within_noise']}/{other}",
        )
    console = Console(width=120, highlight=False)
    console.print(table)
    stamp = provenance()
    text = "".join(json.dumps({"benchmark": "parity", **line, **stamp}) + "\n" for line in lines)
    write_atomically(arguments.out, text)
    missed = requirements(lines)
    for sentence in missed or [f"holds: every way is within {MOST_TIMES_STOCK}x of the yardstick, texts within noise"]:
        console.print(sentence)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
