"""vLLM's `reload_weights` on quantized models: other weights of the same plan in a running engine.

A reloaded engine is compared with one that was started on those weights. Nothing is left to noise: packing is
deterministic, and both compute in the same order.
"""

import pytest
import torch
from engines import engine, generate, serve
from plans import make_plan, mixed
from safetensors.torch import load_file
from tiny_models import make_tiny

from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE


def quantized(model, folder):
    quantize_model(ModelFiles(model), make_plan(model, mixed, head=True), folder, Calibration(method="rtn"))
    return folder


def reload(llm, folder):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    llm.reset_prefix_cache()


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


# Biases with a tied head that the plan unties; one matrix on disk for q, k, v and one for gate, up.
@pytest.mark.release
@pytest.mark.feature("weight reload", "an engine started on the other weights, to the bit, and back")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_reloaded_engine_is_one_started_on_those_weights(model_type, tmp_path):
    folders = []
    for seed in (1, 2):
        model = make_tiny(model_type, tmp_path / f"model-{seed}", num_hidden_layers=2, vocab_size=3001, seed=seed)
        folders.append(quantized(model, tmp_path / f"quantized-{seed}"))
    expected = [serve(folder) for folder in folders]
    assert expected[0][0] != expected[1][0]
    with engine(folders[0]) as llm:
        for index in (1, 0):
            reload(llm, folders[index])
            assert_same(generate(llm), expected[index])


@pytest.mark.release
def test_weights_are_rounded_while_they_are_reloaded(tmp_path):
    models = [make_tiny("llama", tmp_path / f"model-{seed}", num_hidden_layers=2, seed=seed) for seed in (1, 2)]
    for model in models:
        make_plan(model, mixed).save(model / PLAN_FILE)
    expected = serve(models[1], quantization="taq")
    with engine(models[0], quantization="taq") as llm:
        reload(llm, models[1])
        assert_same(generate(llm), expected)


def test_dummy_engine_takes_weights_that_are_handed_to_it(tmp_path):
    """As trainers do it that synchronise weights with an engine."""
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=2)
    folder = quantized(model, tmp_path / "quantized")
    expected = serve(folder)
    weights = [pair for file in sorted(folder.glob("*.safetensors")) for pair in load_file(file).items()]
    with engine(folder, load_format="dummy") as llm:
        assert generate(llm)[0] != expected[0]
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.reset_prefix_cache()
        assert_same(generate(llm), expected)


@pytest.mark.release
def test_compiled_engine_reloads(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's choice of a backend that compiles nothing
    models = [make_tiny("llama", tmp_path / f"model-{seed}", num_hidden_layers=2, seed=seed) for seed in (1, 2)]
    folders = [quantized(model, tmp_path / f"quantized-{index}") for index, model in enumerate(models)]
    expected = serve(folders[1], enforce_eager=False)
    with engine(folders[0], enforce_eager=False) as llm:
        generate(llm)
        reload(llm, folders[1])
        assert_same(generate(llm), expected)


def test_checkpoint_of_another_plan_is_refused_by_name(tmp_path):
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=2)
    folder = quantized(model, tmp_path / "quantized")
    other = tmp_path / "other"
    quantize_model(ModelFiles(model), make_plan(model, lambda name: (4, False)), other, Calibration(method="rtn"))
    with (
        engine(folder) as llm,
        pytest.raises(ValueError, match=r"not of one checkpoint.*has lost its weights by now: start it again"),
    ):
        reload(llm, other)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_reload_that_leaves_out_a_shard_is_refused_by_name(bits, tmp_path):
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=2)
    plan = make_plan(model, lambda name: (bits if ".0.self_attn." in name else 8, False))
    quantize_model(ModelFiles(model), plan, tmp_path / "quantized", Calibration(method="rtn"))
    weights = [pair for file in (tmp_path / "quantized").glob("*.safetensors") for pair in load_file(file).items()]
    left_out = "model.layers.0.self_attn.v_proj"
    weights = [(name, tensor) for name, tensor in weights if not name.startswith(left_out)]
    with engine(tmp_path / "quantized") as llm, pytest.raises(ValueError, match=rf"{left_out}.*has lost its weights"):
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
