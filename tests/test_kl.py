"""Output divergence against its definition, noise against quantization, and the data-free baseline."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from taq_vllm.model_files import ModelFiles
from taq_vllm.quantizer import quantize
from taq_vllm.rounding import Rounding
from taq_vllm.scorers.kl import Noise
from taq_vllm.scoring import baseline, score
from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import load_task
from taq_vllm.units import HEAD, units_of

EXAMPLES = 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=2))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Prompts of different lengths, without answers."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"id": str(i), "prompt": f"Question: {'why ' * i}?\nAnswer:", "answers": ["x"]} for i in range(EXAMPLES)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(folder / "c.jsonl")


def load(files):
    return AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16).to(
        StreamedModel(files, "cpu").compute_dtype
    )


@pytest.mark.parametrize(
    ("granularity", "on"), [("layer", "prompts"), ("module", "prompts"), ("layer", "answers")], ids=str
)
def test_costs_are_the_mean_divergence_over_tokens(files, task, tmp_path, granularity, on):
    examples = tuple(replace(e, completion=" so" * (1 + i)) for i, e in enumerate(task.calibration))
    scores, _ = score(
        files,
        replace(task, calibration=examples) if on == "answers" else task,
        "kl",
        tmp_path / "s.json",
        {"batch_size": 1, "bits": [4, 8], "on": on},
        "cpu",
        granularity=granularity,
        head=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    prompts = [tokenizer(example.prompt).input_ids for example in task.calibration]
    completions = [tokenizer(e.completion, add_special_tokens=False).input_ids for e in examples]
    # The last token's distribution follows the prompt; that after the end token counts for nothing.
    read = [
        (torch.tensor([prompt + completion]), slice(len(prompt) - 1, None))
        if on == "answers"
        else (torch.tensor([prompt]), slice(None))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]

    @torch.no_grad()
    def logs(model):
        return [model(input_ids=ids).logits[0, places].float().log_softmax(-1).double() for ids, places in read]

    full = logs(load(files))
    units = units_of([*files.matrices, HEAD], granularity)
    for entry, (unit, names) in zip(scores.units, units.items(), strict=True):
        assert entry.unit == unit
        for bits in (4, 8):
            model = load(files)
            for name in names:
                matrix = model.get_submodule(name)
                matrix.weight.data = (
                    quantize(matrix.weight.data.bfloat16(), bits, bits == 8).dequantize().to(matrix.weight)
                )
            sums = torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(full, logs(model), strict=True)])
            tokens = torch.tensor([len(p) for p in full]).double()
            # float32 logits: differences of logs near 1e-6, of which a divergence of 1e-4 keeps two digits at 8 bits
            assert entry.costs[bits] == pytest.approx((sums.sum() / tokens.sum()).item(), rel=0.01, abs=2e-7)
            residual = (sums - entry.costs[bits] * tokens) / tokens.mean()
            assert entry.cost_stderrs[bits] == pytest.approx(
                (residual.std() / EXAMPLES**0.5).item(), rel=0.02, abs=1e-7
            )
        assert entry.score == entry.costs[4] > entry.costs[8] > 0


def test_answers_are_read_whole_however_long_their_prompts_are(files, task, tmp_path):
    examples = tuple(replace(e, completion=" so it is") for e in task.calibration)
    labelled = replace(task, calibration=examples)
    costs = []
    for name, most in (("cut", 2), ("whole", 512)):
        settings = {"on": "answers", "max_tokens": most}
        scores, _ = score(files, labelled, "kl", tmp_path / f"{name}.json", settings, "cpu", granularity="layer")
        costs.append([entry.costs for entry in scores.units])
    assert costs[0] == costs[1]


def test_noise_has_the_variance_of_a_step_and_its_own_seed():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounding = Rounding()
    noise = Noise(rounding, 0)("a", weight, 4) - weight.float()
    steps = quantize(weight, 4, False).scale.float().repeat_interleave(128, 1)
    # 16384 draws: their variance is known to sqrt(4/5 / 16384), 0.7%
    assert (noise / steps).square().mean().item() == pytest.approx(1 / 12, rel=0.03)
    assert (noise / steps).abs().max() <= 0.5 + 1e-5
    error = rounding("a", weight, 4).float() - weight.float()
    assert noise.square().mean().item() == pytest.approx(error.square().mean().item(), rel=0.1)
    assert torch.equal(Noise(rounding, 0)("a", weight, 4) - weight.float(), noise)
    for other in (Noise(rounding, 1)("a", weight, 4), Noise(rounding, 0)("b", weight, 4)):
        assert not torch.equal(other - weight.float(), noise)


def test_noise_and_quantization_diverge_alike(files, task, tmp_path):
    by_kind = {}
    for kind in ("quantization", "noise"):
        scores, _ = score(files, task, "kl", tmp_path / f"{kind}.json", {"perturbation": kind, "bits": [6]}, "cpu")
        by_kind[kind] = torch.tensor([entry.score for entry in scores.units])
    ratio = by_kind["noise"] / by_kind["quantization"]
    # the same variance in another direction: within a factor of two for sums over 300,000 weights
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()
    assert (ratio != 1).all()


def test_prompts_without_answers_are_enough_unless_answers_are_to_be_read(files, task, tmp_path):
    bare = replace(task, calibration=tuple(replace(e, answers=(), completion="") for e in task.calibration))
    scores, _ = score(files, bare, "kl", tmp_path / "s.json", {}, "cpu")
    assert all(entry.stderr > 0 for entry in scores.units)
    with pytest.raises(ValueError, match="which scorer kl needs"):
        score(files, bare, "kl", tmp_path / "answers.json", {"on": "answers"}, "cpu")


@pytest.mark.parametrize("granularity", ["layer", "fused", "module"])
def test_weight_error_is_the_sum_of_relative_errors(files, granularity):
    scores = baseline(files, "weight-error", {"bits": [3, 8]}, granularity, head=True)
    assert [entry.unit for entry in scores.units] == list(units_of([*files.matrices, HEAD], granularity))
    for entry, names in zip(scores.units, units_of([*files.matrices, HEAD], granularity).values(), strict=True):
        for bits in (3, 8):
            expected = 0.0
            for name in names:
                weight = files.read(f"{name}.weight")
                error = quantize(weight, bits, bits == 8).dequantize().double() - weight.double()
                expected += (error.norm() ** 2 / weight.double().norm() ** 2).item()
            assert entry.costs[bits] == pytest.approx(expected, rel=1e-5)
        assert entry.score == entry.costs[3] > entry.costs[8]
    assert scores.cost_unit == "relative squared error of weights"


def test_weight_error_of_a_tied_head_is_the_embeddings(tmp_path):
    files = ModelFiles(make_tiny("qwen2", tmp_path / "model", num_hidden_layers=1))
    assert files.tied
    (*_, head) = baseline(files, "weight-error", {}, "layer", head=True).units
    weight = files.read("model.embed_tokens.weight")
    error = quantize(weight, 4, False).dequantize().double() - weight.double()
    assert head.costs[4] == pytest.approx((error.norm() ** 2 / weight.double().norm() ** 2).item(), rel=1e-5)


def test_matrices_that_groups_do_not_divide_cost_nothing(tmp_path, task):
    """hidden size 192: only down_proj, with 384 inputs, can be quantized."""
    files = ModelFiles(make_tiny("llama", tmp_path / "model", num_hidden_layers=1, hidden_size=192))
    for scores in (
        baseline(files, "weight-error", {}, "fused", head=True),
        score(files, task, "kl", tmp_path / "k.json", {}, "cpu", granularity="fused", head=True)[0],
        score(files, task, "loss", tmp_path / "l.json", {}, "cpu", granularity="fused", head=True)[0],
        score(files, task, "taqo", tmp_path / "t.json", {}, "cpu", granularity="fused", head=True)[0],
    ):
        for entry in scores.units:
            assert (entry.costs[4] != 0) == entry.unit.endswith("down_proj"), (scores.scorer.name, entry.unit)
