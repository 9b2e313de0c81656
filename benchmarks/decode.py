"""How fast does a plan serve, and in how much memory, against the model as it is and stock vLLM's 4 bits?

A Llama-shaped model with random weights is served three ways: in bf16; uniform W4A16 by stock vLLM, this project's
plugin switched off; and a 5-bit plan by the plugin. Each engine lives in a process of its own, on the same cores, and
all are driven in turn, so that a slow minute of the machine falls on every one; ratios are taken within a round.
Before anything is timed, each engine's log-probabilities must be those of its own weights in transformers.

Measured are decode tokens/s at batch 1 and 8, time to the first token of a long prompt, memory after loading and the
time to load. The floor of batch 1 is a pass that only reads as many bytes as a token needs, in the same rounds. At the
end a profiler tells where each engine's decode steps spend their time.

    python -m benchmarks.decode --out benchmarks/results/decode-cpu.jsonl
    python -m benchmarks.decode --table benchmarks/results/decode-cpu.jsonl

Engines run eagerly and in-process (no server in front); one thread per core given. The same command measures a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import Progress, read_files, status_bytes
from benchmarks.random_model import ONE_BILLION, TINY, Shape, make_model, make_prompts, quantize_cached, w4a16

BUDGET = "5.0bits"
CONTENDERS = ("bf16", "stock-w4a16", "plan-5bit")  # the plan last
MUST_HOLD = (
    ("decode_tokens_per_s_batch_1", "bf16", 2.2),
    ("decode_tokens_per_s_batch_1", "stock-w4a16", 3.0),
    ("decode_tokens_per_s_batch_8", "bf16", 1.4),
    ("first_token_per_s", "bf16", 0.9),
)
"""Measurement, contender, and how many times as fast the plan is at least."""
MOST_OF_BF16 = (("load_s", "time to load", 1.3), ("load_peak_bytes", "peak memory while loading", 1.1))
"""Measurement of the plan, what it is, and how many times that of bf16 it is at most."""
MEMORY_TOLERANCE = 0.02
"""Measured against planned memory of the plan."""
NOISE_TOLERANCE = 1.2
"""The plan's distance to its own weights in float32, at most so many times the bf16 engine's to its: both round the
activations and the result of every product to bf16 and nothing else, so only the draw differs, over some 90 tokens."""
BF16_DISTANCE = 0.1
"""Nats. The random model's log-probabilities have a standard deviation of about 1 over the vocabulary, so an engine
that computes anything else is off by as much; bf16 is off by a hundredth of it."""
MATRIX_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""Without the last two a CPU emulates products in bf16, which favours whoever avoids them."""
QUIET = 0.9
"""Share of its cores below which a child was not alone on them."""
PROFILE_THRESHOLD = 0.01
"""Operators that take less of every contender's step are summed up."""
WARM_UP_TOKENS = 4
FLOOR_BUFFER_BYTES = 1 << 30  # several times any cache; longer passes walk it again
KV_CACHE_BYTES = 1 << 28  # the longest batch needs 8 * 96 tokens, the longest prompt 1024


@dataclass(frozen=True)
class Workload:
    """What is asked of every engine.

    Attributes:
        rounds: of decoding.
        first_token_rounds: of long prompts; the first so many rounds have one.
        input_tokens: prompt length of a decoding request.
        output_tokens: by batch size, the tokens decoded for each request.
        first_token_input: length of the long prompt.
        correctness_prompts: number of prompts whose log-probabilities are compared.
        correctness_tokens: their length.
        profiled_tokens: decoded at batch 1 under the profiler.
    """

    rounds: int
    first_token_rounds: int
    input_tokens: int
    output_tokens: dict[int, int]
    first_token_input: int
    correctness_prompts: int = 4
    correctness_tokens: int = 24
    profiled_tokens: int = 16


FULL_WORKLOAD = Workload(
    rounds=5, first_token_rounds=3, input_tokens=32, output_tokens={1: 48, 8: 16}, first_token_input=1024
)
QUICK_WORKLOAD = Workload(
    rounds=1, first_token_rounds=1, input_tokens=8, output_tokens={1: 8, 8: 8}, first_token_input=64
)


# The contenders.


def make_contenders(shape: Shape, work: Path) -> dict[str, Path]:
    """The three checkpoints, cached in `work`.

    Args:
        shape: of the random model.
        work: a folder that git ignores.

    Returns:
        Checkpoint folder by contender.
    """
    from taq_vllm.allocate import Request, allocate
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.scoring import baseline

    files = ModelFiles(make_model(shape, work))
    planned = allocate(files, baseline(files, "random"), Request(BUDGET))
    for name, plan in (("stock-w4a16", w4a16(files)), ("plan-5bit", planned)):
        quantize_cached(files, plan, files.path.with_name(name))
    return {name: files.path.with_name(name) for name in CONTENDERS}


@dataclass(frozen=True)
class WeightBytes:
    """What a contender's weights should take.

    Attributes:
        resident: all weights in memory, as the plan counts them.
        per_token: read for one decoded token: all but the embedding table.
    """

    resident: int
    per_token: int


def expected_bytes(paths: Mapping[str, Path]) -> dict[str, WeightBytes]:
    """Weight bytes of every contender, from shapes and plans."""
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.plan import PLAN_FILE, Plan, weight_bytes

    files = ModelFiles(paths["bf16"])
    rows, columns = files.tensors["model.embed_tokens.weight"].shape
    other = files.bytes_beside(files.matrices)
    matrices = {
        "bf16": sum(weight_bytes(16, s, True) for s in files.matrices.values()),
        # Stock vLLM's own packing: as on disk.
        "stock-w4a16": sum(weight_bytes(4, s, True) for s in files.matrices.values()),
        "plan-5bit": Plan.load(paths["plan-5bit"] / PLAN_FILE).budget.resident_bytes - other,
    }
    return {name: WeightBytes(bytes_ + other, bytes_ + other - 2 * rows * columns) for name, bytes_ in matrices.items()}


# Children: one process per engine, asked over pipes with one JSON line per question and answer.


class Child:
    """A process of this module that answers questions, with its environment and log file."""

    def __init__(self, role: str, spec: dict[str, Any], env: Mapping[str, str], log: Path) -> None:
        self.role = role
        self._log_path = log
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.decode", "--child", role, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            text=True,
        )

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait for the answer.

        Raises:
            RuntimeError: the child died; its log's end is in the message.
        """
        try:
            self._process.stdin.write(json.dumps({"question": question, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            tail = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.role} died at {question!r}; the end of {self._log_path}:\n{tail}")
        return json.loads(answer)

    def close(self) -> None:
        """End the child."""
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _serve_questions(answers: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer questions from stdin until it closes. Whatever libraries print goes to the log."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        reply = answers[question.pop("question")](**question)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class _Stopwatch:
    """Wall time, and how much of it this process ran."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def reading(self) -> dict[str, float]:
        """Seconds since the start, and CPU time over them: below the number of threads, the cores were shared."""
        seconds = time.perf_counter() - self._wall
        return {"seconds": seconds, "cpu_share": (time.process_time() - self._cpu) / seconds}


class Engine:
    """The child's side: one vLLM engine, in this process, stepped by hand."""

    def __init__(self, path: str, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(
            path,
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=16,
            enable_prefix_caching=False,
            enforce_eager=True,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            seed=0,
            **arguments,
        )
        self._requests = 0

    def run(self, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
        """Decode greedily, all prompts in one batch.

        Returns:
            `first_token`: from adding the requests to the first token of the last of them; `decode`: from there to the
            end; both as `_Stopwatch.reading`. `decoded_tokens`: in `decode`.
        """
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        watch = _Stopwatch()
        for prompt in prompts:
            self._requests += 1
            engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, parameters)
        produced: dict[str, int] = {}
        first_token = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                produced[output.request_id] = len(output.outputs[0].token_ids)
            if first_token is None and len(produced) == len(prompts):
                first_token, before = watch.reading(), sum(produced.values())
                watch = _Stopwatch()
        decode = watch.reading()
        assert sum(produced.values()) == len(prompts) * output_tokens, "an engine must decode what it was asked for"
        return {
            "first_token": first_token,
            "decode": decode,
            "decoded_tokens": sum(produced.values()) - before,
        }

    def logprobs(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Log-probability of every prompt token but the first, in nats."""
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        return {
            "logprobs": [
                [place[token].logprob for place, token in zip(o.prompt_logprobs[1:], prompt[1:], strict=True)]
                for o, prompt in zip(outputs, prompts, strict=True)
            ]
        }

    def profile(self, prompt: list[int], output_tokens: int) -> dict[str, Any]:
        """Where the decode steps of one request spend the processor's time; on a GPU that is launching kernels.

        Returns:
            `step_ms`: wall time of a step; `operators_ms`: of it, in each of torch's operators itself. What is left is
            Python between them. The profiler itself slows both down.
        """
        from torch.profiler import ProfilerActivity, profile
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        self._requests += 1
        parameters = SamplingParams(temperature=0, max_tokens=output_tokens + 1, ignore_eos=True, detokenize=False)
        engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, parameters)
        while not any(output.outputs[0].token_ids for output in engine.step()):
            pass
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            watch = _Stopwatch()
            while engine.has_unfinished_requests():
                engine.step()
            seconds = watch.reading()["seconds"]
        per_step = 1 / 1000 / output_tokens
        operators = {event.key: event.self_cpu_time_total * per_step for event in profiler.key_averages()}
        return {"step_ms": 1000 * seconds / output_tokens, "operators_ms": operators}

    def memory(self) -> dict[str, Any]:
        """What this process holds: device memory on a GPU, else private memory; and the model's tensors."""
        import torch

        on_gpu = torch.cuda.is_available()
        capabilities = torch.cpu.get_capabilities()
        [tensor_bytes] = self._llm.apply_model(_tensor_bytes)
        return {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "instructions": [name for name in MATRIX_INSTRUCTIONS if capabilities.get(name)],
            "resident_bytes": torch.cuda.memory_allocated() if on_gpu else _private_bytes(),
            "tensor_bytes": tensor_bytes,
        }


def _tensor_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, shared storage once. A CPU's oneDNN keeps its 16-bit weights elsewhere."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _private_bytes() -> int:
    """Anonymous memory of this process: without files that are mapped, which the kernel can drop."""
    return status_bytes("RssAnon")


def _peak_bytes() -> int:
    """The most that was held so far: memory of the GPU, else this process's, files that are mapped included."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM")


def _child_engine(spec: dict[str, Any]) -> None:
    import ctypes

    engine: Engine | None = None

    def load() -> dict[str, Any]:
        nonlocal engine
        from vllm import LLM  # noqa: F401  (importing is not part of loading a model)

        started = time.perf_counter()
        engine = Engine(spec["path"], spec["engine"])
        seconds = time.perf_counter() - started
        engine.run(make_prompts(1, 8, 64, seed=0), WARM_UP_TOKENS)
        peak_bytes = _peak_bytes()
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not held by the weights
        return {"load_s": seconds, "load_peak_bytes": peak_bytes, **engine.memory()}

    _serve_questions(
        {
            "load": load,
            "memory": lambda: engine.memory(),
            "run": lambda **arguments: engine.run(**arguments),
            "profile": lambda **arguments: engine.profile(**arguments),
            "logprobs": lambda **arguments: engine.logprobs(**arguments),
        }
    )


def _child_floor(spec: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(spec["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = 4096
    buffer = torch.ones(FLOOR_BUFFER_BYTES // (4 * columns), columns, device=device)
    ones = torch.ones(columns, device=device)

    def read(bytes_: int) -> dict[str, Any]:
        """A matrix-vector product does one multiplication per 4 bytes: the fastest read that torch has."""
        rows = bytes_ // (4 * columns)
        watch = _Stopwatch()
        while rows > 0:
            buffer[:rows].mv(ones)
            rows -= buffer.shape[0]
        if device == "cuda":
            torch.cuda.synchronize()
        return watch.reading()

    _serve_questions({"read": read})


def _child_reference(spec: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    def logprobs(prompts: list[list[int]]) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(spec["path"], dtype=torch.float32)
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        assert not [m for m in sys.modules if m.startswith(("taq_", "vllm"))], "the reference must stand alone"
        return {"logprobs": found.tolist()}

    _serve_questions({"logprobs": logprobs})


# Measuring.


def mean_difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference of log-probabilities, nats; not finite if any of them is not."""
    differences = [abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(differences) / len(differences)


def check_logprobs(found: Mapping[str, Any], references: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Distance of every engine to its own weights in float32, and to the unquantized ones.

    Args:
        found: by contender, log-probabilities [prompt][token] of the engine.
        references: by contender, those of transformers.

    Raises:
        RuntimeError: the plan's engine computes something else than its weights, or any engine no numbers.
    """
    distances = {
        name: {
            "own_weights": mean_difference(found[name], references[name]),
            "bf16_weights": mean_difference(found[name], references["bf16"]),
        }
        for name in found
    }
    limits = {
        "bf16": BF16_DISTANCE,
        # Stock vLLM's 4-bit kernel is taken as it is; it only has to be nearer to its own weights than to others.
        "stock-w4a16": distances["stock-w4a16"]["bf16_weights"] / 2,
        "plan-5bit": NOISE_TOLERANCE * distances["bf16"]["own_weights"],
    }
    for name, limit in limits.items():
        own = distances[name]["own_weights"]
        if not own <= limit:  # NaN is no number to compare
            raise RuntimeError(
                f"{name} is {own:.4f} nat away from its own weights in transformers and may be {limit:.4f} away. "
                "Nothing is timed before that is right."
            )
    return distances


def _references(
    paths: Mapping[str, Path], prompts: list[list[int]], env: Mapping[str, str], work: Path
) -> dict[str, Any]:
    """Log-probabilities by transformers, cached: they depend on the checkpoint and the prompts alone."""
    from taq_vllm.model_files import ModelFiles

    references = {}
    for name, path in paths.items():
        key = {"fingerprint": ModelFiles(path).ref.fingerprint, "prompts": prompts}
        cache = path.with_name(f"{name}.logprobs.json")
        cached = json.loads(cache.read_text()) if cache.exists() else {}
        if cached.get("key") != key:
            child = Child("reference", {"path": str(path)}, env, work / f"reference-{name}.log")
            try:
                cached = {"key": key, **child.ask("logprobs", prompts=prompts)}
            finally:
                child.close()
            cache.write_text(json.dumps(cached))
        references[name] = cached["logprobs"]
    return references


def measure(shape: Shape, workload: Workload, work: Path, cores: Sequence[int]) -> list[dict[str, Any]]:
    """Everything, as result lines.

    Args:
        shape: of the random model.
        workload: what is asked.
        work: a folder that git ignores, for checkpoints and logs.
        cores: that every child is bound to, one thread each.

    Raises:
        RuntimeError: an engine died, or its log-probabilities are wrong.
    """
    from benchmarks.provenance import provenance

    say = Progress()
    say("checkpoints")
    paths = make_contenders(shape, work)
    expected = expected_bytes(paths)
    # Its unit is GiB, too coarse for three engines on a small machine; `kv_cache_memory_bytes` says it instead.
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    env = inherited | {
        "OMP_NUM_THREADS": str(len(cores)),
        "TAQ_BENCH_CORES": ",".join(map(str, cores)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    prompts = make_prompts(workload.correctness_prompts, workload.correctness_tokens, shape.vocabulary, seed=1)
    say("references in transformers")
    references = _references(paths, prompts, env, work)
    floor = None
    engines: dict[str, Child] = {}
    try:
        loaded, found = {}, {}
        for name, path in paths.items():
            say(f"load {name}")
            read_files(path)
            ours = name == "plan-5bit"
            spec = {"path": str(path), "engine": {"quantization": "taq"} if ours else {}}
            plugins = {"VLLM_PLUGINS": "taq" if ours else ""}
            engines[name] = Child("engine", spec, env | plugins, work / f"engine-{name}.log")
            loaded[name] = engines[name].ask("load")
            found[name] = engines[name].ask("logprobs", prompts=prompts)["logprobs"]
        distances = check_logprobs(found, references)
        floor = Child("floor", {"threads": len(cores)}, env, work / "floor.log")
        floor.ask("read", bytes_=FLOOR_BUFFER_BYTES)
        values: dict[tuple[str, str], list[float]] = {}
        shares: dict[tuple[str, str], list[float]] = {}

        def note(name: str, kind: str, value: float, reading: Mapping[str, float]) -> None:
            values.setdefault((name, kind), []).append(value)
            shares.setdefault((name, kind), []).append(reading["cpu_share"])

        for round_ in range(workload.rounds):
            order = CONTENDERS[round_ % len(CONTENDERS) :] + CONTENDERS[: round_ % len(CONTENDERS)]
            for batch, output_tokens in workload.output_tokens.items():
                for name in order:
                    say(f"round {round_ + 1} of {workload.rounds}: batch {batch}, {name}")
                    asked = make_prompts(batch, workload.input_tokens, shape.vocabulary, seed=100 + round_)
                    answer = engines[name].ask("run", prompts=asked, output_tokens=output_tokens)
                    rate = answer["decoded_tokens"] / answer["decode"]["seconds"]
                    note(name, f"decode_tokens_per_s_batch_{batch}", rate, answer["decode"])
                    if batch == 1:
                        answer = floor.ask("read", bytes_=expected[name].per_token)
                        note(name, "floor_tokens_per_s_batch_1", 1 / answer["seconds"], answer)
            for name in order if round_ < workload.first_token_rounds else ():
                say(f"round {round_ + 1} of {workload.rounds}: first token, {name}")
                asked = make_prompts(1, workload.first_token_input, shape.vocabulary, seed=200 + round_)
                answer = engines[name].ask("run", prompts=asked, output_tokens=1)
                note(name, "first_token_per_s", 1 / answer["first_token"]["seconds"], answer["first_token"])
        profiles = {}
        for name, engine in engines.items():
            say(f"profile {name}")
            values[name, "memory_after_requests_bytes"] = [engine.ask("memory")["resident_bytes"]]
            [asked] = make_prompts(1, workload.input_tokens, shape.vocabulary, seed=300)
            profiles[name] = engine.ask("profile", prompt=asked, output_tokens=workload.profiled_tokens)
    finally:
        for child in [*engines.values(), *([floor] if floor else [])]:
            child.close()
    say("done")
    for name, answer in loaded.items():
        values[name, "load_s"] = [answer["load_s"]]
        values[name, "load_peak_bytes"] = [answer["load_peak_bytes"]]
        values[name, "memory_bytes"] = [answer["resident_bytes"]]
        values[name, "tensor_bytes"] = [answer["tensor_bytes"]]
        values[name, "planned_weight_bytes"] = [expected[name].resident]
        values[name, "logprob_distance_own_weights"] = [distances[name]["own_weights"]]
        values[name, "logprob_distance_bf16_weights"] = [distances[name]["bf16_weights"]]
        values[name, "decode_step_ms"] = [profiles[name]["step_ms"]]
    settings = {
        "model": asdict(shape),
        "workload": asdict(workload),
        "budget": BUDGET,
        "device": loaded["bf16"]["device"],
        "instructions": loaded["bf16"]["instructions"],
        "threads": len(cores),
        "bound_to_cores": list(cores),
        "eager": True,
    }
    operators = {name: profiles[name]["operators_ms"] for name in profiles}
    return make_lines(values, shares, operators, settings | provenance())


def make_lines(
    values: Mapping[tuple[str, str], Sequence[float]],
    shares: Mapping[tuple[str, str], Sequence[float]],
    operators: Mapping[str, Mapping[str, float]],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """One result line per contender and measurement, ratios of the plan within each round included.

    Args:
        values: by (contender, measurement), one value per round, or one where there is only one.
        shares: by the same keys, CPU time over wall time, where time was measured.
        operators: by contender, milliseconds of a decode step in each operator itself.
        settings: hardware, versions and what was asked; the same on every line.
    """
    values = dict(values)

    def divide(name: str, kind: str, over: tuple[str, str], label: str) -> None:
        pairs = zip(values[name, kind], values[over], strict=True)
        values[name, f"{kind}_over_{label}"] = [ours / theirs for ours, theirs in pairs]

    for kind in {kind for _, kind in shares if not kind.startswith("floor")}:
        for name in CONTENDERS[:-1]:
            divide("plan-5bit", kind, (name, kind), name)
    for name in CONTENDERS:
        divide(name, "decode_tokens_per_s_batch_1", (name, "floor_tokens_per_s_batch_1"), "floor")
    return [
        {
            "benchmark": "decode",
            "contender": name,
            "measurement": kind,
            "median": median(rounds),
            "min": min(rounds),
            "max": max(rounds),
            "rounds": list(rounds),
            **({"cpu_shares": list(shares[name, kind])} if (name, kind) in shares else {}),
            **({"operators_ms": dict(operators[name])} if kind == "decode_step_ms" else {}),
            **settings,
        }
        for (name, kind), rounds in sorted(values.items())
    ]


# What is printed.


def render(lines: Sequence[dict[str, Any]]) -> list[Any]:
    """The table of a run and its requirements, from its lines alone."""
    from rich.table import Table

    found = {(line["contender"], line["measurement"]): line for line in lines}
    head = lines[0]
    table = Table(
        title=f"decode steps of {head['model']['name']}, random weights; {head['processor']} with "
        f"{' '.join(head['instructions'])}; device {head['device']}, {head['threads']} thread(s), eager, "
        f"commit {head['commit']}; median (min-max) of {head['workload']['rounds']}, of prompts "
        f"{head['workload']['first_token_rounds']}"
    )
    batches = list(head["workload"]["output_tokens"])
    columns = ["contender", *(f"tokens/s, batch {b}" for b in batches), "per CPU second, batch 1"]
    long_prompt = head["workload"]["first_token_input"]
    columns += ["floor, batch 1", "share of floor", f"prompts of {long_prompt} per s"]
    columns += ["memory MB", "weights planned MB", "load s", "dlogp own / bf16 weights"]
    for column in columns:
        table.add_column(column, justify="left" if column == "contender" else "right")

    def spread(name: str, kind: str, digits: int = 1) -> str:
        line = found[name, kind]
        return f"{line['median']:.{digits}f} ({line['min']:.{digits}f}-{line['max']:.{digits}f})"

    for name in CONTENDERS:
        speed = found[name, "decode_tokens_per_s_batch_1"]
        per_cpu_s = [rate / share for rate, share in zip(speed["rounds"], speed["cpu_shares"], strict=True)]
        table.add_row(
            name,
            *(spread(name, f"decode_tokens_per_s_batch_{b}") for b in batches),
            f"{median(per_cpu_s):.1f} ({min(per_cpu_s):.1f}-{max(per_cpu_s):.1f})",
            spread(name, "floor_tokens_per_s_batch_1"),
            f"{found[name, 'decode_tokens_per_s_batch_1_over_floor']['median']:.0%}",
            spread(name, "first_token_per_s", 3),
            f"{found[name, 'memory_bytes']['median'] / 1e6:.0f}",
            f"{found[name, 'planned_weight_bytes']['median'] / 1e6:.0f}",
            f"{found[name, 'load_s']['median']:.1f}",
            f"{found[name, 'logprob_distance_own_weights']['median']:.4f} / "
            f"{found[name, 'logprob_distance_bf16_weights']['median']:.4f}",
        )
    least = min(min(line["cpu_shares"]) for line in lines if "cpu_shares" in line) / head["threads"]
    busy = f"The machine was not quiet: in one measurement an engine had {least:.0%} of its cores."
    return [table, profile_table(lines), *requirements(lines), *([busy] if least < QUIET else [])]


def profile_table(lines: Sequence[dict[str, Any]]) -> Any:
    """Where a decode step of batch 1 goes, operator by operator."""
    from rich.table import Table

    steps = {line["contender"]: line for line in lines if line["measurement"] == "decode_step_ms"}
    table = Table(title="milliseconds of a decode step at batch 1, under the profiler")
    for column in ("in", *CONTENDERS):
        table.add_column(column, justify="left" if column == "in" else "right")
    shown = {
        name
        for line in steps.values()
        for name, ms in line["operators_ms"].items()
        if ms >= PROFILE_THRESHOLD * line["median"]
    }
    for name in sorted(shown, key=lambda name: -sum(line["operators_ms"].get(name, 0) for line in steps.values())):
        table.add_row(name, *(f"{steps[c]['operators_ms'].get(name, 0):.2f}" for c in CONTENDERS))
    other = {c: sum(ms for name, ms in steps[c]["operators_ms"].items() if name not in shown) for c in CONTENDERS}
    table.add_row("other operators", *(f"{other[c]:.2f}" for c in CONTENDERS))
    outside = {c: steps[c]["median"] - sum(steps[c]["operators_ms"].values()) for c in CONTENDERS}
    table.add_row("outside of operators", *(f"{outside[c]:.2f}" for c in CONTENDERS))
    table.add_row("step", *(f"{steps[c]['median']:.2f}" for c in CONTENDERS))
    return table


def requirements(lines: Iterable[dict[str, Any]]) -> list[str]:
    """What must hold, and whether it does in these lines."""
    found = {(line["contender"], line["measurement"]): line["median"] for line in lines}
    sentences = []
    for kind, name, least in MUST_HOLD:
        ratio = found["plan-5bit", f"{kind}_over_{name}"]
        what = kind.replace("_per_s", "/s").replace("_", " ")
        sentences.append(_verdict(ratio >= least, f"plan over {name}, {what}: {ratio:.2f}x, at least {least}x"))
    for kind, what, most in MOST_OF_BF16:
        if ("plan-5bit", kind) not in found:
            sentences.append(f"not measured: {what} over bf16")
            continue
        ratio = found["plan-5bit", kind] / found["bf16", kind]
        sentences.append(_verdict(ratio <= most, f"plan over bf16, {what}: {ratio:.2f}x, at most {most}x"))
    planned = found["plan-5bit", "planned_weight_bytes"]
    tensors = found["plan-5bit", "tensor_bytes"] / planned - 1
    sentences.append(
        _verdict(
            abs(tensors) <= MEMORY_TOLERANCE,
            f"tensors of the served plan against what the plan said: {tensors:+.2%}, at most {MEMORY_TOLERANCE:.0%}",
        )
    )
    # Everything but weights is the same in both processes, so the difference of the two is the weights'.
    saved = found["bf16", "memory_bytes"] - found["plan-5bit", "memory_bytes"]
    miss = (found["bf16", "planned_weight_bytes"] - saved) / planned - 1
    sentences.append(
        _verdict(
            abs(miss) <= MEMORY_TOLERANCE,
            f"memory of the process (bf16's less what was saved, {saved / 1e6:.0f} MB) against what the plan said: "
            f"{miss:+.2%}, at most {MEMORY_TOLERANCE:.0%}",
        )
    )
    return sentences


def _verdict(holds: bool, sentence: str) -> str:
    return f"{'holds ' if holds else 'MISSES'} {sentence}"


def main() -> None:
    """Measure, write one JSON line per result, print the table made from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode-cpu.jsonl"))
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="checkpoints and logs, kept for the next run")
    parser.add_argument("--rounds", type=int, help="instead of the workload's own number")
    parser.add_argument("--cores", default=str(max(os.sched_getaffinity(0))), help="as 1 or 0,1; one thread on each")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round: does it run at all?")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these lines")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        role, spec = arguments.child
        if cores := os.environ.get("TAQ_BENCH_CORES"):
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
        {"engine": _child_engine, "floor": _child_floor, "reference": _child_reference}[role](json.loads(spec))
        return
    from rich.console import Console

    if arguments.table:
        lines = [json.loads(line) for line in arguments.table.read_text().splitlines()]
    else:
        shape, workload = (TINY, QUICK_WORKLOAD) if arguments.quick else (ONE_BILLION, FULL_WORKLOAD)
        if arguments.rounds:
            workload = Workload(**asdict(workload) | {"rounds": arguments.rounds})
        cores = [int(core) for core in arguments.cores.split(",")]
        lines = measure(shape, workload, arguments.work, cores)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for part in render(lines):
        Console(width=200).print(part)


if __name__ == "__main__":
    main()
