"""How much of round-to-nearest's damage does each quantizer undo, and how long does it take next to llm-compressor?

Damage: every matrix of the lab model, plain and conditioned, at 4 bits, by each method with its defaults and the
task's own calibration examples (all 512, as `taq quantize` does, and the first 128), written as a checkpoint and read
back. KL(full || quantized) in nats of the next-token distributions, averaged over the answers' tokens of test items,
weights as the codes stand for them, computed in float32. The share of `rtn`'s KL that a method closes has a 95%
interval by bootstrap over items (paired). Must hold: `gptq` or `learned` closes at least half of it on every task of
both models; for each of the two it is said whether the estimate does, and whether the interval's lower bound does.

Time: two blocks of TinyLlama's shape with random weights; the same matrices, the same calibration tokens, one thread,
a fresh process for each, in turn. For ours: reading the blocks, fitting, packing, and the passes to the next block; for
llm-compressor, which has the whole model loaded beforehand: `oneshot`, and packing in memory. Must hold: no method
takes more than twice of its counterpart's time (rtn: QuantizationModifier; clip: the same with its search of ranges by
importance, `imatrix_mse`; gptq: GPTQModifier; awq: AWQModifier; learned: AutoRoundModifier with as many steps).

    python -m benchmarks.quantizers --out benchmarks/results/quantizers-cpu.jsonl
    make peers-llmcompressor
    python -m benchmarks.quantizers --peer --out benchmarks/results/quantizers-time-cpu.jsonl
    python -m benchmarks.quantizers --table FILE ...
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.random_model import Shape, make_model, make_prompts

if TYPE_CHECKING:
    import torch

LAB = Path(__file__).parent / "lab"
PEER_PYTHON = Path(__file__).parents[1] / ".venv-llmcompressor" / "bin" / "python"
PEER_SCRIPT = Path(__file__).parent / "peers" / "time_llmcompressor.py"
TASKS = ("trivia", "math", "code")
METHODS = ("rtn", "clip", "awq", "gptq", "learned")
BITS = 4
NAMED = ("gptq", "learned")
"""What has to close at least `LEAST_CLOSED`, each judged by itself."""
LEAST_CLOSED = 0.5
MOST_TIME = 2.0
BLOCKS = Shape("tinyllama-2-blocks", 2048, 2, 5632, 3072, 32, 4)
SEQUENCES, TOKENS = 32, 128
_DRAWS = 2000


# Damage.


def full_plan(files: Any, bits: int) -> Any:
    """Every matrix inside the blocks at so many bits."""
    from taq_vllm.plan import SYMMETRIC, Allocation, Budget, MatrixPlan, Plan

    matrices = {
        name: MatrixPlan(bits=bits, symmetric=SYMMETRIC[bits], shape=shape, why="baseline")
        for name, shape in files.matrices.items()
    }
    budget = Budget.of(f"uniform {bits} bits", matrices, files.bytes_beside(matrices))
    return Plan(base_model=files.ref, allocation=Allocation(name="uniform"), budget=budget, matrices=matrices)


def load_weights(model: "torch.nn.Module", folder: Path) -> None:
    """Put what a checkpoint of this project stands for into a model, in the model's dtype."""
    from taq_vllm.checkpoint import unpack
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.plan import PLAN_FILE, Plan

    files, plan = ModelFiles(folder), Plan.load(folder / PLAN_FILE)
    for name, parameter in model.named_parameters():
        matrix = name.removesuffix(".weight")
        if name in files.tensors:
            parameter.data.copy_(files.read(name))
        else:
            tensors = {key: files.read(key) for key in files.tensors if key.startswith(f"{matrix}.weight_")}
            parameter.data.copy_(unpack(matrix, tensors, plan.matrices[matrix]).dequantize())


def answer_log_probabilities(model: "torch.nn.Module", sequences: Sequence[Any]) -> "list[torch.Tensor]":
    """Next-token log-probabilities at the answer's positions, [tokens, vocabulary] float32 per sequence."""
    import torch

    found = []
    with torch.inference_mode():
        for sequence in sequences:
            logits = model(input_ids=torch.tensor([sequence.input_ids]), use_cache=False).logits[0]
            found.append(logits[sequence.prompt_len - 1 : -1].log_softmax(-1))
    return found


def divergences(full: "Sequence[torch.Tensor]", other: "Sequence[torch.Tensor]") -> list[float]:
    """Sum over one sequence's positions of KL(full || other), in nats, per sequence."""
    return [float((p.exp() * (p - q)).sum()) for p, q in zip(full, other, strict=True)]


def closed(base: Sequence[float], other: Sequence[float], draws: int = _DRAWS) -> tuple[float, float, float]:
    """The share of the base's summed KL that is gone, and its 95% interval by bootstrap over the same items."""
    import numpy

    pairs = numpy.array([base, other])
    drawn = numpy.random.default_rng(0).integers(0, len(base), (draws, len(base)))
    sums = pairs[:, drawn].sum(-1)
    low, high = numpy.quantile(1 - sums[1] / sums[0], [0.025, 0.975])
    return float(1 - pairs[1].sum() / pairs[0].sum()), float(low), float(high)


def measure_damage(
    variant: str,
    folder: Path,
    task_name: str,
    items: int,
    examples: int,
    methods: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The result line of one model and task.

    Args:
        variant: plain or conditioned.
        folder: of the model.
        task_name: of a lab task.
        items: the first so many of its test set.
        examples: the first so many of its calibration set.
        methods: `rtn` among them.
        settings: of methods, where they are not the defaults.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.provenance import provenance
    from taq_vllm.checkpoint import Calibration, quantize_model
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.tasks import load_task, tokenize

    task, files = load_task(LAB / "tasks" / task_name), ModelFiles(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.config.max_position_embeddings
    sequences = tokenize(task.test[:items], tokenizer, task, with_completion=True, max_length=length)
    positions = sum(len(sequence.input_ids) - sequence.prompt_len for sequence in sequences)
    full = answer_log_probabilities(model, sequences)
    sums: dict[str, list[float]] = {}
    seconds, cpu_seconds = {}, {}
    for method in methods:
        with tempfile.TemporaryDirectory() as work:
            calibration = Calibration(method=method, settings=settings.get(method, {}), examples=examples)
            started, cpu_started = time.perf_counter(), time.process_time()
            quantize_model(files, full_plan(files, BITS), Path(work) / "out", calibration, task)
            cpu_seconds[method] = (time.process_time() - cpu_started) / files.layers
            seconds[method] = (time.perf_counter() - started) / files.layers
            load_weights(model, Path(work) / "out")
        sums[method] = divergences(full, answer_log_probabilities(model, sequences))
    return {
        "benchmark": "quantizers",
        "model": f"lab ({variant})",
        "task": task_name,
        "bits": BITS,
        "items": len(sequences),
        "answer_tokens": positions,
        "calibration_examples": examples,
        "settings": {name: dict(value) for name, value in settings.items()},
        "kl": {method: sum(values) / positions for method, values in sums.items()},
        "closed": {method: closed(sums["rtn"], values) for method, values in sums.items()},
        "seconds_per_block": seconds,
        "cpu_seconds_per_block": cpu_seconds,
        "threads": torch.get_num_threads(),
        **provenance(),
    }


def damage_holds(line: Mapping[str, Any]) -> dict[str, tuple[bool, bool]]:
    """Per named method: whether the estimate reaches `LEAST_CLOSED`, and whether the interval's lower bound does."""
    shares = {method: line["closed"][method] for method in NAMED if method in line["closed"]}
    return {method: (share >= LEAST_CLOSED, low >= LEAST_CLOSED) for method, (share, low, _) in shares.items()}


def render_damage(lines: Sequence[dict[str, Any]]) -> Any:
    """The table of KL, from its lines alone."""
    from rich.table import Table

    head = lines[0]
    methods = list(head["kl"])
    table = Table(
        title=f"uniform {head['bits']} bits: KL to full precision in millinats per answer token, and the share of "
        f"rtn's that is closed [95%]; {head['items']} items; {head['processor']}, commit {head['commit']}"
    )
    for column in ("model", "task", "examples", *methods, f"at least {LEAST_CLOSED:.0%}: estimate, lower bound"):
        table.add_column(column, justify="left" if column in ("model", "task") else "right")
    for line in lines:
        cells = []
        for method in methods:
            share, low, high = line["closed"][method]
            cell = f"{1000 * line['kl'][method]:.2f}"
            cells.append(cell if method == "rtn" else f"{cell}\n{share:.0%} [{low:.0%}, {high:.0%}]")
        judged = "\n".join(
            f"{method} {_yes(estimate)}, {_yes(low)}" for method, (estimate, low) in damage_holds(line).items()
        )
        table.add_row(line["model"], line["task"], str(line["calibration_examples"]), *cells, judged)
    for examples in dict.fromkeys(line["calibration_examples"] for line in lines):
        of_amount = [line["cpu_seconds_per_block"] for line in lines if line["calibration_examples"] == examples]
        spent = [f"{median(seconds[method] for seconds in of_amount):.2f}" for method in methods]
        table.add_row("CPU seconds per block", "", str(examples), *spent, "")
    return table


def summary(lines: Sequence[dict[str, Any]], examples: int) -> Any:
    """What each method closes of rtn's KL: methods down, models and tasks across.

    Args:
        lines: of the damage.
        examples: only lines of so many calibration examples.
    """
    from rich.table import Table

    of_amount = [line for line in lines if line["calibration_examples"] == examples]
    table = Table(
        title=f"share of rtn's KL to full precision that is closed at uniform {lines[0]['bits']} bits, {examples} "
        f"calibration examples of the task, {lines[0]['items']} test items [95%]"
    )
    table.add_column("method")
    for line in of_amount:
        table.add_column(f"{line['model']}: {line['task']}", justify="right")
    for method in [method for method in lines[0]["closed"] if method != "rtn"]:
        shares = [[100 * value for value in line["closed"][method]] for line in of_amount]
        table.add_row(method, *(f"{share:.0f}% [{low:.0f}, {high:.0f}]" for share, low, high in shares))
    return table


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


# Time.


def time_blocks(method: str, folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Seconds to fit every block of a model by `taq quantize`'s own walk, without writing."""
    from taq_vllm.checkpoint import Calibration, fit_blocks
    from taq_vllm.model_files import ModelFiles
    from taq_vllm.stream import StreamedModel, make_batches
    from taq_vllm.tasks import TokenizedExample

    calibration = Calibration(method=method)
    model = StreamedModel(ModelFiles(folder), "cpu")
    sequences = [TokenizedExample(ids, len(ids)) for ids in prompts] if calibration.chains else []
    batches = make_batches(sequences, calibration.batch_size)
    started, cpu_started = time.perf_counter(), time.process_time()
    fit_blocks(model, full_plan(model.files, BITS), calibration, batches)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "dtype": str(model.compute_dtype).removeprefix("torch."),
    }


def measure_time(methods: Sequence[str], repeats: int, work: Path, shape: Shape) -> list[dict[str, Any]]:
    """One result line per method; ours and theirs in turn.

    Args:
        methods: of this project.
        repeats: of each.
        work: where the random model is made.
        shape: of it.
    """
    from benchmarks.provenance import provenance
    from taq_vllm.fitting import settings_of

    folder = str(make_model(shape, work))
    prompts = make_prompts(SEQUENCES, TOKENS, shape.vocabulary, seed=0)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    steps = settings_of("learned", {}).steps
    spec = work / "quantizers-tokens.json"
    spec.write_text(json.dumps(prompts))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for method in methods:
            ours = [sys.executable, "-m", "benchmarks.quantizers", "--child", method, folder, str(spec)]
            dtype = _ask(ours, env, found.setdefault((method, "ours"), []))["dtype"]
            theirs = [str(PEER_PYTHON), str(PEER_SCRIPT), method, folder, str(spec), "--bits", str(BITS)]
            _ask([*theirs, "--dtype", dtype, "--iterations", str(steps)], env, found.setdefault((method, "theirs"), []))
    lines = []
    for method in methods:
        ours, theirs = found[method, "ours"], found[method, "theirs"]
        ratios = [mine["cpu_seconds"] / other["cpu_seconds"] for mine, other in zip(ours, theirs, strict=True)]
        lines.append(
            {
                "benchmark": "quantizers-time",
                "model": shape.name,
                "method": method,
                "counterpart": theirs[0]["counterpart"],
                "llmcompressor": theirs[0]["version"],
                "counterpart_iterations": theirs[0]["iterations"],
                "tokens": SEQUENCES * TOKENS,
                "dtype": ours[0]["dtype"],
                "seconds": [each["seconds"] for each in ours],
                "counterpart_seconds": [each["seconds"] for each in theirs],
                "cpu_seconds": [each["cpu_seconds"] for each in ours],
                "counterpart_cpu_seconds": [each["cpu_seconds"] for each in theirs],
                "ratios": ratios,
                "ratio": median(ratios),
                "holds": median(ratios) <= MOST_TIME,
                "threads": 1,
                **provenance(),
            }
        )
    return lines


def _ask(command: list[str], env: Mapping[str, str], answers: list[dict[str, Any]]) -> dict[str, Any]:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    answers.append(json.loads(done.stdout.splitlines()[-1]))
    return answers[-1]


def render_time(lines: Sequence[dict[str, Any]]) -> Any:
    """The table of times, from its lines alone."""
    from rich.table import Table

    head = lines[0]
    table = Table(
        title=f"{head['model']}, {head['tokens']} tokens, {head['dtype']}; {head['processor']}, 1 thread, "
        f"llm-compressor {head['llmcompressor']}; CPU seconds, median (min-max)"
    )
    ratio = f"ratio (at most {MOST_TIME:g})"
    for column in ("method", "taq", "counterpart", "llm-compressor", ratio, "holds", "commit"):
        table.add_column(column, justify="left" if column in ("method", "counterpart") else "right")

    def spread(values: Sequence[float]) -> str:
        return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    for line in lines:
        table.add_row(
            line["method"],
            spread(line["cpu_seconds"]),
            line["counterpart"],
            spread(line["counterpart_cpu_seconds"]),
            spread(line["ratios"]),
            _yes(line["holds"]),
            line["commit"],
        )
    return table


def render(lines: Sequence[dict[str, Any]]) -> list[Any]:
    """The tables of a run."""
    damage = [line for line in lines if line["benchmark"] == "quantizers"]
    times = [line for line in lines if line["benchmark"] == "quantizers-time"]
    return ([render_damage(damage)] if damage else []) + ([render_time(times)] if times else [])


def main() -> None:
    """Measure, write one JSON line per model and task (or method), print the table made from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the lines go")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="models, kept for the next run")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--variants", nargs="+", default=("plain", "conditioned"), choices=("plain", "conditioned"))
    parser.add_argument("--items", type=int, default=256, help="test items per task")
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[512, 128], help="calibration examples of each task, one run each"
    )
    parser.add_argument("--settings", type=json.loads, default={}, help='of methods, as {"learned": {"steps": 400}}')
    parser.add_argument("--peer", action="store_true", help="time, next to llm-compressor")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print the tables of these lines")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        method, folder, spec = arguments.child
        print(json.dumps(time_blocks(method, folder, json.loads(Path(spec).read_text()))))
        return
    from rich.console import Console

    if arguments.table:
        lines = [json.loads(line) for file in arguments.table for line in file.read_text().splitlines()]
    elif arguments.peer:
        if not PEER_PYTHON.exists():
            parser.error(f"no {PEER_PYTHON}: run `make peers-llmcompressor`")
        arguments.work.mkdir(parents=True, exist_ok=True)
        lines = measure_time(arguments.methods, arguments.repeats, arguments.work, BLOCKS)
    else:
        from benchmarks.lab.condition import condition

        lines = []
        for variant in arguments.variants:
            folder = LAB / "model"
            if variant == "conditioned":
                arguments.work.mkdir(parents=True, exist_ok=True)
                folder = condition(folder, arguments.work / "lab-conditioned")
            methods = [method for method in METHODS if method in {"rtn", *arguments.methods}]
            for task in arguments.tasks:
                for examples in arguments.examples:
                    amounts = arguments.items, examples
                    lines.append(measure_damage(variant, folder, task, *amounts, methods, arguments.settings))
    if arguments.out and not arguments.table:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for table in render(lines):
        Console(width=180).print(table)


if __name__ == "__main__":
    main()
