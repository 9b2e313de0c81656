"""The oracle against the naive computation, its cost in block runs, its measures, and its journal."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from taq_vllm import journal
from taq_vllm.metrics import f1
from taq_vllm.model_files import ModelFiles
from taq_vllm.quantizer import quantize
from taq_vllm.scorers import taqo
from taq_vllm.scoring import calibration_sequences, score
from taq_vllm.stream import StreamedModel, make_batches, matrices_of, replace_weight
from taq_vllm.tasks import load_task
from taq_vllm.units import HEAD, units_of

EXAMPLES = 6
LAYERS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=3))


def make_task(folder, files, metric="em", **header):
    """A task whose answers are what the tiny model begins with."""
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16).float()
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    rows = []
    for i in range(EXAMPLES):
        prompt = f"Question: what is {i} plus {i * i}?{' Think.' * (i % 3)}\nAnswer:"
        ids = torch.tensor([tokenizer(prompt).input_ids])
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :])
        rows.append({"id": str(i), "prompt": prompt, "answers": [answer], "completion": answer})
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.json").write_text(
        json.dumps({"name": "tiny", "metric": metric, "calibration": "calibration.jsonl"} | header)
    )
    return load_task(folder / "task.json")


@pytest.fixture(scope="module")
def task(tmp_path_factory, files):
    """Every answer ends with a stop string, so that exact match starts high and can fall."""
    found = make_task(tmp_path_factory.mktemp("task"), files)
    return replace(found, stop=tuple(sorted({example.completion[-1] for example in found.calibration})))


def naive(files, task, granularity, bits, batch_size, head=True):
    """Every unit by a pass through the whole model: (exact [units, examples], nll, and both of the full model)."""
    model = StreamedModel(files, "cpu")
    sequences = calibration_sequences(model, task, len(task.calibration), True)
    batches = make_batches(sequences, batch_size)
    runs = 0

    def answers(matrices):
        nonlocal runs
        hidden = model.embed(batches)
        for layer in range(model.layers):
            with model.block(layer) as block:
                for name, matrix in matrices_of(block).items():
                    if f"model.layers.{layer}.{name}" in matrices:
                        stored = matrix.weight.to(model.dtype)
                        replace_weight(matrix, quantize(stored, bits, bits >= 8).dequantize())
                hidden.replace(lambda states, layer=layer, block=block: model.run(layer, block, states))
                runs += len(batches)
        with model.head() as end:
            if HEAD in matrices:
                end = replace(end, weight=quantize(end.weight, bits, bits >= 8).dequantize())
            return taqo.read_answers(batches, hidden, end, len(sequences))

    full = answers(())
    units = units_of([*files.matrices, *([HEAD] if head else [])], granularity)
    return {unit: answers(matrices) for unit, matrices in units.items()}, full, runs


@pytest.mark.parametrize("granularity", ["layer", "fused", "module"])
def test_prefix_reuse_equals_full_passes_to_the_bit(files, task, tmp_path, granularity):
    scores, _ = score(
        files,
        task,
        "taqo",
        tmp_path / "s.json",
        {"batch_size": 4, "bits": [3, 8]},
        "cpu",
        granularity=granularity,
        head=True,
    )
    for bits in (3, 8):
        perturbed, full, _ = naive(files, task, granularity, bits, 4)
        assert [entry.unit for entry in scores.units] == list(perturbed)
        for entry in scores.units:
            values = perturbed[entry.unit]
            assert entry.costs[bits] == (values["nll"] - full["nll"]).mean().item()
            if bits == 3:
                assert entry.score == (full["exact"] - values["exact"]).mean().item()
                assert entry.tiebreak == entry.costs[3]
    assert len({entry.costs[3] for entry in scores.units}) == len(scores.units)


def test_twelve_layers_need_at_most_six_tenths_of_the_naive_block_runs(tmp_path, monkeypatch):
    files = ModelFiles(make_tiny("llama", tmp_path / "model", num_hidden_layers=LAYERS))
    task = make_task(tmp_path, files)
    runs = 0
    run = StreamedModel.run

    def counted(*args):
        nonlocal runs
        runs += 1
        return run(*args)

    monkeypatch.setattr(StreamedModel, "run", counted)
    scores, _ = score(files, task, "taqo", tmp_path / "s.json", {"batch_size": EXAMPLES}, "cpu", granularity="layer")
    ours, runs = runs, 0
    perturbed, full, _ = naive(files, task, "layer", 4, EXAMPLES, head=False)
    assert runs == LAYERS + LAYERS**2
    assert ours == LAYERS + LAYERS * (LAYERS + 1) // 2
    assert ours <= 0.6 * runs
    for entry in scores.units:
        assert entry.costs[4] == (perturbed[entry.unit]["nll"] - full["nll"]).mean().item()


def test_an_interrupted_oracle_continues_and_finds_the_same(files, task, tmp_path, monkeypatch):
    settings = {"bits": [4, 8]}
    whole, _ = score(files, task, "taqo", tmp_path / "whole.json", settings, "cpu", granularity="fused")
    appended = journal.append
    keys = []

    def die_after_three(file, entry):
        appended(file, entry)
        keys.append((entry["unit"], entry["bits"]))
        if len(keys) == 3:
            with file.open("a") as file:
                file.write('{"unit": "model.layers.0.mlp.down_proj", "bits": 4, "exact": [1.0, 0')  # what a kill leaves
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "append", die_after_three)
    with pytest.raises(KeyboardInterrupt):
        score(files, task, "taqo", tmp_path / "s.json", settings, "cpu", granularity="fused")
    assert not (tmp_path / "s.json").exists()
    resumed, fresh = score(files, task, "taqo", tmp_path / "s.json", settings, "cpu", granularity="fused")
    assert fresh
    assert len(keys) == len(set(keys)) == 2 * len(whole.units)
    assert resumed.units == whole.units
    assert not list(tmp_path.glob("*.journal*"))


def test_generating_scores_the_tasks_metric_of_real_greedy_outputs(files, tmp_path):
    task = make_task(tmp_path, files, "f1", max_new_tokens=6)
    settings = {"measure": "generate", "bits": [3], "batch_size": 4}
    scores, _ = score(files, task, "taqo", tmp_path / "s.json", settings, "cpu", granularity="layer")
    tokenizer = AutoTokenizer.from_pretrained(files.path)

    def metric(layer):
        model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16)
        if layer is not None:
            for module in model.model.layers[layer].modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = quantize(module.weight.data, 3, False).dequantize()
        model = model.to(StreamedModel(files, "cpu").compute_dtype)
        found = []
        for example in task.calibration:
            ids = torch.tensor([tokenizer(example.prompt).input_ids])
            output = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            found.append(f1(tokenizer.decode(output, skip_special_tokens=True), example.answers))
        return sum(found) / len(found)

    full = metric(None)
    drops = [full - metric(layer) for layer in range(files.layers)]
    assert [entry.score for entry in scores.units] == pytest.approx(drops, abs=1e-12)
    assert any(drops)
    assert scores.units[0].details["full_metric"] == pytest.approx(full)


@pytest.mark.parametrize(
    ("metric", "settings", "said"),
    [
        ("f1", {"metric": "task"}, "cannot be teacher-forced: add measure=generate"),
        ("math", {"metric": "task"}, "judged by math"),
        ("em", {"metric": "task"}, "example 0: got 2 answers .* add measure=generate"),
        ("em", {"measure": "generate", "metric": "exact"}, "needs no generation"),
        ("em", {"bits": [4, 4]}, "each once"),
        ("em", {"bits": [16]}, "needs one or more of 2, 3, 4"),
        ("em", {"bits": []}, "needs one or more of 2, 3, 4"),
        ("em", {"measure": "generate", "max_examples": 4}, "exceed the model's 256"),
    ],
)
def test_requests_that_cannot_be_met_say_what_to_do(files, task, tmp_path, metric, settings, said):
    several = tuple(replace(e, answers=(*e.answers, "another")) for e in task.calibration)
    asked = replace(task, metric=metric, max_new_tokens=250, calibration=several)
    with pytest.raises(ValueError, match=said):
        score(files, asked, "taqo", tmp_path / "s.json", settings, "cpu", granularity="layer")


def test_em_is_teacher_forced_where_the_completion_is_the_one_answer(files, task, tmp_path):
    settings = {"metric": "task"}
    exact, _ = score(files, task, "taqo", tmp_path / "exact.json", {}, "cpu", granularity="layer")
    em, _ = score(files, task, "taqo", tmp_path / "em.json", settings, "cpu", granularity="layer")
    assert em.units == exact.units
    worked = [replace(e, completion=f" So it is{e.completion}") for e in task.calibration]
    for calibration, count in ((worked, 1), (worked, 5)):
        asked = replace(task, calibration=(*task.calibration[:-count], *calibration[-count:]))
        with pytest.raises(ValueError, match=f"example {EXAMPLES - count}: got 1 answers and the completion ' So it"):
            score(files, asked, "taqo", tmp_path / "s.json", settings, "cpu", granularity="layer")


def test_a_model_that_gives_next_to_no_reference_is_warned_of(files, task, tmp_path, capfd):
    scores, _ = score(files, task, "taqo", tmp_path / "known.json", {}, "cpu", granularity="layer")
    assert scores.units[0].details["full_exact_match"] > 0.5
    assert "warning" not in capfd.readouterr().err
    unknown = replace(task, calibration=tuple(replace(e, completion=" none of it") for e in task.calibration))
    score(files, unknown, "taqo", tmp_path / "unknown.json", {}, "cpu", granularity="layer")
    assert "gives 0.0% of the reference completions" in capfd.readouterr().err


def test_code_is_not_run_without_permission(files, tmp_path):
    row = {"prompt": "def one():", "tests": ["assert one() == 1"], "completion": "\n return 1"}
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"id": str(i)} | row) + "\n" for i in range(3)))
    (tmp_path / "t.json").write_text(json.dumps({"name": "c", "metric": "pass@1", "calibration": "c.jsonl"}))
    with pytest.raises(ValueError, match="--allow-code-execution"):
        score(files, load_task(tmp_path / "t.json"), "taqo", tmp_path / "s.json", {"measure": "generate"}, "cpu")


def test_an_example_without_an_answer_is_named(files, task, tmp_path):
    bare = replace(task.calibration[1], answers=(), completion="")
    unlabelled = replace(task, calibration=(task.calibration[0], bare, *task.calibration[2:]))
    for scorer in ("taqo", "loss"):
        with pytest.raises(ValueError, match="example 1 has no answers"):
            score(files, unlabelled, scorer, tmp_path / "s.json", {}, "cpu", granularity="layer")


def test_logits_that_are_not_finite_name_the_head(task, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_tiny("qwen3", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][5, 7] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for scorer in ("taqo", "kl", "loss"):
        with pytest.raises(ValueError, match="lm_head"):
            score(ModelFiles(folder), task, scorer, tmp_path / "s.json", {}, "cpu", granularity="layer")
