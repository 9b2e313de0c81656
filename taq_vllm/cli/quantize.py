"""`taq quantize` and `taq verify`: write a specialised checkpoint, and check one."""

import time
from pathlib import Path
from typing import Annotated

import typer

from taq_vllm.cli.options import (
    DEFAULT_HIDDEN_MEMORY,
    Device,
    Examples,
    GeneralData,
    HiddenMemory,
    Inputs,
    Json,
    MethodOption,
    MethodSetting,
    MixGeneral,
    Model,
    calibration_of,
    memory_of,
    out,
    print_json,
    print_plan,
    sizes,
    summary,
)
from taq_vllm.methods import DEFAULT_EXAMPLES, DEFAULT_METHOD
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Plan


def quantize(
    model: Model,
    plan_file: Annotated[Path, typer.Option("--plan", help="Plan file made by `taq plan`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint's folder.")],
    task: Annotated[Path | None, typer.Option(help="Task on whose inputs the method fits.")] = None,
    method: MethodOption = DEFAULT_METHOD,
    method_set: MethodSetting = None,
    examples: Examples = DEFAULT_EXAMPLES,
    inputs: Inputs = "quantized",
    mix_general: MixGeneral = 0.0,
    general_data: GeneralData = None,
    device: Device = "auto",
    hidden_memory: HiddenMemory = DEFAULT_HIDDEN_MEMORY,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan's sizes, run two blocks, and print what the whole takes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the specialised checkpoint."""
    files = ModelFiles(model)
    loaded = Plan.load(plan_file)
    from taq_vllm.checkpoint import quantize_model
    from taq_vllm.distributed import start, world
    from taq_vllm.fitting import method_named
    from taq_vllm.preflight import quantize_estimate
    from taq_vllm.scoring import peak_memory_bytes
    from taq_vllm.tasks import load_task

    calibration = calibration_of(method, examples, inputs, method_set, mix_general, general_data)
    on, limit, examples_of = start(device), memory_of(hidden_memory), load_task(task) if task else None
    if dry_run:
        loaded.check_fits(files.ref, files.matrices, files.head, where=str(plan_file))
        estimate = None  # of memory and time, for which the examples are needed
        if examples_of or not method_named(method).READS_INPUTS:
            estimate = quantize_estimate(files, loaded, output, calibration, examples_of, on, limit)
        if world()[0] > 0:
            return
        if as_json:
            print_json(sizes(loaded) | {"estimate": estimate and estimate.record()})
            return
        print_plan(loaded, files)
        out.print("\n".join(estimate.lines()) if estimate else "give --task as well, to know memory and time")
        return
    started = time.monotonic()
    fresh = quantize_model(files, loaded, output, calibration, examples_of, on, limit)
    if world()[0] > 0:
        return
    seconds, peak = time.monotonic() - started, peak_memory_bytes()
    if as_json:
        spent = {"seconds": seconds, "peak_memory_bytes": peak}
        print_json({"output": str(output), "done_before": not fresh, **spent, **sizes(loaded)})
        return
    out.print(f"{output} {'written' if fresh else 'was finished already; nothing was run'}: {summary(loaded)}")
    out.print(f"{seconds:.1f} s, peak memory {peak / 1e6:.0f} MB")
    out.print(f"serve it: vllm serve {output} --quantization taq")


def verify(checkpoint: Annotated[Path, typer.Argument(help="A folder written by taq.")], as_json: Json = False) -> None:
    """Check a checkpoint: every file's sha256, and plan, config and tensors against each other."""
    from taq_vllm.checkpoint import verify as run

    result = run(checkpoint)
    if as_json:
        print_json({"files": result.files, "bytes": result.bytes, **sizes(result.plan)})
        return
    out.print(f"{checkpoint} is whole: {result.files} files, {result.bytes / 1e6:.2f} MB; {summary(result.plan)}")
