"""`taq specialize`: the whole way with one call."""

from pathlib import Path
from typing import Annotated

import typer

from taq_vllm.cli.options import (
    DEFAULT_HIDDEN_MEMORY,
    AllocationOption,
    Asymmetric,
    BudgetOption,
    Device,
    DeviceTable,
    EdgeBits,
    Edges,
    Examples,
    FixedMs,
    ForDevice,
    GeneralData,
    HiddenMemory,
    Inputs,
    Json,
    MethodOption,
    MethodSetting,
    MixGeneral,
    Model,
    Pin,
    PlanGranularity,
    PlanHead,
    ScorerOption,
    Setting,
    Symmetric,
    TaskOption,
    Threads,
    UniformFused,
    calibration_of,
    latencies_of,
    memory_of,
    out,
    print_json,
    print_plan,
    print_scores,
    request_of,
    settings_of,
    sizes,
)
from taq_vllm.methods import DEFAULT_EXAMPLES, DEFAULT_METHOD
from taq_vllm.model_files import ModelFiles
from taq_vllm.scorers import DEFAULT_SCORER


def specialize(
    model: Model,
    task: TaskOption,
    budget: BudgetOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The new checkpoint's folder.")],
    scorer: ScorerOption = DEFAULT_SCORER,
    setting: Setting = None,
    allocation: AllocationOption = None,
    granularity: PlanGranularity = None,
    head: PlanHead = False,
    uniform_fused: UniformFused = False,
    edges: Edges = 0,
    edge_bits: EdgeBits = 16,
    pin: Pin = None,
    symmetric: Symmetric = None,
    asymmetric: Asymmetric = None,
    method: MethodOption = DEFAULT_METHOD,
    method_set: MethodSetting = None,
    examples: Examples = DEFAULT_EXAMPLES,
    inputs: Inputs = "quantized",
    mix_general: MixGeneral = 0.0,
    general_data: GeneralData = None,
    device_table: DeviceTable = None,
    fixed_ms: FixedMs = None,
    for_device: ForDevice = None,
    threads: Threads = None,
    device: Device = "auto",
    hidden_memory: HiddenMemory = DEFAULT_HIDDEN_MEMORY,
    force: Annotated[bool, typer.Option("--force", help="Replace other scores in OUTPUT.work.")] = False,
    as_json: Json = False,
) -> None:
    """Score, plan, quantize and verify in one go; scores and plan are kept in OUTPUT.work."""
    from taq_vllm.distributed import start, world
    from taq_vllm.specialize import specialize as run
    from taq_vllm.tasks import load_task

    files = ModelFiles(model)
    request = request_of(
        budget=budget,
        allocation=allocation,
        edges=edges,
        edge_bits=edge_bits,
        pin=pin,
        granularity=granularity,
        head=head,
        uniform_fused=uniform_fused,
        symmetric=symmetric,
        asymmetric=asymmetric,
        latencies=latencies_of([budget], device_table, for_device, threads, fixed_ms),
    )
    calibration = calibration_of(method, examples, inputs, method_set, mix_general, general_data)
    limit, chosen = memory_of(hidden_memory), load_task(task)
    done = run(files, chosen, output, request, calibration, scorer, settings_of(setting), start(device), force, limit)
    if world()[0] > 0:
        return
    if as_json:
        record = {"output": str(output), "scored": done.scored_now, "quantized": done.quantized_now}
        print_json(record | sizes(done.plan))
        return
    print_scores(done.scores)
    print_plan(done.plan, files)
    out.print(f"{output} {'written and verified' if done.quantized_now else 'was finished already; verified again'}")
    out.print(f"serve it: vllm serve {output} --quantization taq")
