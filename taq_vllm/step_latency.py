"""How long a decode step of the 16-bit model takes in vLLM, for latency budgets.

A budget in milliseconds adds up the measured times of matrices; attention, norms, sampling and the engine's own Python
come on top, and only the engine can tell what they take. Its offline engine decodes a batch of M sequences of random
tokens to two lengths; the difference of the two times over the difference of the lengths is a step, without prefill and
without what happens once. The shortest of a few repetitions counts on a CPU, where other work only ever adds, and the
median on a GPU.

The engine runs in a process of its own (`python -m taq_vllm.step_latency`), so that nothing of it stays behind, and its
scheduler in that same process, so that the number of threads is known.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from taq_vllm.budget import Latencies, Shapes, step_rest_us
from taq_vllm.memory import available_share
from taq_vllm.model_files import ModelFiles

PROMPT_TOKENS = 8
SHORT, LONG = 8, 40
"""Tokens to generate: a step is (time of LONG - time of SHORT) / 32."""
REPEATS = 5

_MEMORY_OF_FREE = 0.8


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        batch: sequences that are decoded together.
        us: microseconds of a step.
        threads: of the engine on a CPU; 0 on a GPU.
    """

    batch: int
    us: float
    threads: int


def measure_steps(files: ModelFiles, batches: Sequence[int], device: str, enforce_eager: bool = False) -> list[Step]:
    """Time decode steps of a 16-bit model in an engine of their own.

    Args:
        files: the model.
        batches: sequences per step.
        device: `cpu` or `cuda`, what the engine will find.
        enforce_eager: do not compile; starts faster, and is slower.

    Raises:
        ValueError: a model that vLLM cannot start, with the last line that it said.
    """
    files.check_plannable()
    needed = PROMPT_TOKENS + LONG + 1
    longest = files.config.get("max_position_embeddings") or needed
    if longest < needed:
        raise ValueError(f"{files.id} has a context of {longest} tokens; a step is measured over {needed}")
    request = {
        "model": str(files.path),
        "batches": list(batches),
        "vocabulary": next(iter(files.head.values()))[0],
        "max_model_len": needed,
        "cpu": device == "cpu",
        "enforce_eager": enforce_eager,
    }
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    run = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        said = [line for line in run.stderr.strip().splitlines() if line.strip()]
        raise ValueError(f"vLLM could not decode with {files.path}: {said[-1] if said else 'it said nothing'}")
    return [Step(**record) for record in json.loads(lines[-1])]


def rest_of(step: Step, latencies: Latencies, files: ModelFiles) -> float:
    """Microseconds that a step has beside the model's matrices and head.

    Raises:
        ValueError: matrices that were not measured, or measured with another number of threads.
    """
    if step.threads != latencies.threads:
        raise ValueError(
            f"the engine decoded with {step.threads} threads, and {latencies.source} has latencies for "
            f"{latencies.threads}: run `taq tune` with OMP_NUM_THREADS={step.threads}"
        )
    return step_rest_us(latencies, Shapes.of_files(files, head=False), step.us, step.batch)


def free_memory() -> float:
    """Share of this machine's memory that is available: vLLM refuses to start on a CPU with more than that."""
    return available_share()


def _main() -> None:
    """Read a request from stdin, measure, and print a line of JSON last."""
    request = json.loads(sys.stdin.read())
    import torch
    from vllm import LLM, SamplingParams

    most = max(request["batches"])
    llm = LLM(
        request["model"],
        max_model_len=request["max_model_len"],
        max_num_seqs=most,
        max_num_batched_tokens=max(most * PROMPT_TOKENS, request["max_model_len"]),
        enforce_eager=request["enforce_eager"],
        enable_prefix_caching=False,
        **({"gpu_memory_utilization": _MEMORY_OF_FREE * free_memory()} if request["cpu"] else {}),
        use_tqdm_on_load=False,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    steps = []
    for batch in request["batches"]:
        drawn = torch.randint(request["vocabulary"], (batch, PROMPT_TOKENS), generator=generator)
        prompts = [{"prompt_token_ids": tokens} for tokens in drawn.tolist()]

        def seconds(length: int, prompts: list[dict] = prompts) -> float:
            parameters = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            return time.perf_counter() - start

        seconds(SHORT)  # what happens once
        times = [(seconds(SHORT), seconds(LONG)) for _ in range(REPEATS)]
        short, long = (min(each) if request["cpu"] else statistics.median(each) for each in zip(*times, strict=True))
        threads = torch.get_num_threads() if request["cpu"] else 0
        steps.append({"batch": batch, "us": round(1e6 * (long - short) / (LONG - SHORT), 3), "threads": threads})
    print(json.dumps(steps), flush=True)


if __name__ == "__main__":
    _main()
