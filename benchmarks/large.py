"""Is a model larger than memory scored and quantized like a small one, and does a killed run end with the same bytes?

A random Llama of the asked size is written shard by shard. Then, each in a process of its own as a user would start
them: `taq score` (taq, 64 prompts), `taq plan`, `taq quantize`, `taq verify`. Scoring is killed once with SIGKILL and
quantizing twice, at random points, and each time the same command is run again. A run that ends before its kill is an
error. Resident memory is what the system measured of each process (`ru_maxrss` of the child): an upper bound, since
what the process that started it held until the program was loaded counts as well. It must stay below 6 GB.

Then the same is done with a twin (8 layers, a quarter of the width), and once more without kills: scores, plan and the
sha256 of every file must be equal. The twin is always quantized by `clip`, whatever the large model is quantized by:
rtn has no hidden states that a killed run must find again.

    python -m benchmarks.large --size 8b --out benchmarks/results/large-cpu.jsonl
    python -m benchmarks.large --table benchmarks/results/large-cpu.jsonl

Weights depend on the seed and each tensor's name alone. What is in `--work` is kept and used again, the model included;
`--clean` removes the model and the checkpoint at the end. The 8B case needs 16 GB of disk for the model and 6 for the
result.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import random_model

if TYPE_CHECKING:
    import torch

LAB = Path(__file__).parent / "lab"
MOST_RESIDENT_BYTES = 6_000_000_000
PROMPTS = 64
MAX_TOKENS = 32
KILLS = (("score", 1), ("quantize", 2))

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_TAQ = [sys.executable, "-c", "from taq_vllm.cli import main; main()"]
_TWIN_METHOD = "clip"
_POLL_S = 0.002
_ROWS_AT_ONCE = 8192  # of a random matrix


@dataclass(frozen=True)
class Shape(random_model.Shape):
    """Sizes of a random Llama; `tied`: the embedding is the head."""

    tied: bool = False

    @property
    def twin(self) -> "Shape":
        """The same in small: 8 layers of a quarter of the width, and at most 32,000 tokens."""
        return replace(
            self,
            name=f"{self.name}-twin",
            hidden=self.hidden // 4,
            layers=8,
            intermediate=self.intermediate // 4,
            vocabulary=min(self.vocabulary, 32000),
            heads=self.heads // 4,
            kv_heads=max(1, self.kv_heads // 4),
        )


SIZES = {
    "8b": Shape("llama-8b", 4096, 32, 14336, 128256, 32, 8),
    "3b": Shape("llama-3b", 3072, 28, 8192, 128256, 24, 8, tied=True),
    "1b": Shape("llama-1b", 2048, 22, 5632, 32000, 32, 4),
}
"""The shapes of Llama-3.1-8B, Llama-3.2-3B and TinyLlama-1.1B."""


def config_of(shape: Shape) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


def shards_of(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Tensor shapes by name: a shard per block, then one of what is outside the blocks."""
    d, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    block = {
        "input_layernorm": (d,),
        "mlp.down_proj": (d, shape.intermediate),
        "mlp.gate_proj": (shape.intermediate, d),
        "mlp.up_proj": (shape.intermediate, d),
        "post_attention_layernorm": (d,),
        "self_attn.k_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "self_attn.q_proj": (d, d),
        "self_attn.v_proj": (kv, d),
    }
    outside = {"model.embed_tokens.weight": (shape.vocabulary, d), "model.norm.weight": (d,)}
    if not shape.tied:
        outside["lm_head.weight"] = (shape.vocabulary, d)
    blocks = [
        {f"model.layers.{layer}.{name}.weight": size for name, size in block.items()} for layer in range(shape.layers)
    ]
    return [*blocks, outside]


def random_tensor(name: str, size: Sequence[int], seed: int) -> "torch.Tensor":
    """bf16 numbers that depend on the seed and the name alone: norms of 1, matrices of variance 1 / K."""
    import torch

    tensor = torch.ones(*size, dtype=torch.bfloat16)
    if len(size) == 2:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        scale = 1.0 if name == "model.embed_tokens.weight" else size[1] ** -0.5
        for rows in tensor.split(_ROWS_AT_ONCE):
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(scale))
    return tensor


def make_model(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint, one tensor in memory at a time; shards that are there are left as they are."""
    import torch

    from taq_vllm.model_files import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    shards = shards_of(shape)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file.name)
        if file.is_file():
            continue
        print(f"writing {file}", file=sys.stderr)
        partial = file.with_suffix(".partial")
        kinds = {name: (torch.bfloat16, size) for name, size in tensors.items()}
        write_tensors(partial, kinds, lambda name, tensors=tensors: random_tensor(name, tensors[name], seed))
        partial.rename(file)
    size = sum(2 * math.prod(size) for tensors in shards for size in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in _TOKENIZER_FILES:
        shutil.copy(LAB / "model" / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1))
    return folder


# Running the steps.


@dataclass
class Step:
    """One command, all its runs together.

    Attributes:
        name: of the step.
        seconds: of each run, killed ones too.
        peak_bytes: of each run, as the system measured it.
        killed_after: how much of the work was on disk when each killed run was killed, in blocks.
    """

    name: str
    seconds: list[float]
    peak_bytes: list[int]
    killed_after: list[int]


def run_step(
    name: str, arguments: Sequence[str], env: dict[str, str], blocks_done: Callable[[], int], kill_at: Sequence[int]
) -> Step:
    """Run a command of taq to its end, killing it on the way.

    Args:
        name: of the step.
        arguments: of `taq`.
        env: of its processes.
        blocks_done: tells how many blocks' work is on disk.
        kill_at: at how many blocks each run but the last is killed, a moment later; but never before it has done one.

    Raises:
        RuntimeError: the command failed, or a run ended before it was killed.
    """
    step = Step(name, [], [], [])
    for attempt, kill in enumerate([*kill_at, None]):
        done_before = blocks_done()
        if kill is not None:
            kill = max(kill, done_before + 1)
        print(f"{name}: run {attempt + 1}" + (f", killed from block {kill} on" if kill else ""), file=sys.stderr)
        started = time.monotonic()
        child = subprocess.Popen([*_TAQ, *arguments], env=env, stdout=subprocess.DEVNULL)
        if kill is not None:
            _wait_for(child.pid, blocks_done, done_before, kill)
            os.kill(child.pid, signal.SIGKILL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if kill is not None and child.returncode == -signal.SIGKILL:
            step.killed_after.append(blocks_done())
        elif child.returncode:
            raise RuntimeError(f"{name} failed with {child.returncode}: taq {' '.join(arguments)}")
        elif kill is not None:
            raise RuntimeError(
                f"{name} ended before it was killed, at block {kill}: nothing is shown about killed runs; use a larger "
                "model, or a machine with less other work"
            )
        step.seconds.append(round(time.monotonic() - started, 2))
        step.peak_bytes.append(usage.ru_maxrss * 1024)
    return step


def _wait_for(pid: int, blocks_done: Callable[[], int], done_before: int, kill: int) -> None:
    """Until so many blocks are done, and then for a random part of the next one."""
    begun = None  # when this run's first block was done: what comes before it is not the time of a block
    while child_is_alive(pid) and (done := blocks_done()) < kill:
        if begun is None and done > done_before:
            begun = (time.monotonic(), done)
        time.sleep(_POLL_S)
    if begun is not None:
        per_block = (time.monotonic() - begun[0]) / (kill - begun[1])
        time.sleep(random.Random(kill).uniform(0, per_block))


def child_is_alive(pid: int) -> bool:
    """Whether a child of this process is running; a finished one is left for `wait`."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def whole_way(
    model: Path, work: Path, shape: Shape, method: str, budget: str, threads: int, seed: int | None
) -> list[Step]:
    """Score, plan, quantize and verify.

    Args:
        model: the checkpoint.
        work: an empty folder for scores, plan and output.
        shape: of the model.
        method: of the quantizer.
        budget: of the plan.
        threads: that torch may use.
        seed: of the points at which runs are killed, in the first three quarters; None: they are not.

    Raises:
        RuntimeError: a command failed, or a run ended before it was killed.
    """
    drawn = random.Random(seed)

    def kills(step: str) -> list[int]:
        if seed is None:
            return []
        return sorted(drawn.sample(range(1, shape.layers * 3 // 4), dict(KILLS)[step]))

    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    task = str(LAB / "tasks/math/task.yaml")
    scores, plan, out = (str(work / name) for name in ("scores.json", "plan.json", "out"))
    settings = {"max_examples": PROMPTS, "max_tokens": MAX_TOKENS, "batch_size": 8}
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    on_task = [] if method == "rtn" else ["--task", task, "--examples", str(PROMPTS)]

    def scored() -> int:
        return sum(file.read_text().count("\n") for file in work.glob("scores.json.*.journal"))

    def quantized() -> int:
        return len(list(work.glob(".out.partial/model-*.safetensors")))

    def never() -> int:
        return 0

    score = ["score", str(model), "--scorer", "taq", "--task", task, "-o", scores, "--device", "cpu", *chosen]
    quantize = ["quantize", str(model), "--plan", plan, "-o", out, "--method", method, "--device", "cpu", *on_task]
    return [
        run_step("score", score, env, scored, kills("score")),
        run_step("plan", ["plan", str(model), "--scores", scores, "--budget", budget, "-o", plan], env, never, []),
        run_step("quantize", quantize, env, quantized, kills("quantize")),
        run_step("verify", ["verify", out], env, never, []),
    ]


def digests(work: Path) -> dict[str, str]:
    """sha256 of everything that was made: the scores themselves, the plan, and every file of the checkpoint."""
    scores = json.loads((work / "scores.json").read_text())
    found = {"scores.json: units": hashlib.sha256(json.dumps(scores["units"]).encode()).hexdigest()}
    for file in sorted([work / "plan.json", *(work / "out").iterdir()]):
        with file.open("rb") as stream:
            found[str(file.relative_to(work))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def run_in(work: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def compare_twin(shape: Shape, work: Path, budget: str, threads: int, seed: int) -> dict[str, Any]:
    """A killed run and one that was not, side by side: their times are not of interest.

    Args:
        shape: of the twin.
        work: a folder for its model and results.
        budget: of the plan.
        threads: that torch may use.
        seed: of the points at which runs are killed.

    Returns:
        What the line says of it: `killed_after` by step, and `files_that_differ`.

    Raises:
        RuntimeError: a command failed, or a run ended before it was killed.
    """
    model = make_model(shape, work / shape.name / "bf16")

    def run(name: str, kill_seed: int | None) -> tuple[list[Step], dict[str, str]]:
        folder = run_in(work / shape.name / name)
        steps = whole_way(model, folder, shape, _TWIN_METHOD, budget, threads, kill_seed)
        return steps, digests(folder)

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run, "interrupted", seed), pool.submit(run, "whole", None)]
        (steps, killed), (_, whole) = (each.result() for each in runs)
    return {
        "model": shape.name,
        "method": _TWIN_METHOD,
        "killed_after": {step.name: step.killed_after for step in steps if step.killed_after},
        "files": len(whole),
        "files_that_differ": sorted(n for n in killed.keys() | whole.keys() if killed.get(n) != whole.get(n)),
    }


def measure(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result line of one size."""
    from benchmarks.provenance import provenance

    run = (arguments.method, arguments.budget, arguments.threads)
    model = make_model(shape, arguments.work / shape.name / "bf16")
    folder = run_in(arguments.work / shape.name / "interrupted")
    steps = whole_way(model, folder, shape, *run, arguments.seed)
    twin = compare_twin(shape.twin, arguments.work, arguments.budget, arguments.threads, arguments.seed)
    out = folder / "out"
    peak = max(max(step.peak_bytes) for step in steps)
    line = {
        "benchmark": "large",
        "model": shape.name,
        "parameters": sum(math.prod(size) for tensors in shards_of(shape) for size in tensors.values()),
        "model_bytes": _folder_bytes(model),
        "output_bytes": _folder_bytes(out),
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "method": arguments.method,
        "budget": arguments.budget,
        "average_bits": json.loads((folder / "plan.json").read_text())["budget"]["average_bits"],
        "threads": arguments.threads,
        "steps": [vars(step) for step in steps],
        "peak_bytes": peak,
        "most_bytes": MOST_RESIDENT_BYTES,
        "memory_holds": peak <= MOST_RESIDENT_BYTES,
        "kills": sum(len(step.killed_after) for step in steps),
        "twin": twin,
        "files": digests(folder),
        **provenance(),
    }
    if arguments.clean:
        shutil.rmtree(arguments.work / shape.name)
    return line


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def render(lines: Sequence[dict[str, Any]]) -> Any:
    """The table of result lines."""
    from rich.table import Table

    table = Table(
        title="random weights in a model's shapes, a process for every step; wall time on a machine with other work, "
        f"in brackets an upper bound of peak resident memory; scores from {lines[0]['prompts']} prompts"
    )
    for column in ("model", "GB", "quantizer", "out GB"):
        table.add_column(column, justify="right" if "GB" in column else "left")
    for step in ("score", "plan", "quantize", "verify"):
        table.add_column(f"{step}, s (peak GB)", justify="right")
    for column in ("killed after blocks", "below 6 GB", "twin byte-equal", "processor, threads, commit"):
        table.add_column(column)
    for line in lines:
        cells = []
        for step in line["steps"]:
            cells.append(f"{sum(step['seconds']):.0f} ({max(step['peak_bytes']) / 1e9:.2f})")
        killed = _killed({step["name"]: step["killed_after"] for step in line["steps"]})
        table.add_row(
            line["model"],
            f"{line['model_bytes'] / 1e9:.2f}",
            f"{line['method']}, {line['average_bits']:.2f} bits",
            f"{line['output_bytes'] / 1e9:.2f}",
            *cells,
            killed,
            "yes" if line["memory_holds"] else "NO",
            _twin(line["twin"]),
            f"{line['processor']}, {line['threads']}, {line['commit']}",
        )
    return table


def _killed(after: dict[str, list[int]]) -> str:
    return "; ".join(f"{step} {', '.join(map(str, blocks))}" for step, blocks in after.items() if blocks)


def _twin(twin: dict[str, Any]) -> str:
    if twin["files_that_differ"]:
        return "NO: " + ", ".join(twin["files_that_differ"])
    if "killed_after" not in twin:  # lines of before they were kept
        return "yes (whether it was killed is not on record)"
    return f"yes ({twin['method']}; killed after {_killed(twin['killed_after'])})"


def add_line(file: Path, line: dict[str, Any]) -> list[dict[str, Any]]:
    """All lines of a file of results with this one, which takes the place of one of the same model and method."""
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    lines = [old for old in lines if (old["model"], old["method"]) != (line["model"], line["method"])] + [line]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return lines


def main() -> None:
    """Measure one size, add its line to the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--method", default="clip", help="of the quantizer")
    parser.add_argument("--budget", default="5.0bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the points at which runs are killed")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="model and results of the steps, kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large-cpu.jsonl"))
    parser.add_argument("--twin", action="store_true", help="only the small twin; nothing is written to --out")
    parser.add_argument("--clean", action="store_true", help="remove the model and the checkpoint at the end")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these lines")
    arguments = parser.parse_args()
    from rich.console import Console

    shape = SIZES[arguments.size]
    if arguments.twin:
        twin = compare_twin(shape.twin, arguments.work, arguments.budget, arguments.threads, arguments.seed)
        print(f"{twin['model']}: every file equal: {_twin(twin)}")
        sys.exit(bool(twin["files_that_differ"]))
    if arguments.table:
        lines = [json.loads(text) for text in arguments.table.read_text().splitlines()]
    else:
        lines = add_line(arguments.out, measure(shape, arguments))
    Console(width=220).print(render(lines))


if __name__ == "__main__":
    main()
