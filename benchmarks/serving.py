"""How fast is a plan as a server, against what a user would pick instead?

A Llama-shaped model with random weights is served by real servers, as a user starts them: vLLM in bf16; stock vLLM with
uniform W4A16; plans of 5 and 6 bits per weight with the head at 8, by the plugin; and llama.cpp with Q4_K_M and Q8_0 of
the same weights (`make peers-llamacpp`; left out where it is not built). All run at once, idle but for the one that is
asked, and are asked in turn by `vllm bench serve`, so that a slow minute of the machine falls on every one; ratios are
taken within a round. Before anything is timed, every server must choose tokens that the model likes.

Then `vllm bench latency` and `vllm bench throughput` run once for every engine of vLLM, one after the other.

    python -m benchmarks.serving --out benchmarks/results/serving-cpu.jsonl
    python -m benchmarks.serving --table benchmarks/results/serving-cpu.jsonl

On a CPU every engine computes with one thread per core of --cores. The client and the fronts of vLLM's servers have the
other cores; llama.cpp's server is one process on the engine's cores, for its options do not bind its main thread. vLLM
runs eagerly: compiling takes minutes per engine here, on which the loads would wait. `--model llama-8B` has the shapes
of Llama-3.1-8B, for a GPU, where this has not been run. Where a step's time goes: `python -m benchmarks.decode`.

Random weights make activations without outliers: the second pass that the CPU kernel has for those is not measured.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import Progress, read_files
from benchmarks.random_model import (
    CHARACTERS_FROM,
    LLAMA_8B,
    ONE_BILLION,
    Shape,
    make_model,
    make_prompts,
    quantize_cached,
    w4a16,
)
from benchmarks.server import Server, environment, memory_bytes, serving, vllm_command

LLAMACPP = Path(__file__).parents[1] / ".llamacpp"
HEAD_PIN = "lm_head=8"
PLANS = {"plan-5bit": "5.0bits", "plan-6bit": "6.0bits"}
GGUF = {"llama.cpp-q4_k_m": "Q4_K_M", "llama.cpp-q8_0": "Q8_0"}
MODEL_NAME = "model"
BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""
SETTLE_S = 3
"""Before each load: the worker of the server that was asked before spins for a second after its last step, on the cores
of the next one."""
CHECKED_PROMPTS = 16
CHECKED_TOKENS = 64
MAX_SHARE_OF_UNIFORM_GAP = 0.5
"""How far the log-probability of the chosen tokens may be below the argmax, as a share of a uniform choice's gap.
A wrong model costs all of it, 4 bits a quarter: random weights have no redundancy that rounding could use."""


@dataclass(frozen=True)
class Cell:
    """One load: so many requests at once, and how often all servers are asked in turn."""

    batch: int
    input_tokens: int
    output_tokens: int
    rounds: int

    @property
    def label(self) -> str:
        """For tables."""
        return f"batch {self.batch}, {self.input_tokens} in, {self.output_tokens} out"


DECODE = Cell(1, 128, 128, 3)
FIRST_TOKEN = Cell(1, 1024, 16, 3)
SMALL_BATCH = Cell(8, 128, 32, 3)
BATCH = Cell(32, 128, 32, 2)
CELLS = (DECODE, FIRST_TOKEN, SMALL_BATCH, BATCH)
LONG_CELLS = (Cell(8, 1024, 16, 1), Cell(32, 1024, 8, 1))
QUICK_CELLS = (Cell(1, 16, 8, 2), Cell(4, 16, 8, 1))
QUICK_SHAPE = Shape("llama-quick", 512, 12, 1024, 10240, 8, 4)  # `vllm bench latency` draws from 10,000 tokens


@dataclass(frozen=True)
class Requirement:
    """How many times another contender's figure the 5-bit plan must have."""

    cell: Cell
    figure: str
    contender: str
    least: float
    per_byte: bool = False

    def sentence(self) -> str:
        """What must hold."""
        per_byte = " times bytes read per token" if self.per_byte else ""
        what = {"output_tokens_per_s": "output tokens/s", "first_tokens_per_s": "first tokens/s"}[self.figure]
        return f"{self.cell.label}: {what}{per_byte} over {self.contender}"


MUST_HOLD = (
    Requirement(DECODE, "output_tokens_per_s", "bf16", 2.8),
    Requirement(DECODE, "output_tokens_per_s", "stock-w4a16", 4.0),
    Requirement(DECODE, "output_tokens_per_s", "llama.cpp-q4_k_m", 1.0, per_byte=True),
    Requirement(BATCH, "output_tokens_per_s", "bf16", 0.95),
    Requirement(FIRST_TOKEN, "first_tokens_per_s", "bf16", 0.95),
)
PLAN_UNDER_TEST = "plan-5bit"


# The contenders.


@dataclass(frozen=True)
class Contender:
    """A server that can be started.

    Attributes:
        name: in tables.
        command: without host and port.
        env: variables of its own, as for `server.environment`.
        path: what it loads, a checkpoint's folder or a GGUF file.
        bytes_per_token: of weights, read for one decoded token: all but the embedding table.
        engine_arguments: of vLLM's engine, with or without a server; None if it is another's.
        cores: that the whole server is bound to; None if it binds its engine itself, as vLLM does.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str | None]
    path: Path
    bytes_per_token: int
    engine_arguments: tuple[str, ...] | None = None
    cores: Sequence[int] | None = None


def make_contenders(shape: Shape, work: Path, cells: Sequence[Cell], cores: Sequence[int] | None) -> list[Contender]:
    """Checkpoints of one random model, cached in `work`, and the commands that serve them.

    Args:
        shape: of the model.
        work: a folder that git ignores.
        cells: what will be asked, for the size of the KV cache.
        cores: that an engine computes on, one thread each; None on a GPU.
    """
    from taq_vllm.allocate import Request, allocate
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.scoring import baseline

    files = ModelFiles(make_model(shape, work))
    plans = {"stock-w4a16": w4a16(files)}
    for name, budget in PLANS.items():
        plans[name] = allocate(files, baseline(files, "random"), Request(budget, pins=(HEAD_PIN,)))
    contenders = [vllm_contender("bf16", files.path, shape, cells, cores)]
    for name, plan in plans.items():
        folder = files.path.with_name(f"{name}-served")
        quantize_cached(files, plan, folder)
        contenders.append(vllm_contender(name, folder, shape, cells, cores))
    if (LLAMACPP / "build/bin/llama-server").exists() and cores is not None:
        contenders += [llamacpp_contender(name, kind, files.path, cells, cores) for name, kind in GGUF.items()]
    return contenders


def vllm_contender(
    name: str, folder: Path, shape: Shape, cells: Sequence[Cell], cores: Sequence[int] | None
) -> Contender:
    """vLLM's server of a checkpoint, with a KV cache that holds the largest load."""
    from taq_vllm.model_files import ModelFiles

    per_token = 2 * 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)  # k and v, 2 bytes each
    cache = per_token * max(c.batch * BLOCK * _blocks(c) for c in cells) + (64 << 20)
    engine = ["--kv-cache-memory-bytes", str(cache), "--max-model-len", str(BLOCK * max(map(_blocks, cells)))]
    engine.append("--enforce-eager")
    if cores is None:  # all on one GPU at once
        engine += ["--gpu-memory-utilization", str(round(0.9 / (2 + len(PLANS)), 2))]
    command = vllm_command(folder, [*engine, "--served-model-name", MODEL_NAME, "--disable-uvicorn-access-log"])
    env = {"VLLM_PLUGINS": "taq" if name in PLANS else "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_CPU_KVCACHE_SPACE"] = None  # in whole GiB, and it would win over what is said here
    if cores is not None:
        env |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
    weights = sum(info.end - info.start for info in ModelFiles(folder).tensors.values())
    embedding = 2 * shape.vocabulary * shape.hidden
    return Contender(name, tuple(command), env, folder, weights - embedding, tuple(engine))


def _blocks(cell: Cell) -> int:
    """Blocks of the KV cache that one request of the cell fills."""
    return math.ceil((cell.input_tokens + cell.output_tokens) / BLOCK)


def llamacpp_contender(name: str, kind: str, model: Path, cells: Sequence[Cell], cores: Sequence[int]) -> Contender:
    """llama.cpp's server with the same weights in one of its formats, converted and quantized by its own tools."""
    from taq_vllm.model_files import ModelFiles

    version = ModelFiles(model).ref.fingerprint[:12]
    full, out = (model.with_name(f"{stem}-{version}.gguf") for stem in ("bf16", kind))
    source, binaries = LLAMACPP / "vendor/llama.cpp", LLAMACPP / "build/bin"
    if not out.exists():
        if not full.exists():
            env = os.environ | {"PYTHONPATH": str(source / "gguf-py"), "HF_HUB_OFFLINE": "1"}
            convert = [sys.executable, source / "convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", full]
            subprocess.run(list(map(str, convert)), env=env, check=True, stdout=sys.stderr)
        partial = out.with_suffix(".partial")
        quantize = [binaries / "llama-quantize", full, partial, kind]
        subprocess.run(list(map(str, quantize)), check=True, stdout=sys.stderr)
        partial.rename(out)
    slots = max(cell.batch for cell in cells)
    context = slots * BLOCK * max(map(_blocks, cells))
    threads = str(len(cores))
    command = [binaries / "llama-server", "--model", out, "--alias", MODEL_NAME, "--parallel", slots]
    command += ["--ctx-size", context, "--threads", threads, "--threads-batch", threads]
    # Weights in memory of its own, as vLLM has them, so that what it holds can be compared; and vLLM's client loses the
    # answer that comes after a ping.
    command += ["--load-mode", "none", "--sse-ping-interval", -1]
    # Its own options bind every thread but the main one, which computes.
    return Contender(name, tuple(map(str, command)), {}, out, _gguf_bytes(out), cores=cores)


def _gguf_bytes(path: Path) -> int:
    """Bytes of a GGUF file's tensors without the embedding table, as llama.cpp's own reader counts them."""
    code = (
        "import sys; from gguf import GGUFReader; tensors = GGUFReader(sys.argv[1]).tensors; "
        "print(sum(int(t.n_bytes) for t in tensors if t.name != 'token_embd.weight'))"
    )
    env = os.environ | {"PYTHONPATH": str(LLAMACPP / "vendor/llama.cpp/gguf-py")}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=True, capture_output=True, text=True)
    return int(done.stdout)


# Is it the model that it should be?


def reference_logprobs(model: Path, prompts: Sequence[Sequence[int]]) -> Any:
    """Log-probabilities [prompts, vocabulary] of the next token, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return exact(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].log_softmax(-1)


def check_choices(server: Server, name: str, tokenizer: Any, prompts: Sequence[Sequence[int]], logprobs: Any) -> float:
    """Mean gap in nats of the server's greedy first tokens to the unquantized model's argmax.

    Args:
        server: that is asked.
        name: of the contender.
        tokenizer: of the model.
        prompts: token ids.
        logprobs: [prompts, vocabulary] of the unquantized model.

    Raises:
        RuntimeError: the server computes something else than the model.
    """
    gaps = []
    for prompt, row in zip(prompts, logprobs, strict=True):
        text = tokenizer.decode(prompt)
        answer = server.client.completions.create(model=MODEL_NAME, prompt=text, max_tokens=1, temperature=0)
        chosen = tokenizer.encode(answer.choices[0].text)
        gaps.append((row.max() - row[chosen[0]]).item() if len(chosen) == 1 else math.inf)
    uniform = (logprobs.amax(-1) - logprobs.mean(-1)).mean().item()
    gap = sum(gaps) / len(gaps)
    if not gap <= MAX_SHARE_OF_UNIFORM_GAP * uniform:
        raise RuntimeError(
            f"{name}: its first tokens are {gap:.2f} nats below the model's argmax on average, a uniform choice is "
            f"{uniform:.2f} below, and {MAX_SHARE_OF_UNIFORM_GAP:.0%} of that are allowed; it does not serve this "
            "model. Nothing is timed before that is right."
        )
    return gap


# Measuring.


def bench_serve(server: Server, cell: Cell, prompts: Sequence[str], tokenizer: Path) -> dict[str, float]:
    """What `vllm bench serve` says of one batch of requests, all sent at once.

    Returns:
        `output_tokens_per_s` of all requests together; `first_token_s`, the mean over requests; `token_ms`, the mean
        time per output token after the first.

    Raises:
        RuntimeError: a request failed or was answered with another number of tokens than asked for.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with tempfile.TemporaryDirectory() as folder:
        # Of vLLM's formats the one that takes any text and needs no other package.
        data = Path(folder, "prompts.json")
        data.write_text(json.dumps([{"conversations": [{"value": prompt}, {"value": ""}]} for prompt in prompts]))
        arguments = ["--base-url", server.url, "--model", MODEL_NAME, "--tokenizer", str(tokenizer)]
        arguments += ["--dataset-name", "sharegpt", "--dataset-path", str(data)]
        arguments += ["--sharegpt-output-len", str(cell.output_tokens), "--num-prompts", str(cell.batch)]
        arguments += ["--max-concurrency", str(cell.batch), "--temperature", "0", "--ignore-eos", "--disable-tqdm"]
        log = Path(folder, "log")
        with log.open("w") as stream, contextlib.redirect_stdout(stream):
            found = asyncio.run(main_async(parser.parse_args(arguments)))
        wanted = cell.batch * cell.output_tokens
        if found["completed"] != cell.batch or found["total_output_tokens"] != wanted:
            raise RuntimeError(
                f"{found['completed']} of {cell.batch} requests were answered, with {found['total_output_tokens']} of "
                f"{wanted} tokens:\n{log.read_text()[-2000:]}"
            )
    return {
        "output_tokens_per_s": found["output_throughput"],
        "first_token_s": found["mean_ttft_ms"] / 1000,
        "token_ms": found["mean_tpot_ms"],
    }


def measure(
    contenders: Sequence[Contender], model: Path, shape: Shape, cells: Sequence[Cell], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Start all servers, ask them in turn.

    Args:
        contenders: what is started.
        model: the unquantized checkpoint.
        shape: of the model.
        cells: the loads, in order.
        settings: on every line.

    Yields:
        A line per contender for what it takes, then for each cell a line per contender with all rounds.

    Raises:
        RuntimeError: a server did not start, is of another model, or failed a request.
    """
    from transformers import AutoTokenizer

    say = Progress()
    tokenizer = AutoTokenizer.from_pretrained(model)
    checked = make_prompts(CHECKED_PROMPTS, CHECKED_TOKENS, shape.vocabulary, seed=1, first=CHARACTERS_FROM)
    say("reference in transformers")
    logprobs = reference_logprobs(model, checked)
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for contender in contenders:
            say(f"start {contender.name}")
            read_files(contender.path)
            on_device = device_bytes() if not settings["threads"] else 0
            with bound_to(contender.cores):
                server = servers[contender.name] = stack.enter_context(serving(contender.command, contender.env))
            yield {
                "benchmark": "serving",
                "contender": contender.name,
                "start_s": server.start_s,
                "memory_bytes": memory_bytes(server.pid) if settings["threads"] else device_bytes() - on_device,
                "bytes_per_token": contender.bytes_per_token,
                "logprob_gap_to_argmax": check_choices(server, contender.name, tokenizer, checked, logprobs),
                **settings,
            }
        for cell in cells:
            rounds: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
            for round_ in range(cell.rounds):
                # No prompt begins like one of another load: nothing is found in a cache.
                seed = (cell.batch, cell.input_tokens, round_)
                drawn = make_prompts(cell.batch, cell.input_tokens, shape.vocabulary, seed, first=CHARACTERS_FROM)
                prompts = [tokenizer.decode(ids) for ids in drawn]
                start = round_ % len(contenders)
                for contender in [*contenders[start:], *contenders[:start]]:
                    say(f"{cell.label}: round {round_ + 1} of {cell.rounds}, {contender.name}")
                    time.sleep(SETTLE_S)
                    found = bench_serve(servers[contender.name], cell, prompts, model)
                    rounds[contender.name].append(found)
            for name, found in rounds.items():
                yield {
                    "benchmark": "serving",
                    "contender": name,
                    **asdict(cell),
                    **{key: [one[key] for one in found] for key in found[0]},
                    **settings,
                }
    say("done")


def device_bytes() -> int:
    """Memory of the GPU that is taken, by whomever."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


@contextlib.contextmanager
def bound_to(cores: Sequence[int] | None) -> Iterator[None]:
    """Processes that are started in the block run on these cores; None changes nothing."""
    before = os.sched_getaffinity(0)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def bench_offline(
    contenders: Sequence[Contender], cell: Cell, work: Path, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """`vllm bench latency` and `vllm bench throughput`, an engine of its own for each; not interleaved.

    Yields:
        A line per engine and tool, with seconds per batch or output tokens per second.
    """
    say = Progress()
    vllm = str(Path(sys.executable).parent / "vllm")
    for contender in contenders:
        if contender.engine_arguments is None:
            continue
        for tool in ("latency", "throughput"):
            say(f"vllm bench {tool}: {contender.name}")
            out = work / f"{contender.name}-{tool}.json"
            command = [vllm, "bench", tool, "--model", str(contender.path), *contender.engine_arguments]
            if tool == "latency":
                command += ["--input-len", str(cell.input_tokens), "--output-len", str(cell.output_tokens)]
                command += ["--batch-size", str(cell.batch), "--num-iters-warmup", "1", "--num-iters", "1"]
            else:
                command += ["--dataset-name", "random", "--random-input-len", str(cell.input_tokens)]
                command += ["--random-output-len", str(cell.output_tokens), "--num-prompts", str(cell.batch)]
            log = work / f"{contender.name}-{tool}.log"
            command += ["--output-json", str(out)]
            with log.open("w") as stream:
                done = subprocess.run(
                    command, env=environment(contender.env), stdout=stream, stderr=stream, check=False
                )
            if done.returncode:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"vllm bench {tool} of {contender.name} failed; the end of {log}:\n{tail}")
            found = json.loads(out.read_text())
            seconds = found["avg_latency" if tool == "latency" else "elapsed_time"]
            yield {
                "benchmark": "serving",
                "contender": contender.name,
                "tool": f"vllm bench {tool}",
                **asdict(cell),
                "output_tokens_per_s": cell.batch * cell.output_tokens / seconds,
                **settings,
            }


# What is printed.


def ratios(lines: Sequence[Mapping[str, Any]], requirement: Requirement) -> list[float] | None:
    """The judged plan's figure over another contender's, round by round; None if one of them was not measured."""

    def figures(name: str) -> list[float] | None:
        cell = asdict(requirement.cell)
        for line in lines:
            if line["contender"] == name and "tool" not in line and cell.items() <= line.items():
                if requirement.figure == "first_tokens_per_s":
                    return [1 / seconds for seconds in line["first_token_s"]]
                return line[requirement.figure]
        return None

    ours, theirs = figures(PLAN_UNDER_TEST), figures(requirement.contender)
    if ours is None or theirs is None:
        return None
    scale = 1.0
    if requirement.per_byte:
        weights = {line["contender"]: line["bytes_per_token"] for line in lines if "bytes_per_token" in line}
        scale = weights[PLAN_UNDER_TEST] / weights[requirement.contender]
    return [scale * a / b for a, b in zip(ours, theirs, strict=True)]


def requirements(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must hold, and whether it does in these lines."""
    sentences = []
    for requirement in MUST_HOLD:
        found = ratios(lines, requirement)
        if found is None:
            sentences.append(f"not measured: {requirement.sentence()}")
            continue
        verdict = "holds " if median(found) >= requirement.least else "MISSES"
        spread = f"{median(found):.2f}x ({min(found):.2f}-{max(found):.2f})"
        sentences.append(f"{verdict} {requirement.sentence()}: {spread}, at least {requirement.least}x")
    return sentences


def render(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A table of all loads and the requirements, from lines alone."""
    from rich.table import Table

    head = lines[0]
    taken = {line["contender"]: line for line in lines if "start_s" in line}
    cells = {}
    for line in lines:
        if "batch" in line:
            cell = Cell(*(line[name] for name in ("batch", "input_tokens", "output_tokens", "rounds")))
            cells.setdefault((cell, line.get("tool")), {})[line["contender"]] = line
    where = f"{head['threads']} thread(s) per engine" if head["threads"] else "on the GPU"
    table = Table(
        title=f"servers of {head['model']['name']}, random weights; {head['processor']}; {head['device']}, {where}; "
        f"preloaded: {', '.join(head['preloaded']) or 'nothing'}; commit {head['commit']}; medians"
    )
    table.add_column("")
    for name in taken:
        table.add_column(name, justify="right")

    def row(label: str, values: Mapping[str, str]) -> None:
        table.add_row(label, *(values.get(name, "-") for name in taken))

    row("weights read per token, MB", {n: f"{line['bytes_per_token'] / 1e6:.0f}" for n, line in taken.items()})
    row("memory after start, MB", {n: f"{line['memory_bytes'] / 1e6:.0f}" for n, line in taken.items()})
    row("first answer after, s", {n: f"{line['start_s']:.0f}" for n, line in taken.items()})
    for (cell, tool), found in cells.items():
        if tool is None:
            figures = (("output tokens/s", "output_tokens_per_s", 1), ("first token, s", "first_token_s", 2))
            figures += (("per further token, ms", "token_ms", 0),)
            for what, key, digits in figures:
                row(f"{cell.label}: {what}", {n: f"{median(line[key]):.{digits}f}" for n, line in found.items()})
        else:
            label = f"{tool}, {cell.label}: output tokens/s"
            row(label, {n: f"{line['output_tokens_per_s']:.1f}" for n, line in found.items()})
    return [table, *requirements(lines)]


def main() -> None:
    """Measure, write one JSON line per result as soon as it is there, print the table made from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the lines go once all are there; until then beside it")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="checkpoints and logs, kept for the next run")
    parser.add_argument("--model", choices=(ONE_BILLION.name, LLAMA_8B.name), default=ONE_BILLION.name)
    parser.add_argument("--cores", default=str(max(os.sched_getaffinity(0))), help="of an engine on a CPU, as 1 or 0,1")
    parser.add_argument("--contenders", metavar="NAME,...", help="only these")
    parser.add_argument("--long", action="store_true", help="also batches of prompts of 1024 tokens: an hour on a CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny model, small loads: does it run at all?")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these lines")
    arguments = parser.parse_args()
    from rich.console import Console

    if arguments.table:
        lines = [json.loads(line) for line in arguments.table.read_text().splitlines()]
    else:
        if not arguments.out:
            parser.error("got neither --out nor --table; say where lines go, as benchmarks/results/serving-cpu.jsonl")
        names = ("bf16", "stock-w4a16", *PLANS, *GGUF)
        if unknown := set((arguments.contenders or "bf16").split(",")) - set(names):
            parser.error(f"--contenders {', '.join(sorted(unknown))}: there are {', '.join(names)}")
        lines, partial = [], arguments.out.with_suffix(".partial")
        with partial.open("w") as stream:
            for line in run(arguments):
                lines.append(line)
                stream.write(json.dumps(line) + "\n")
                stream.flush()
        partial.rename(arguments.out)
    for part in render(lines):
        Console(width=200).print(part, highlight=False)


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything that the command line asks for, as result lines."""
    import torch

    from benchmarks.provenance import provenance

    shape = {s.name: s for s in (ONE_BILLION, LLAMA_8B)}[arguments.model]
    cells = CELLS + LONG_CELLS * arguments.long
    if arguments.quick:
        shape, cells = QUICK_SHAPE, QUICK_CELLS
    on_gpu = torch.cuda.is_available()
    cores = None if on_gpu else sorted(int(core) for core in arguments.cores.split(","))
    contenders = make_contenders(shape, arguments.work, cells, cores)
    if arguments.contenders:
        contenders = [contender for contender in contenders if contender.name in arguments.contenders.split(",")]
    if cores and (others := os.sched_getaffinity(0) - set(cores)):
        os.sched_setaffinity(0, others)  # inherited by the servers' fronts
    settings = {
        "model": asdict(shape),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": len(cores or ()),
        **provenance(),
    }
    yield from measure(contenders, make_model(shape, arguments.work), shape, cells, settings)
    yield from bench_offline(contenders, cells[-1] if arguments.quick else SMALL_BATCH, arguments.work, settings)


if __name__ == "__main__":
    main()
