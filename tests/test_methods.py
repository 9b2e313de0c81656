import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from plans import mixed
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny
from torch import nn
from transformers import AutoModelForCausalLM

import taq_vllm.cli
from taq_vllm.checkpoint import Calibration, Shards, quantize_model, unpack, verify
from taq_vllm.fitting import Block, method_named, settings_of
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.methods import METHODS, awq, clip, gptq, learned
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import Allocation, Budget, MatrixPlan, Plan
from taq_vllm.quantizer import quantize, search_clip
from taq_vllm.scoring import peak_memory_bytes
from taq_vllm.stream import Batch, StreamedModel, make_batches, matrices_of
from taq_vllm.tasks import TokenizedExample, load_task

CASES = [(2, False), (3, True), (4, False), (4, True), (8, True)]
SETTINGS = {"learned": {"steps": 4}, "awq": {"grid": 4}}


class One(nn.Module):
    """A block of one matrix."""

    def __init__(self, weight):
        super().__init__()
        self.matrix = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.matrix.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, states):
        return self.matrix(states)


def block_of(weight, inputs, bits, symmetric, dtype=torch.float32):
    """A block of one matrix [N, K] whose calibration inputs are [tokens, K]; the second row of its batch is padding."""
    tokens = len(inputs)
    lengths = torch.tensor([tokens, 0])
    batch = Batch(torch.zeros(2, tokens, dtype=torch.long), lengths, lengths, torch.arange(2))
    hidden = HiddenStates([torch.stack([inputs, torch.full_like(inputs, 1000.0)])])
    entries = {"matrix": MatrixPlan(bits=bits, symmetric=symmetric, shape=tuple(weight.shape), why="score")}
    return Block(One(weight), entries, lambda call, states: call(states), dtype, [batch], hidden)


def correlated(seed=0, tokens=600, columns=256, rows=48):
    """A matrix, and inputs with few strong directions, as hidden states have."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, columns, generator=generator)
    inputs = torch.randn(tokens, 24, generator=generator) @ directions
    inputs += 0.3 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs


def loss(weight, quantized, inputs):
    return ((quantized.dequantize() - weight) @ inputs.T).square().sum().item()


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_gptq_beats_rtn_by_far_in_its_own_objective(bits, symmetric):
    weight, inputs = correlated()
    plain = loss(weight, quantize(weight, bits, symmetric), inputs)
    clipped = loss(weight, search_clip(weight, bits, symmetric, inputs.square().mean(0)), inputs)
    block = block_of(weight, inputs, bits, symmetric)
    # 24 of 256 directions carry almost all of the energy: most of the error can be moved out of them.
    assert loss(weight, gptq.fit_block(block, gptq.Settings(clip=False))["matrix"], inputs) < 0.5 * plain
    block = block_of(weight, inputs, bits, symmetric)
    assert loss(weight, gptq.fit_block(block, gptq.Settings())["matrix"], inputs) < 0.5 * clipped
    block = block_of(weight, inputs, bits, symmetric)
    assert loss(weight, gptq.fit_block(block, gptq.Settings(act_order=True))["matrix"], inputs) < 0.5 * clipped


def test_gptq_without_correlations_is_rtn_and_with_searched_ranges_clip():
    weight, _ = correlated()
    block = block_of(weight, torch.eye(256) * 3, 4, False)
    found = gptq.fit_block(block, gptq.Settings(clip=False))["matrix"]
    assert torch.equal(found.codes, quantize(weight, 4, False).codes)
    block = block_of(weight, torch.eye(256) * 3, 4, False)
    for order in (True, False):
        found = gptq.fit_block(block, gptq.Settings(act_order=order, sequential=False))["matrix"]
        assert torch.equal(found.codes, search_clip(weight, 4, False, torch.ones(256)).codes)


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, inputs = correlated()
    hessian = (inputs.T @ inputs / len(inputs)).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(gptq.inverse_factor(hessian.clone(), 0.01), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [256, 384, 1280, 1281])  # one, two and several parts that are turned round
def test_turning_and_transposing_in_place_are_what_they_are_called(size):
    matrix = torch.arange(size * size, dtype=torch.float32).view(size, size)
    turned, transposed = matrix.clone(), matrix.clone()
    gptq._reverse(turned)
    gptq._transpose(transposed)
    assert torch.equal(turned, matrix.flip(0, 1))
    assert torch.equal(transposed, matrix.T)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_factors_with_one_matrix_more_than_the_hessian(act_order):
    size = 2048
    part = torch.randn(size, 256, generator=torch.Generator().manual_seed(0))
    hessian = part @ part.T
    order = hessian.diagonal().argsort() if act_order else None
    gptq.inverse_factor(hessian[:256, :256].clone(), 0.01)  # the libraries' own memory
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let the peak of memory begin anew")
    before = peak_memory_bytes()
    factor = gptq.inverse_factor(hessian, 0.01, order)
    # One, the parts of 256 rows of 2048 that are moved (3/8), and what the C library keeps of the reordered copy (1).
    # Copies at every step, where it is easy to make them, are five.
    assert peak_memory_bytes() - before < 2.5 * hessian.nbytes
    assert factor.data_ptr() == hessian.data_ptr()


def test_awq_keeps_a_sample_of_the_inputs_and_not_the_inputs(monkeypatch):
    from torch.multiprocessing.reductions import StorageWeakRef

    weight, inputs = correlated()
    block = block_of(weight, inputs, 4, False)
    block = replace(block, batches=block.batches * 5, hidden=HiddenStates([block.hidden[0]] * 5))
    observe, seen = Block.observe, []

    def watched(self, names, function):
        def show(name, inputs):
            seen.append(StorageWeakRef(inputs.untyped_storage()))
            assert sum(not storage.expired() for storage in seen) == 1
            function(name, inputs)

        observe(self, names, show)

    monkeypatch.setattr(Block, "observe", watched)
    samples, *_ = awq._look(block, block.groups(), most=100)
    assert len(seen) == 5
    assert len(samples["matrix"]) == 100
    assert samples["matrix"].untyped_storage().nbytes() == 100 * 256 * 4


def test_an_input_feature_that_no_token_has_does_not_stop_gptq():
    weight, inputs = correlated()
    inputs[:, 5] = 0
    block = block_of(weight, inputs, 4, False)
    found = gptq.fit_block(block, gptq.Settings())["matrix"]
    assert torch.isfinite(found.scale).all()
    assert loss(weight, found, inputs) < loss(weight, quantize(weight, 4, False), inputs)


def test_padding_is_not_read():
    weight, inputs = correlated()
    energy = block_of(weight, inputs, 4, False).energy()["matrix"]
    assert torch.allclose(energy, inputs.double().square().mean(0), rtol=1e-5)


def test_activations_that_are_not_finite_are_named():
    weight, inputs = correlated()
    inputs[3, 4] = float("inf")
    with pytest.raises(ValueError, match="matrix: got activations that are not finite"):
        clip.fit_block(block_of(weight, inputs, 4, False), clip.Settings())


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_is_never_worse_than_its_start_and_soon_better(symmetric):
    weight, inputs = correlated()
    block = block_of(weight, inputs, 4, symmetric)
    started = learned.output_loss(block, clip.fit_block(block, clip.Settings()))
    found = learned.output_loss(block, learned.fit_block(block, learned.Settings(steps=60)))
    assert found < 0.8 * started
    # A rate that throws everything about: what it started from is kept.
    wild = learned.output_loss(block, learned.fit_block(block, learned.Settings(steps=4, rate=0.5)))
    assert wild <= started


def test_learned_moves_scales_and_zero_points_too():
    weight, inputs = correlated()
    block = block_of(weight, inputs, 3, False)
    start, found = clip.fit_block(block, clip.Settings()), learned.fit_block(block, learned.Settings(steps=60))
    assert not torch.equal(found["matrix"].scale, start["matrix"].scale)
    assert not torch.equal(found["matrix"].zero_point, start["matrix"].zero_point)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_steps_go_where_autograd_points_with_rounding_straight_through(bits):
    weight, _ = correlated(rows=8)
    fit = learned._Fit.start(weight, search_clip(weight, bits, False, torch.ones(256), ratios=(0.7,)), torch.float32)
    gradient = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))

    def through(value, rounded):
        return value + (rounded - value).detach()

    scale, zero = fit.first_scale.clone().requires_grad_(), fit.zero.clone().requires_grad_()
    offset = fit.offset.clone().requires_grad_()
    codes = fit.weight / scale[..., None] + offset
    codes = through(codes, codes.round()) + through(zero, zero.round())[..., None]
    restored = (codes.clamp(0, 2**bits - 1) - zero[..., None]) * scale[..., None]
    (restored.view(8, 256) * gradient).sum().backward()
    before = [value.clone() for value in (fit.change, fit.zero, fit.offset)]
    fit.move(gradient, 1e-3)
    for old, new, expected in zip(
        before, (fit.change, fit.zero, fit.offset), (scale.grad, zero.grad, offset.grad), strict=True
    ):
        moved = (old - new).sign()
        # At the ends of its range a value stays; sums that cancel have no sign worth keeping.
        sure = (moved != 0) & (expected.abs() > 1e-4)
        assert sure.float().mean() > 0.05
        assert torch.equal(moved[sure], expected.sign()[sure])


# Real blocks.


def sequences(count=6, length=24):
    ids = torch.randint(3, 3000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenizedExample(row[: length - i], 4) for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A tiny model whose norms differ from channel to channel and whose matrices make up for it: scales have work."""
    made = {}

    def make(architecture, dtype=torch.bfloat16):
        if (architecture, dtype) not in made:
            folder = make_tiny(architecture, tmp_path_factory.mktemp(architecture), dtype)
            tensors = load_file(folder / "model.safetensors")
            pattern = torch.exp2(torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(1)))
            for name, tensor in tensors.items():
                columns = pattern.repeat(tensor.shape[-1] // 64)
                if name.endswith("layernorm.weight"):
                    tensors[name] = (1 / columns).to(dtype)
                elif name.endswith("_proj.weight"):
                    tensors[name] = (tensor * columns).to(dtype)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            made[architecture, dtype] = ModelFiles(folder)
        return made[architecture, dtype]

    return make


def real_block(model, module, layer, bits, batches, hidden):
    entries = {
        name: MatrixPlan(bits=bits(name), symmetric=False, shape=tuple(matrix.weight.shape), why="score")
        for name, matrix in matrices_of(module).items()
    }
    return Block(module, entries, partial(model.run_with_gradient, layer), model.dtype, batches, hidden)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_awq_keeps_the_function_at_16_bits_to_the_bit(uneven, architecture, dtype):
    model = StreamedModel(uneven(architecture, dtype), "cpu")
    batches = make_batches(sequences(), 3)
    hidden = model.embed(batches)
    with model.block(0) as module:
        before, state = list(hidden.map(partial(model.run, 0, module))), {}
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        # v, and with it the pair that it produces for, stays at 16 bits and is scaled all the same.
        # In float16 its smallest weights have no exact copy, and nothing would be moved.
        kept = ".v_proj" if dtype == torch.bfloat16 else "none"
        block = real_block(model, module, 0, lambda name: 16 if name.endswith(kept) else 4, batches, hidden)
        awq.fit_block(block, awq.Settings())
        after = list(hidden.map(partial(model.run, 0, module)))
        changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, state[name])}
    if model.compute_dtype == torch.float16:  # its smallest weights round
        assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(before, after, strict=True))
    else:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {"input_layernorm.weight", "post_attention_layernorm.weight"} <= changed
    if architecture == "phi3":
        assert {"self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"} <= changed
    else:
        assert {"self_attn.v_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"} <= changed
    if architecture == "qwen2":
        assert "self_attn.v_proj.bias" in changed


def test_awq_loses_less_than_clip_where_channels_are_uneven(uneven):
    model = StreamedModel(uneven("qwen3"), "cpu")
    batches = make_batches(sequences(), 3)
    hidden = model.embed(batches)
    with model.block(0) as module:
        target = hidden.map(partial(model.run, 0, module))
        block = real_block(model, module, 0, lambda name: 3, batches, hidden)
        block = Block(module, block.entries, block.apply, block.dtype, batches, hidden, target)
        clipped = learned.output_loss(block, clip.fit_block(block, clip.Settings()))
        scaled = learned.output_loss(block, awq.fit_block(block, awq.Settings()))
    assert scaled < 0.9 * clipped


def test_scales_that_float16_cannot_hold_are_not_moved(uneven):
    model = StreamedModel(uneven("qwen3", torch.float16), "cpu")
    with model.block(0) as module:
        block = real_block(model, module, 0, lambda name: 4, [], HiddenStates([]))
        pair = awq.pairs_of(module)[0]
        before = module.input_layernorm.weight.clone()
        assert awq.move(block, pair, torch.full((256,), 2.0**-18)) is False
        assert torch.equal(module.input_layernorm.weight, before)
        assert awq.move(block, pair, torch.full((256,), 2.0)) is True
        assert torch.equal(module.input_layernorm.weight, before / 2)


@pytest.mark.parametrize("architecture", ["phi3", "qwen3"])
def test_matrices_that_read_one_tensor_are_found_by_running_the_block(uneven, architecture):
    model = StreamedModel(uneven(architecture), "cpu")
    batches = make_batches(sequences(), 3)
    with model.block(0) as module:
        block = real_block(model, module, 0, lambda name: 4, batches, model.embed(batches))
        groups = [tuple(name.split(".")[-1] for name in names) for names in block.groups()]
    if architecture == "phi3":
        assert groups == [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)]
    else:
        assert groups == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_every_expert_is_fitted_to_the_tokens_that_the_router_sends_it(tmp_path):
    """Against transformers' own experts, whose inputs are looked at where they are called."""
    files = ModelFiles(make_tiny("qwen3_moe", tmp_path / "mixture", num_hidden_layers=1))
    model = StreamedModel(files, "cpu")
    batches = make_batches(sequences(), 2)
    with model.block(0) as module:
        block = real_block(model, module, 0, lambda name: 4, batches, model.embed(batches))
        groups = [tuple(name.rpartition("experts.")[2] for name in names) for names in block.groups()]
        assert groups[2:] == [
            names for i in range(8) for names in ((f"{i}.gate_proj", f"{i}.up_proj"), (f"{i}.down_proj",))
        ]
        energy = block.energy()
        moments = gptq.sum_outer_products(block, [f"mlp.experts.{i}.gate_proj" for i in range(8)])
        together = gptq._looked_at_together(block)
        assert [len(found) for found in together] == [1, 1, 8, 8]
    reference = AutoModelForCausalLM.from_pretrained(files.path, dtype=model.compute_dtype)
    inputs, chosen = [], []

    def look(module, given):
        inputs.append(given[0])
        chosen.append(given[1])

    reference.model.layers[0].mlp.experts.register_forward_pre_hook(look)
    for sequence in sequences():
        reference(torch.tensor([sequence.input_ids]))
    states, picked = torch.cat(inputs).float(), torch.cat(chosen)
    tokens = len(states)
    for index in range(8):
        sent = states[(picked == index).any(1)]
        name = f"mlp.experts.{index}.gate_proj"
        expected = sent.T @ sent / tokens
        # Sums of a few hundred products in another order.
        assert torch.allclose(moments[name], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert torch.allclose(energy[name].float(), expected.diagonal(), rtol=1e-3)


def test_experts_to_which_no_token_is_sent_are_rounded_to_nearest_and_named(tmp_path):
    files = ModelFiles(make_tiny("qwen3_moe", tmp_path / "mixture", num_hidden_layers=1))
    model = StreamedModel(files, "cpu")
    batches = make_batches([TokenizedExample([5, 6], 2)], 2)
    for method in ("gptq", "clip", "awq", "learned"):
        with model.block(0) as module:
            block = real_block(model, module, 0, lambda name: 4, batches, model.embed(batches))
            weights = {name: matrix.weight.clone() for name, matrix in block.matrices.items()}
            found = method_named(method).fit_block(block, settings_of(method, SETTINGS.get(method, {})))
            unseen = {name for name in block.unseen if name.endswith("down_proj")}
            assert 4 <= len(unseen) < 8  # two tokens, two experts each
            for name in unseen:
                assert torch.equal(found[name].codes, quantize(weights[name], 4, False, block.dtype).codes), (
                    method,
                    name,
                )


# Whole checkpoints.


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"id": str(i), "prompt": f"Question: {i}?\nAnswer:", "answers": [f"{i * 7}"]} for i in range(8)]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text("name: tiny\nmetric: em\ncalibration: calibration.jsonl\n")
    return load_task(folder)


def plan_of(files, key_of, head=None):
    """A plan by hand, with the head at so many bits."""
    shapes = files.matrices | (files.head if head else {})
    matrices = {}
    for name, shape in shapes.items():
        bits, symmetric = (head, False) if name == "lm_head" else key_of(name)
        if shape[1] % 128:
            bits, symmetric = 16, True
        tied = name == "lm_head" and files.tied
        matrices[name] = MatrixPlan(bits=bits, symmetric=symmetric, shape=shape, why="pinned", tied=tied)
    budget = Budget.of("by hand", matrices, files.bytes_beside(matrices))
    return Plan(base_model=files.ref, allocation=Allocation(name="by hand"), budget=budget, matrices=matrices)


def folder_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("inputs", ["quantized", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_what_verify_accepts_and_resumes_with_the_same_bytes(
    uneven, task, tmp_path, monkeypatch, method, inputs
):
    files = uneven("qwen2", torch.float16) if inputs == "full" else uneven("qwen3")
    plan = plan_of(files, mixed, head=4)
    calibration = Calibration(method, SETTINGS.get(method, {}), examples=6, batch_size=3, inputs=inputs)

    def quantized(output):
        return quantize_model(files, plan, output, calibration, task)

    assert quantized(tmp_path / "whole") is True
    assert verify(tmp_path / "whole").plan == plan
    save = Shards.save
    for stop in (1, 3):  # in a block, and in the last shard, which holds the head

        def interrupted(self, number, tensors, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            save(self, number, tensors)

        monkeypatch.setattr(Shards, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path / "out")
    monkeypatch.undo()
    kept = list((tmp_path / ".out.partial").glob("states*"))
    assert len(kept) == (0 if method == "rtn" else 2 if method == "learned" and inputs == "quantized" else 1)
    for file in kept if inputs == "full" else []:  # without them the blocks that are there are run again
        file.unlink()
    assert quantized(tmp_path / "out") is True
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_hidden_states_are_found_again_and_blocks_before_them_not_run(uneven, task, tmp_path, monkeypatch):
    files = uneven("qwen3")
    plan = plan_of(files, mixed)
    calibration = Calibration("learned", {"steps": 2}, examples=6, batch_size=3)
    save = Shards.save

    def interrupted(self, number, tensors):
        if number == 2:
            raise KeyboardInterrupt
        save(self, number, tensors)

    monkeypatch.setattr(Shards, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(files, plan, tmp_path / "out", calibration, task)
    monkeypatch.undo()
    run, entered = StreamedModel.block, []
    monkeypatch.setattr(StreamedModel, "block", lambda self, layer: entered.append(layer) or run(self, layer))
    monkeypatch.setattr(StreamedModel, "embed", None)
    quantize_model(files, plan, tmp_path / "out", calibration, task)
    assert entered == [2]


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_whose_inputs_do_not_divide_into_groups_stays_at_16_bits(task, tmp_path, method):
    files = ModelFiles(make_tiny("llama", tmp_path / "model", intermediate_size=320))
    plan = plan_of(files, lambda name: (4, False))
    assert plan.matrices["model.layers.0.mlp.down_proj"].bits == 16
    calibration = Calibration(method, SETTINGS.get(method, {}), examples=6, batch_size=3)
    quantize_model(files, plan, tmp_path / "out", calibration, task)
    verify(tmp_path / "out")
    assert "model.layers.0.mlp.down_proj.weight" in ModelFiles(tmp_path / "out").tensors


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # tied, untied
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_transformers_loads_a_quantized_head_and_equals_its_fake_quantized_twin(
    uneven, task, tmp_path, monkeypatch, architecture, method
):
    files = uneven(architecture)
    plan = plan_of(files, mixed, head=8)
    monkeypatch.setattr("taq_vllm.checkpoint._HEAD_WEIGHTS", 256 * 1000)  # in parts: 992 rows, and a rest
    calibration = Calibration(method, examples=6, batch_size=3)
    quantize_model(files, plan, tmp_path / "out", calibration, task)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" not in config["quantization_config"]["ignore"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    twin = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16)
    if files.tied:
        twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    stored = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    for name, entry in plan.matrices.items():
        if entry.bits < 16:
            twin.get_submodule(name).weight.data = unpack(name, stored, entry).dequantize()
    if method == "rtn":
        original = files.read("model.embed_tokens.weight" if files.tied else "lm_head.weight")
        expected = quantize(original, 8, False)
        assert torch.equal(unpack("lm_head", stored, plan.matrices["lm_head"]).codes, expected.codes)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, twin(input_ids=ids).logits)
    assert sum(i.end - i.start for i in ModelFiles(tmp_path / "out").tensors.values()) == plan.budget.disk_bytes


def test_a_tied_head_that_is_planned_at_16_bits_is_the_embedding(uneven, tmp_path):
    files = uneven("qwen2")
    quantize_model(files, plan_of(files, mixed, head=16), tmp_path / "out", Calibration("rtn"))
    verify(tmp_path / "out")
    assert "lm_head.weight" not in ModelFiles(tmp_path / "out").tensors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_wrong_methods_and_settings_name_what_there_is():
    with pytest.raises(ValueError, match="got method 'best'; there are awq, clip, gptq, learned, rtn"):
        method_named("best")
    with pytest.raises(ValueError, match=r"method gptq, dampin: .* its settings are damping, clip"):
        settings_of("gptq", {"dampin": 0.1})
    with pytest.raises(ValueError, match="method learned, steps: got 0"):
        settings_of("learned", {"steps": 0})
    for method in METHODS:
        module = method_named(method)
        assert module.__doc__
        assert isinstance(module.READS_INPUTS, bool)
        assert isinstance(module.READS_OUTPUTS, bool)


# The command line.


@pytest.fixture
def taq(monkeypatch, capsys):
    """Run the command in this process: (exit code, what it wrote)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["taq", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            taq_vllm.cli.main()
        output = capsys.readouterr()
        return ended.value.code or 0, output.out + " ".join(output.err.split())

    return run


@pytest.fixture
def asked(uneven, task, tmp_path):
    """What `taq quantize` is given."""
    files = uneven("qwen3")
    plan_of(files, mixed).save(tmp_path / "plan.json")
    words = ["quantize", files.path, "--plan", tmp_path / "plan.json", "--task", task.path, "-o", tmp_path / "out"]
    (tmp_path / "general.txt").write_text(" ".join(f"word{i}" for i in range(600)))
    return [*words, "--examples", "8"]


def test_the_command_line_sets_methods_and_mixes_general_text(taq, asked, tmp_path):
    general = ["--mix-general", "0.25", "--general-data", tmp_path / "general.txt"]
    settings = ["--method", "gptq", "--method-set", "damping=0.05", "--method-set", "clip=false"]
    code, said = taq(*asked, *settings, *general)
    assert code == 0, said
    made_by = json.loads((tmp_path / "out" / "manifest.json").read_text())["made_by"]
    assert made_by["settings"] == {"damping": 0.05, "clip": False, "sequential": True, "act_order": False}
    assert (made_by["task"]["examples"], made_by["general"]["examples"]) == (6, 2)
    assert made_by["calibration"]["mix_general"] == 0.25


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "gptq", "--method-set", "dampin=0.1"], "its settings are damping, clip"),
        (["--method", "gptq", "--method-set", "damping=2"], "method gptq, damping"),
        (["--method", "rtn", "--method-set", "steps=2"], "its settings are none"),
        (["--method-set", "damping"], "damping"),
        (["--mix-general", "1.5", "--general-data", "FILE"], "a share, from 0 to 1"),
        (["--mix-general", "0.5"], "needs --general-data FILE"),
        (["--general-data", "FILE"], "needs --mix-general RATIO"),
        (["--mix-general", "0.5", "--general-data", "nothing.txt"], "no general data at nothing.txt"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(taq, asked, tmp_path, words, said):
    code, found = taq(*asked, *(tmp_path / "general.txt" if word == "FILE" else word for word in words))
    assert code in (1, 2)
    assert said in " ".join(found.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
