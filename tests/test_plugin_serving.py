"""The plugin inside the real engine, against transformers reading the same checkpoint without this project."""

import json

import pytest
import torch
from compressed import compress_checkpoint, scheme_of
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from engines import MEAN_DIFFERENCE, NEW_TOKENS, PROMPTS, TIE, assert_agrees, engine, in_a_process, reference, serve
from plans import make_plan, mixed
from safetensors.torch import save_file
from taq_kernels import ops
from tiny_models import make_tiny
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.server import vllm_serve
from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE
from taq_vllm.plugin import config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # A vocabulary that vLLM pads, on one rank and on two.
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    return make_tiny("qwen3", folder, num_hidden_layers=2, vocab_size=3001)


@pytest.fixture(scope="module")
def plan(model):
    return make_plan(model, mixed, head=True)


@pytest.fixture(scope="module")
def checkpoint(model, plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "ours"
    quantize_model(ModelFiles(model), plan, out, Calibration(method="rtn"))
    return out


@pytest.fixture(scope="module")
def summaries():
    """What the plugin says about what it loaded."""
    return []


@pytest.fixture(scope="module")
def served(checkpoint, summaries):
    """What the engine makes of our checkpoint without being told anything."""
    with pytest.MonkeyPatch.context() as patch:
        # Not a handler: vLLM configures logging again when an engine starts, which removes handlers.
        patch.setattr(config.logger, "info", lambda message, *values: summaries.append(message % values))
        return serve(checkpoint)


def foreign(model, target, head=None):
    bits_of = {name: mixed(name) for name in ModelFiles(model).matrices if mixed(name)[0] < 16}
    return compress_checkpoint(model, target, bits_of | ({"lm_head": head} if head else {}))


def decompressed(folder, key_of):
    """transformers' model in float32 with the weights that a checkpoint's codes stand for."""
    files = ModelFiles(folder)
    state = {}
    for name in files.tensors:
        matrix = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            tensors = {
                kind: files.read(f"{matrix}.{kind}")
                for kind in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
                if f"{matrix}.{kind}" in files.tensors
            }
            tensors["weight_scale"] = tensors["weight_scale"].float()
            state[f"{matrix}.weight"] = PackedQuantizationCompressor.decompress(tensors, scheme_of(*key_of(matrix)))[
                "weight"
            ]
        elif name.endswith((".weight", ".bias")):
            state[name] = files.read(name).float()
    hf_config = AutoConfig.from_pretrained(folder)
    del hf_config.quantization_config
    exact = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    exact.load_state_dict(state, strict=True)
    return exact


@pytest.mark.release
@pytest.mark.feature("offline `LLM()`, eager", "as transformers, within the noise of bf16")
def test_our_checkpoint_agrees_with_transformers(checkpoint, served):
    assert_agrees(checkpoint, *served)


def test_agreement_is_not_that_of_any_model(model, served):
    """The bounds above tell the quantized model from the one that it was made from."""
    expected, _ = reference(model)
    difference = torch.cat([(a - b).abs() for a, b in zip(served[1], expected, strict=True)]).mean()
    assert difference > 3 * MEAN_DIFFERENCE


def test_one_line_sums_up_what_was_loaded(served, summaries, plan):
    (line,) = summaries
    counts = plan.counts()
    assert f"{len(plan.matrices)} matrices: {counts[4]} at 4 bits, {counts[8]} at 8 bits, {counts[16]} at 16" in line
    resident = float(line.partition(" MB resident")[0].rpartition(" ")[2]) * 1e6
    planned = sum(matrix.resident_bytes for matrix in plan.matrices.values())
    rounding = 0.05e6  # the line has one decimal
    assert abs(resident - planned) < rounding + 0.01 * planned
    assert f"kernel {ops.kernel_name(torch.device('cpu'))}" in line


# Biases and a tied head; one matrix on disk for q, k, v and one for gate, up.
@pytest.mark.release
@pytest.mark.parametrize(("model_type", "head"), [("qwen3", (4, False)), ("qwen2", None), ("phi3", (4, True))])
def test_foreign_checkpoint_agrees_with_transformers(model_type, head, tmp_path):
    source = make_tiny(model_type, tmp_path / "source", num_hidden_layers=2, seed=3)
    folder = foreign(source, tmp_path / "foreign", head)
    assert_agrees(folder, *serve(folder, quantization="taq"))


def test_tied_model_with_a_quantized_head_generates_what_stock_vllm_does_with_the_same_weights(tmp_path):
    """In float32, where only the order of sums differs."""
    source = make_tiny("qwen2", tmp_path / "source", num_hidden_layers=2, vocab_size=3001, seed=4)
    folder = tmp_path / "ours"
    plan = make_plan(source, lambda name: (4, False) if name == "lm_head" else mixed(name), head=True)
    quantize_model(ModelFiles(source), plan, folder, Calibration(method="rtn"))
    exact = decompressed(folder, lambda name: (plan.matrices[name].bits, plan.matrices[name].symmetric))
    exact.save_pretrained(tmp_path / "exact")
    tokens, logprobs = serve(folder, dtype="float32")
    expected_tokens, expected = serve(tmp_path / "exact", dtype="float32")
    assert tokens == expected_tokens
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(logprobs, expected, strict=True))


def test_stock_vllm_refuses_different_bits_in_one_fused_layer(model, tmp_path):
    folder = foreign(model, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"Found different quantization schemes for the shards of .*qkv_proj"):
        serve(folder)


@pytest.mark.release
@pytest.mark.feature("plan beside a 16-bit model", "the tokens and log-probabilities of the checkpoint, to the bit")
def test_rounding_while_loading_is_the_offline_checkpoint_to_the_bit(model, plan, served, tmp_path, monkeypatch):
    plan.save(tmp_path / PLAN_FILE)
    monkeypatch.setenv("TAQ_PLAN", str(tmp_path / PLAN_FILE))
    tokens, logprobs = serve(model, quantization="taq")
    assert tokens == served[0]
    assert all(torch.equal(a, b) for a, b in zip(logprobs, served[1], strict=True))


@pytest.mark.release
@pytest.mark.feature("torch.compile: whole graph", "as transformers, within the noise of bf16")
def test_compiled_graph_gives_the_same_tokens(checkpoint, monkeypatch):
    # vLLM's setting for CI: dynamo traces the whole model, inductor is left out.
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    assert_agrees(checkpoint, *serve(checkpoint, enforce_eager=False))


def test_float32_engine_computes_what_the_stored_codes_stand_for(checkpoint):
    """Without bf16 anywhere only the order of sums is left: codes, scales and zeros are exactly right."""
    exact = decompressed(checkpoint, mixed)
    _, logprobs = serve(checkpoint, dtype="float32")
    with torch.no_grad():
        for prompt, got in zip(PROMPTS, logprobs, strict=True):
            ids = torch.tensor([prompt])
            expected = exact(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            assert (got - expected).abs().max() < 1e-3


@pytest.mark.release
@pytest.mark.feature("`--load-format dummy`", "runs")
def test_dummy_weights_load_and_run(checkpoint):
    assert all(len(tokens) == NEW_TOKENS for tokens in serve(checkpoint, load_format="dummy")[0])


def write_adapter(folder, rank=8):
    """A random LoRA adapter for every linear layer of `model`, as PEFT would write it; returns its updates."""
    generator = torch.Generator().manual_seed(11)
    tensors, updates = {}, {}
    for name, (rows, columns) in ModelFiles(folder.parent / "model").matrices.items():
        a = torch.randn(rank, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator) * 0.2
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        updates[f"{name}.weight"] = b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name.rpartition(".")[2] for name in ModelFiles(folder.parent / "model").matrices})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates


@pytest.mark.release
@pytest.mark.feature("LoRA on the quantized base", "greedy tokens as transformers with the adapter merged")
def test_lora_adapter_is_added_to_a_layer_of_mixed_bits(model, checkpoint, tmp_path):
    (tmp_path / "model").symlink_to(model)
    updates = write_adapter(tmp_path / "adapter")
    with engine(checkpoint, enable_lora=True, max_lora_rank=8) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            sampling,
            lora_request=LoRARequest("adapter", 1, str(tmp_path / "adapter")),
            use_tqdm=False,
        )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    merged = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    merged(torch.tensor([[3]]))  # compressed-tensors decompresses at the first forward pass
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.add_(updates.get(name, torch.zeros(())).to(parameter.dtype))
    _, margins = reference(merged, tokens)
    assert max(margin.max().item() for margin in margins) < TIE


# In processes of their own.


@pytest.mark.engine
@pytest.mark.feature("tensor parallel 2", "as transformers, within the noise of bf16")
def test_two_ranks_agree_with_transformers(checkpoint, tmp_path):
    output = in_a_process(
        f"""
        import torch, engines
        torch.save(engines.serve({str(checkpoint)!r}, tensor_parallel_size=2), {str(tmp_path / "out.pt")!r})
        """,
        tmp_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert output.count("matrices: ") == 2
    assert_agrees(checkpoint, *torch.load(tmp_path / "out.pt"))


@pytest.mark.engine
@pytest.mark.feature("`vllm serve`, torch.compile with inductor", "as the eager engine, within the noise of bf16")
def test_vllm_serve_compiles_and_answers_over_http(checkpoint, served, tmp_path):
    arguments = ["--quantization", "taq", "--max-model-len", "256", "--max-num-seqs", "8"]
    logprobs = []
    with vllm_serve(checkpoint, arguments, env={"VLLM_CACHE_ROOT": str(tmp_path / "cache")}) as client:
        for prompt in PROMPTS:
            answer = client.completions.create(
                model=str(checkpoint), prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=0
            )
            logprobs.append(torch.tensor(answer.choices[0].logprobs.token_logprobs[1 : len(prompt)]))
    difference = torch.cat([(a - b).abs() for a, b in zip(logprobs, served[1], strict=True)]).mean()
    assert difference < MEAN_DIFFERENCE
