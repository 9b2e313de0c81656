"""The gradient estimate against autograd's own gradients, finite differences, and interrupted runs."""

import json

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM

from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import SYMMETRIC
from taq_vllm.quantizer import quantize
from taq_vllm.rounding import Rounding
from taq_vllm.scorers import loss
from taq_vllm.scoring import Run, calibration_sequences, score
from taq_vllm.stream import StreamedModel, make_batches
from taq_vllm.tasks import load_task
from taq_vllm.units import HEAD, units_of

EXAMPLES = 5
BITS = (3, 8)


@pytest.fixture(scope="module", params=["phi3", "qwen2", "qwen3_moe"])
def files(request, tmp_path_factory):
    return ModelFiles(make_tiny(request.param, tmp_path_factory.mktemp("model"), num_hidden_layers=2))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"id": str(i), "prompt": f"Question: {'why ' * i}?\nAnswer:", "answers": [f"the {i * 'big '}bear"]}
        for i in range(EXAMPLES)
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(folder / "c.jsonl")


def run_of(files, task, folder, granularity="module"):
    model = StreamedModel(files, "cpu")
    sequences = calibration_sequences(model, task, EXAMPLES, True)
    units = units_of([*files.matrices, HEAD], granularity)
    return Run(files, "cpu", model, task, sequences, granularity, units, folder / "journal")


def nll(model, sequence):
    ids = torch.tensor([sequence.input_ids])
    logits = model(input_ids=ids).logits[0, sequence.prompt_len - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, sequence.prompt_len :])


def of_matrix(model, name, what):
    """A matrix's weight (`data`) or gradient (`grad`), [N, K]; transformers has a block's experts in two tensors."""
    block, experts, rest = name.partition(".experts.")
    if not experts:
        return getattr(model.get_submodule(name).weight, what)
    index, _, kind = rest.partition(".")
    module = model.get_submodule(f"{block}.experts")
    if kind == "down_proj":
        return getattr(module.down_proj, what)[int(index)]
    return getattr(module.gate_up_proj, what)[int(index)].chunk(2)[kind == "up_proj"]


def changes(model, names, bits):
    """Q_b(W) - W of every matrix."""
    found = {}
    for name in names:
        stored = of_matrix(model, name, "data").bfloat16()
        found[name] = quantize(stored, bits, SYMMETRIC[bits]).dequantize().float() - stored.float()
    return found


@pytest.fixture(scope="module")
def reference(files):
    """The same model in float32, its embedding apart from its head, as a planned head is."""
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_inner_products_are_those_of_per_example_gradients(files, task, reference, tmp_path):
    run = run_of(files, task, tmp_path)
    assert run.model.compute_dtype in (torch.float32, torch.bfloat16)
    found = loss.inner_products(run, make_batches(run.sequences, 2), BITS, Rounding())
    assert set(found) == {*files.matrices, HEAD}
    # float32 against float32, sums in another order; bf16 walks round every activation to 2^-9
    tolerance = 1e-4 if run.model.compute_dtype == torch.float32 else 0.05
    for place, bits in enumerate(BITS):
        errors = changes(reference, found, bits)
        for i, sequence in enumerate(run.sequences):
            reference.zero_grad()
            nll(reference, sequence).backward()
            for name in found:
                gradient = of_matrix(reference, name, "grad")
                expected = (gradient * errors[name]).sum().item()
                scale = gradient.norm().item() * errors[name].norm().item()
                assert abs(found[name][i, place].item() - expected) <= tolerance * scale, (name, bits, i)


def test_the_first_order_term_is_the_slope_of_the_loss(files, task, reference, tmp_path):
    run = run_of(files, task, tmp_path)
    found = loss.inner_products(run, make_batches(run.sequences, 8), (3,), Rounding())
    name = "model.layers.1.self_attn.o_proj"
    weight, error = reference.get_submodule(name).weight, changes(reference, [name], 3)[name]
    step = 0.02
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * error
            losses.append(torch.stack([nll(reference, sequence) for sequence in run.sequences]).double())
            weight -= sign * step * error
    slopes = (losses[0] - losses[1]) / (2 * step)
    # central differences of a smooth loss: an error of step^2 times a third derivative, and float32 noise over step
    assert torch.allclose(found[name][:, 0], slopes, atol=0.02 * slopes.abs().max().item())


@pytest.mark.parametrize("terms", ["first", "second", "both"])
def test_costs_are_the_documented_formula_over_a_units_matrices(files, task, tmp_path, terms):
    run = run_of(files, task, tmp_path, "layer")
    products = loss.inner_products(run, make_batches(run.sequences, 3), BITS, Rounding())
    settings = loss.Settings(terms=terms, curvature="empirical", bits=BITS, batch_size=3)
    tokens = torch.tensor([len(s.input_ids) - s.prompt_len for s in run.sequences]).double()
    for entry in loss.score_units(run, settings):
        moved = sum(products[name] for name in run.units[entry.unit])[:, 0]
        parts = {"first": moved, "second": tokens * moved.square() / 2}
        parts["both"] = parts["first"] + parts["second"]
        assert entry.score == entry.costs[3] == pytest.approx(parts[terms].mean().item(), rel=1e-9)
        assert entry.stderr == pytest.approx(parts[terms].std().item() / EXAMPLES**0.5, rel=1e-9)
        assert ("first_order" in entry.details, "second_order" in entry.details) == (
            terms != "second",
            terms != "first",
        )


def test_the_fisher_root_squares_to_the_softmaxs_fisher_matrix():
    p = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    root = loss.fisher_root(p.expand(7, 7), torch.eye(7, dtype=torch.float64)).T
    assert torch.allclose(root @ root.T, p.diag() - p[:, None] * p, atol=1e-12)


def test_the_models_own_curvature_is_the_divergence_of_a_small_change(task, tmp_path):
    files = ModelFiles(make_tiny("qwen3", tmp_path / "model", num_hidden_layers=1))
    reference = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    run = run_of(files, task, tmp_path)
    name = "model.layers.0.mlp.down_proj"
    settings = [loss.Settings(terms="second", curvature="model", bits=(8,), seed=seed) for seed in range(24)]
    draws = []
    for chosen in settings:
        draws.append({entry.unit: entry.score for entry in loss.score_units(run, chosen)}[name])
        for file in tmp_path.glob("journal*"):
            file.unlink()
    error = changes(reference, [name], 8)[name]
    divergence = []
    for sequence in run.sequences:
        logs = []
        for factor in (0, 1):
            with torch.no_grad():
                reference.get_submodule(name).weight += factor * error
                logits = reference(input_ids=torch.tensor([sequence.input_ids])).logits[0].double()
                reference.get_submodule(name).weight -= factor * error
                logs.append(logits[sequence.prompt_len - 1 : -1].log_softmax(-1))
        divergence.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    # 24 draws of 5 chi-squared variables each: a standard error of sqrt(2 / 120), 13%; twice that and a little more
    expected = torch.stack(divergence).mean().item()
    assert sum(draws) / len(draws) == pytest.approx(expected, rel=0.35)


def test_pseudo_gradients_do_not_depend_on_the_batches(task, tmp_path):
    files = ModelFiles(make_tiny("qwen3", tmp_path / "model", num_hidden_layers=1))
    found = []
    for size in (1, 4):
        run = run_of(files, task, tmp_path)
        found.append(loss.inner_products(run, make_batches(run.sequences, size), (4,), Rounding(), sampled=True))
        for file in tmp_path.glob("journal*"):
            file.unlink()
    for name in found[0]:
        # the same draws; padding changes the order of float32 sums, on bf16 walks roundings of 2^-9
        assert torch.allclose(found[0][name], found[1][name], atol=0.02 * found[0][name].abs().max().item())


@pytest.mark.parametrize(
    ("save_every_s", "walked"),
    [(0.0, [3, 2, 1, 1, 0]), (60.0, [3, 2, 1, 3, 2, 1, 0])],  # after every block, and not before the kill
)
def test_a_run_killed_on_its_way_back_goes_on_from_what_it_saved(task, tmp_path, monkeypatch, save_every_s, walked):
    files = ModelFiles(make_tiny("llama", tmp_path / "model", num_hidden_layers=4))
    settings = {"batch_size": 2, "max_examples": EXAMPLES, "curvature": "empirical"}
    whole, _ = score(files, task, "loss", tmp_path / "whole.json", settings, "cpu", granularity="fused", head=True)
    again, _ = score(files, task, "loss", tmp_path / "again.json", settings, "cpu", granularity="fused", head=True)
    assert again.units == whole.units  # or the last comparison would say nothing
    monkeypatch.setattr(loss, "_SAVE_EVERY_S", save_every_s)
    through = loss._through_block
    layers = []

    def die_in_layer_1(model, layer, *rest):
        layers.append(layer)
        if layers == [3, 2, 1]:
            raise KeyboardInterrupt
        through(model, layer, *rest)

    monkeypatch.setattr(loss, "_through_block", die_in_layer_1)
    with pytest.raises(KeyboardInterrupt):
        score(files, task, "loss", tmp_path / "s.json", settings, "cpu", granularity="fused", head=True)
    resumed, _ = score(files, task, "loss", tmp_path / "s.json", settings, "cpu", granularity="fused", head=True)
    assert layers == walked
    assert resumed.units == whole.units
    assert not list(tmp_path.glob("*.journal*"))


def test_gradients_that_are_not_finite_name_the_block(task, tmp_path):
    """Activations stay finite, a hundred norms in a row make a gradient that does not."""
    from safetensors.torch import load_file, save_file

    folder = make_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    # The embedding vanishes, so the first norm's slope is 1 / sqrt(eps), times weights that the norm's zeros hide.
    tensors["model.embed_tokens.weight"].zero_()
    tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gradient is not finite in model\.layers\.0"):
        score(ModelFiles(folder), task, "loss", tmp_path / "s.json", {}, "cpu")
