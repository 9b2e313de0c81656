"""How long a decode step of the 16-bit model takes in vLLM, for latency budgets.

A budget in milliseconds adds up the measured times of matrices; attention, norms, sampling and the engine's own Python
come on top, and only the engine can tell what they take. Its offline engine decodes a batch of M sequences of random
tokens to two lengths; the difference of the two times over the difference of the lengths is a step, without prefill and
without what happens once. Sequences are short meanwhile (`CONTEXT` tokens): attention over long contexts is not in it.
The shortest of a few repetitions counts on a CPU, where other work only ever adds, and the
median on a GPU.

The engine runs in a process of its own (`python -m taq_vllm.step_latency`), so that nothing of it stays behind, and its
scheduler in that same process, so that the number of threads is known.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from taq_kernels.tune import device_name

from taq_vllm.budget import Latencies, Shapes, step_rest_us
from taq_vllm.memory import available_share
from taq_vllm.model_files import ModelFiles

PROMPT_TOKENS = 8
SHORT, LONG = 8, 40
"""Tokens to generate: a step is (time of LONG - time of SHORT) / 32."""
CONTEXT = (PROMPT_TOKENS + SHORT, PROMPT_TOKENS + LONG)
"""Tokens of a sequence, from the first step that counts to the last."""
REPEATS = 5

_MEMORY_OF_FREE = 0.8
_NEEDED = PROMPT_TOKENS + LONG + 1
_MARK = "taq step "


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        batch: sequences that are decoded together.
        us: microseconds of a step.
        threads: of the engine on a CPU; 0 on a GPU.
        device: that the engine used: the GPU's name, or `cpu`.
    """

    batch: int
    us: float
    threads: int
    device: str


def measure_steps(
    files: ModelFiles, batches: Sequence[int], device: torch.device, seconds: float = math.inf
) -> Iterator[Step]:
    """Time decode steps of a 16-bit model in an engine of their own, one batch after the other.

    A step is yielded as soon as it is measured, so that nothing is lost where a later one fails; closing the iterator
    ends the engine.

    Args:
        files: the model.
        batches: sequences per step.
        device: `cpu`, or the GPU to measure on.
        seconds: no batch is begun after so many.

    Raises:
        ValueError: a model that vLLM cannot start, with the last line that it said, or a vLLM for other devices.
    """
    files.check_plannable()
    longest = files.config.get("max_position_embeddings") or _NEEDED
    if longest < _NEEDED:
        raise ValueError(f"{files.id} has a context of {longest} tokens; a step is measured over {_NEEDED}")
    request = {
        "model": str(files.path),
        "batches": list(batches),
        "vocabulary": next(iter(files.head.values()))[0],
        "max_model_len": _NEEDED,
        "cpu": device.type == "cpu",
        "seconds": None if math.isinf(seconds) else seconds,
    }
    expected = device_name(device)
    with tempfile.TemporaryFile("w+") as errors:
        run = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(device),
        )
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended already; what it said is read below
                run.stdin.write(json.dumps(request))
                run.stdin.close()
            for line in run.stdout:
                if not line.startswith(_MARK):  # the engine prints, too
                    continue
                step = Step(**json.loads(line.removeprefix(_MARK)))
                if step.device != expected:
                    raise ValueError(f"vLLM decoded on {step.device!r}, the matrices were measured on {expected!r}")
                yield step
            if run.wait():
                errors.seek(0)
                said = [line.strip() for line in errors if line.strip()]
                reason = said[-1] if said else "it said nothing"
                raise ValueError(f"vLLM could not decode with {files.path}: {reason}")
        finally:
            run.kill()
            run.wait()
            run.stdout.close()


def _environment(device: torch.device) -> dict[str, str]:
    """Of the engine: in one process, and on a GPU with that GPU alone."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        # This process may itself see a choice of the GPUs: its numbers are places in that list.
        visible = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
        environment["CUDA_DEVICE_ORDER"] = os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    return environment


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
    """Read a request from stdin, measure, and print a marked line of JSON per batch."""
    request = json.loads(sys.stdin.read())
    stop = math.inf if request["seconds"] is None else time.monotonic() + request["seconds"]
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != request["cpu"]:
        wanted = "the CPU" if request["cpu"] else "a GPU"
        sys.exit(
            f"this vLLM is for {current_platform.device_name}, not for {wanted}: leave out --step, give --fixed-ms"
        )

    most = max(request["batches"])
    llm = LLM(
        request["model"],
        max_model_len=request["max_model_len"],
        max_num_seqs=most,
        max_num_batched_tokens=max(most * PROMPT_TOKENS, request["max_model_len"]),
        enable_prefix_caching=False,
        **({"gpu_memory_utilization": _MEMORY_OF_FREE * free_memory()} if request["cpu"] else {}),
        use_tqdm_on_load=False,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    for batch in request["batches"]:
        if time.monotonic() > stop:
            break
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
        us = round(1e6 * (long - short) / (LONG - SHORT), 3)
        device = device_name(torch.device("cpu" if request["cpu"] else "cuda"))
        print(f"\n{_MARK}{json.dumps(asdict(Step(batch, us, threads, device)))}", flush=True)


if __name__ == "__main__":
    _main()
