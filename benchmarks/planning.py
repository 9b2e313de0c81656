"""What does scoring a model with `taq` cost, next to the forward passes that it cannot do without?

Time: one scoring run (`score_units`: blocks read from disk one by one, statistics of every layer) over plain forward
passes of transformers on the same batches with the whole model in memory. The plain pass stops before the head, which
scoring does not need either: with it, the ratio would look better. Both alternate in one process.

Memory: the peak of a fresh process that scores, less that of one that scores a tiny model (imports and what torch and
its libraries allocate when first used), against what it may take: embedding, two blocks and the hidden states of the
calibration set, all in 16 bits even where the walk computes in float32. The allocator is told to give freed memory
back at once; what it would keep for later is not what scoring needs. (The lab model is hardly larger than the tiny
one: its line can only say that there is nothing else.)

    python -m benchmarks.planning --out benchmarks/results/planning.jsonl
    python -m benchmarks.planning --table benchmarks/results/planning.jsonl

Two cases: a random Llama whose blocks and embedding have realistic proportions, and the lab model on its own task.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.random_model import TINY, Shape, make_model, make_prompts

if TYPE_CHECKING:
    from taq_vllm.scoring import Run
    from taq_vllm.stream import Batch, StreamedModel
    from taq_vllm.tasks import TokenizedExample

LAB = Path(__file__).parent / "lab"
MOST_TIME = 1.3
"""Times the plain forward passes."""
WIDE = Shape("llama-0.1B", 1024, 4, 3072, 32000, 16, 4)


@dataclass(frozen=True)
class Case:
    """A model and its calibration set.

    Attributes:
        name: of the model.
        model: its folder.
        examples: calibration examples; of the lab model's trivia task, or random ones of 64 to 128 tokens.
        repeats: pairs of plain passes and scoring runs.
        task: a task's header; None for random tokens.
    """

    name: str
    model: str
    examples: int
    repeats: int
    task: str | None = None


def smallest_case(work: Path) -> Case:
    """What runs every library once; its model is made in `work` if it is missing."""
    return Case(TINY.name, str(make_model(TINY, work)), examples=8, repeats=1)


def cases(work: Path) -> list[Case]:
    """What is measured; models are made in `work` where they are missing."""
    return [
        Case(WIDE.name, str(make_model(WIDE, work)), examples=32, repeats=3),
        Case("lab (plain)", str(LAB / "model"), examples=256, repeats=5, task=str(LAB / "tasks/trivia/task.yaml")),
    ]


def calibration(case: Case, model: "StreamedModel") -> "list[TokenizedExample]":
    """The case's calibration set as tokens."""
    from taq_vllm.scoring import calibration_sequences
    from taq_vllm.tasks import TokenizedExample, load_task

    if case.task:
        return calibration_sequences(model, load_task(case.task), case.examples, with_completion=False)
    lengths = [64 + 64 * i // case.examples for i in range(case.examples)]
    return [
        TokenizedExample(make_prompts(1, length, model.config.vocab_size, seed=i)[0], length)
        for i, length in enumerate(lengths)
    ]


def allowed_bytes(model: "StreamedModel", batches: "Sequence[Batch]") -> dict[str, int]:
    """Embedding, two blocks and hidden states, all in the model's 16 bits."""
    from taq_vllm.units import layer_of

    item = model.dtype.itemsize
    blocks: dict[int, int] = {}
    for name, info in model.files.tensors.items():
        if name.startswith("model.layers."):
            size = item
            for side in info.shape:
                size *= side
            blocks[layer_of(name)] = blocks.get(layer_of(name), 0) + size
    rows, columns = model.files.tensors["model.embed_tokens.weight"].shape
    return {
        "embedding": rows * columns * item,
        "two_blocks": 2 * max(blocks.values()),
        "hidden_states": sum(batch.input_ids.numel() for batch in batches) * columns * item,
    }


def run_of(model: "StreamedModel", sequences: "list[TokenizedExample]", folder: str) -> "Run":
    """Every block of a model to score on some sequences, from the start; the journal is in `folder`."""
    from taq_vllm.scoring import Run
    from taq_vllm.units import units_of

    units = units_of(model.files.matrices, "layer")
    for left in Path(folder).iterdir():
        left.unlink()
    return Run(model.files, "cpu", model, None, sequences, "layer", units, Path(folder) / "journal")


# Children: fresh processes, each prints its answer as JSON.


def _prepare(case: Case) -> tuple[Any, Any, Any, Any]:
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.scorers import taq
    from taq_vllm.stream import StreamedModel, make_batches

    settings = taq.Settings()
    model = StreamedModel(ModelFiles(case.model), "cpu")
    sequences = calibration(case, model)
    return model, sequences, make_batches(sequences, settings.batch_size, settings.max_tokens), settings


def _time(case: Case) -> dict[str, Any]:
    """Seconds of plain passes and of scoring runs, in turn, after one warm-up of each."""
    with tempfile.TemporaryDirectory() as folder:
        return _time_in(case, folder)


def _time_in(case: Case, folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from taq_vllm.scorers import taq

    streamed, sequences, batches, settings = _prepare(case)
    plain = AutoModelForCausalLM.from_pretrained(
        case.model, dtype=streamed.compute_dtype, attn_implementation="sdpa"
    ).model

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            plain(input_ids=batch.input_ids, use_cache=False)

    def score() -> None:
        taq.score_units(run_of(streamed, sequences, folder), settings)

    def seconds(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    with torch.inference_mode():
        plain(input_ids=batches[-1].input_ids, use_cache=False)
    taq.score_units(run_of(streamed, sequences[: settings.batch_size], folder), settings)
    cpu_started, started = time.process_time(), time.perf_counter()
    pairs = [(seconds(forward), seconds(score)) for _ in range(case.repeats)]
    return {
        "plain_s": [pair[0] for pair in pairs],
        "score_s": [pair[1] for pair in pairs],
        "cpu_share": (time.process_time() - cpu_started) / (time.perf_counter() - started),
        "tokens": sum(int(batch.lengths.sum()) for batch in batches),
        "allowed_bytes": allowed_bytes(streamed, batches),
    }


def _score(case: Case) -> dict[str, Any]:
    """Peak memory."""
    from taq_vllm.scorers import taq

    model, sequences, _, settings = _prepare(case)
    with tempfile.TemporaryDirectory() as folder:
        taq.score_units(run_of(model, sequences, folder), settings)
    return {"peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """Highest resident memory of this program; `ru_maxrss` would count the parent's until it was started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; measure on Linux")


_ROLES = {"time": _time, "score": _score}


def _ask(role: str, case: Case, cores: Sequence[int]) -> dict[str, Any]:
    env = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1"}
    if role == "score":
        env |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # glibc: larger allocations are mapped, and unmapped when freed
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning", "--child", role, json.dumps([asdict(case), list(cores)])],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# Measuring.


def measure(case: Case, smallest: Case, cores: Sequence[int]) -> dict[str, Any]:
    """The result line of one case.

    Args:
        case: what is scored.
        smallest: a case whose own memory is next to nothing.
        cores: that every child is bound to, one thread each.
    """
    from benchmarks.provenance import provenance

    timed = _ask("time", case, cores)
    peak, libraries = (_ask("score", each, cores)["peak_bytes"] for each in (case, smallest))
    return make_line(case, timed, peak, libraries) | {
        "threads": len(cores),
        "bound_to_cores": list(cores),
        **provenance(),
    }


def make_line(case: Case, timed: Mapping[str, Any], peak_bytes: int, library_bytes: int) -> dict[str, Any]:
    """What a line says, from what the children said.

    Args:
        case: what was scored.
        timed: the answer of the timing child.
        peak_bytes: of the process that scored.
        library_bytes: of the process that scored next to nothing.
    """
    ratios = [score / plain for plain, score in zip(timed["plain_s"], timed["score_s"], strict=True)]
    allowed = sum(timed["allowed_bytes"].values())
    return {
        "benchmark": "planning",
        "model": case.name,
        "scorer": "taq",
        "examples": case.examples,
        "tokens": timed["tokens"],
        "plain_s": timed["plain_s"],
        "score_s": timed["score_s"],
        "ratios": ratios,
        "ratio": median(ratios),
        "time_holds": median(ratios) <= MOST_TIME,
        "cpu_share": timed["cpu_share"],
        "peak_bytes": peak_bytes - library_bytes,
        "library_bytes": library_bytes,
        "allowed_bytes": timed["allowed_bytes"],
        "memory_holds": peak_bytes - library_bytes <= allowed,
    }


def render(lines: Sequence[dict[str, Any]]) -> Any:
    """The table of a run, from its lines alone."""
    from rich.table import Table

    head = lines[0]
    table = Table(
        title=f"scoring with taq; {head['processor']}, {head['threads']} thread(s), commit {head['commit']}; "
        "median (min-max)"
    )
    columns = ("model", "tokens", "plain passes, s", "scoring, s", f"ratio (at most {MOST_TIME})")
    for column in (*columns, "peak MB", "allowed MB", "holds"):
        table.add_column(column, justify="left" if column in ("model", "holds") else "right")

    def spread(values: Sequence[float]) -> str:
        return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    for line in lines:
        parts = ", ".join(f"{part / 1e6:.0f}" for part in line["allowed_bytes"].values())
        table.add_row(
            line["model"],
            str(line["tokens"]),
            spread(line["plain_s"]),
            spread(line["score_s"]),
            spread(line["ratios"]),
            f"{line['peak_bytes'] / 1e6:.0f}",
            f"{sum(line['allowed_bytes'].values()) / 1e6:.0f} ({parts})",
            f"time {'yes' if line['time_holds'] else 'NO'}, memory {'yes' if line['memory_holds'] else 'NO'}",
        )
    return table


def main() -> None:
    """Measure, write one JSON line per case, print the table made from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/planning.jsonl"))
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="models, kept for the next run")
    parser.add_argument("--cores", default=str(max(os.sched_getaffinity(0))), help="as 1 or 0,1; one thread on each")
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: does it run at all?")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these lines")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        role, spec = arguments.child
        case, cores = json.loads(spec)
        os.sched_setaffinity(0, cores)
        print(json.dumps(_ROLES[role](Case(**case))))
        return
    from rich.console import Console

    if arguments.table:
        lines = [json.loads(line) for line in arguments.table.read_text().splitlines()]
    else:
        cores = [int(core) for core in arguments.cores.split(",")]
        smallest = smallest_case(arguments.work)
        measured = [smallest] if arguments.quick else cases(arguments.work)
        lines = [measure(case, smallest, cores) for case in measured]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Console(width=180).print(render(lines))


if __name__ == "__main__":
    main()
