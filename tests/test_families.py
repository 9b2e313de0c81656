"""Every family from its 16-bit checkpoint to served tokens: scored, planned, quantized, served, read by transformers.

Configurations are the real models' own, narrower and of two layers: what makes a family (its norms, rotary embedding,
biases, shared heads, what is fused on disk) is as in the model that is named.
"""

import json
import re

import pytest
import torch
from engines import MEAN_DIFFERENCE, assert_agrees, reference, serve
from safetensors.torch import load_file, save_file
from tiny_models import LAB_MODEL, make_tiny
from transformers import AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16_experts,
)
from vllm.model_executor.model_loader import get_model_loader

from taq_vllm.allocate import Request
from taq_vllm.checkpoint import Calibration, unpack
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, Plan
from taq_vllm.specialize import specialize
from taq_vllm.tasks import load_task
from taq_vllm.units import experts_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# 0.75 of 64 dimensions rotate, in pairs: 24 factors.
PHI4_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 24,
    "long_factor": [1.0 + 0.1 * i for i in range(24)],
    "original_max_position_embeddings": 256,
}
FAMILIES = {
    "Llama-3.2-1B": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "head_dim": 64}),
    "Llama-3.1-8B": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "Qwen2.5-7B": ("qwen2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}),
    "Qwen2.5-0.5B": ("qwen2", {"num_attention_heads": 8, "rms_norm_eps": 1e-6}),
    "Qwen3-8B": ("qwen3", {"head_dim": 128, "rms_norm_eps": 1e-6}),
    "Mistral-7B-v0.3": ("mistral", {"sliding_window": None}),
    "Mistral-7B-v0.1": ("mistral", {"sliding_window": 24}),
    "Phi-4-mini": (
        "phi3",
        {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "rope_parameters": PHI4_ROPE},
    ),
    "gemma-3-1b": (
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 1},
    ),
    "Qwen3-30B-A3B": ("qwen3_moe", {"norm_topk_prob": True}),
}


def make_family(name, folder):
    model_type, settings = FAMILIES[name]
    return make_tiny(model_type, folder, num_hidden_layers=2, **settings)


def specialized(model, out, budget="6.5bits", method="gptq", **settings):
    request = Request(budget, **settings)
    task = load_task(LAB_MODEL.parent / "tasks" / "trivia")
    calibration = Calibration(method=method, examples=16)
    return specialize(ModelFiles(model), task, out, request, calibration, scorer_settings={"max_examples": 8})


def dequantized(folder, out):
    """The checkpoint's own numbers, exactly, as a plain model in float32, which every program reads."""
    files, plan = ModelFiles(folder), Plan.load(folder / "taq_plan.json")
    tensors = {}
    for name in files.tensors:
        matrix, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            stored = {key: files.read(key) for key in files.tensors if key.startswith(f"{matrix}.weight_")}
            stored[f"{matrix}.weight_scale"] = stored[f"{matrix}.weight_scale"].float()
            tensors[f"{matrix}.weight"] = unpack(matrix, stored, plan.matrices[matrix]).dequantize()
        elif kind in ("weight", "bias"):
            tensors[name] = files.read(name).float()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in files.config.items() if key != "quantization_config"} | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    return out


def feature_of(name):
    experts = ", its experts in 16 bits" if FAMILIES[name][0] == "qwen3_moe" else ""
    return pytest.mark.feature(f"{name}{experts}", "from its 16-bit checkpoint to served tokens, as transformers")


@pytest.mark.parametrize("name", [pytest.param(name, marks=feature_of(name)) for name in FAMILIES])
def test_family_is_specialized_and_served_as_transformers_reads_it(name, tmp_path):
    model = make_family(name, tmp_path / "model")
    is_mixture = FAMILIES[name][0] == "qwen3_moe"
    # vLLM's quantized experts need AMX instructions on a CPU; in 16 bits they are four fifths of this model.
    request = {"budget": "14.2bits", "pins": ("re:.*experts.*=16",)} if is_mixture else {}
    found = specialized(model, tmp_path / "out", **request)
    counts = found.plan.counts()
    assert counts[4] > 0
    assert counts[8] + counts[16] > 0
    # In bf16 a token's two best experts can change places, and everything after it is another: a mixture in float32.
    tokens, logprobs = serve(tmp_path / "out", **({"dtype": "float32"} if is_mixture else {}))
    # Of a quantized mixture transformers 5.19 reads no expert, not even one in 16 bits: it reports them as missing.
    twin = dequantized(tmp_path / "out", tmp_path / "twin") if is_mixture else tmp_path / "out"
    dtype = torch.float32 if is_mixture else "auto"
    # In float32 only the order of sums is left.
    bounds = {"mean": 1e-3, "tie": 1e-3} if is_mixture else {}
    assert_agrees(AutoModelForCausalLM.from_pretrained(twin, dtype=dtype), tokens, logprobs, **bounds)
    # The bound tells the quantized model from the one that it was made from.
    full, _ = reference(model)
    difference = torch.cat([(a - b).abs() for a, b in zip(logprobs, full, strict=True)]).mean()
    assert difference > MEAN_DIFFERENCE


def test_experts_of_a_block_have_one_bitwidth_and_stay_near_the_model_that_they_were_made_from(tmp_path):
    model = make_family("Qwen3-30B-A3B", tmp_path / "model")
    found = specialized(model, tmp_path / "out")
    bits = {experts_of(name): entry.bits for name, entry in found.plan.matrices.items() if experts_of(name)}
    assert len(bits) == 2
    for name, entry in found.plan.matrices.items():
        assert entry.bits == bits.get(experts_of(name), entry.bits)
    assert min(bits.values()) < 16
    full, _ = reference(model)
    rounded, _ = reference(dequantized(tmp_path / "out", tmp_path / "dequantized"))
    differences = torch.cat([(a - b).abs() for a, b in zip(rounded, full, strict=True)])
    assert differences.mean() > MEAN_DIFFERENCE
    # With each expert's weights given to its neighbour nothing of the model is left. Rounding to 4 bits moves
    # log-probabilities of these models by a tenth of their spread, which is what another model differs by.
    tensors = load_file(tmp_path / "dequantized" / "model.safetensors")
    neighbours = {re.sub(r"experts\.(\d)", lambda m: f"experts.{(int(m[1]) + 1) % 8}", n): tensors[n] for n in tensors}
    save_file(neighbours, tmp_path / "dequantized" / "model.safetensors", {"format": "pt"})
    wrong, _ = reference(tmp_path / "dequantized")
    assert differences.mean() < 0.25 * torch.cat([(a - b).abs() for a, b in zip(wrong, full, strict=True)]).mean()


def test_a_plan_beside_a_16_bit_mixture_serves_as_its_checkpoint(tmp_path):
    model = make_family("Qwen3-30B-A3B", tmp_path / "model")
    found = specialized(model, tmp_path / "out", "14.2bits", "rtn", pins=("re:.*experts.*=16",))
    found.plan.save(model / PLAN_FILE)
    beside, written = (serve(folder, quantization="taq", dtype="float32") for folder in (model, tmp_path / "out"))
    assert beside[0] == written[0]
    assert all(torch.equal(a, b) for a, b in zip(beside[1], written[1], strict=True))


def test_quantized_experts_are_refused_by_name_where_vllm_has_no_kernel_for_them(tmp_path):
    if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported():
        pytest.skip("this machine has a GPU or AMX instructions, on which vLLM's 4-bit experts run")
    model = make_family("Qwen3-30B-A3B", tmp_path / "model")
    specialized(model, tmp_path / "out", pins=("re:.*experts.*=4",), symmetric={4: True})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: vLLM has no kernel on this device"):
        serve(tmp_path / "out")


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_vllm_loads_the_codes_of_quantized_experts_as_they_were_written(bits, symmetric, tmp_path, monkeypatch):
    """As far as a CPU without their kernel can go: everything but the kernel's own repacking and the product."""
    model = make_family("Qwen3-30B-A3B", tmp_path / "model")
    pins = (f"re:.*experts.*={bits}",)
    specialized(model, tmp_path / "out", f"{bits + 2}.5bits", pins=pins, symmetric={bits: symmetric})
    monkeypatch.setattr(CPUExpertsInt4, "_supports_current_device", staticmethod(lambda: True))
    monkeypatch.setattr(CPUExpertsInt4, "_supports_quant_scheme", staticmethod(lambda *keys: True))
    monkeypatch.setattr(
        wna16_experts.CompressedTensorsWNA16MoEMethod, "process_weights_after_loading", lambda *arguments: None
    )
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's CPU worker does
    config = EngineArgs(str(tmp_path / "out"), quantization="taq", enforce_eager=True).create_engine_config()
    try:
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{tmp_path / 'store'}", local_rank=0, backend="gloo")
            initialize_model_parallel(1, 1)
            loader = get_model_loader(config.load_config)
            loaded = loader.load_model(vllm_config=config, model_config=config.model_config)
    finally:
        cleanup_dist_env_and_memory()
    files, modules = ModelFiles(tmp_path / "out"), dict(loaded.named_modules())
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = modules[prefix].routed_experts
        for kind in ("packed", "scale") if symmetric else ("packed", "scale", "zero_point"):
            for index in range(8):
                gate, up, down = (
                    files.read(f"{prefix}.{index}.{matrix}_proj.weight_{kind}") for matrix in ("gate", "up", "down")
                )
                assert torch.equal(getattr(experts, f"w13_weight_{kind}")[index], torch.cat([gate, up]))
                assert torch.equal(getattr(experts, f"w2_weight_{kind}")[index], down)
