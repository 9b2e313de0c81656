import ast
import importlib
import inspect
import json
import math

import pytest
import torch
from pydantic import BaseModel
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from taq_vllm import __version__
from taq_vllm.methods import METHODS
from taq_vllm.model_files import ModelFiles
from taq_vllm.quantizer import quantize
from taq_vllm.scorers import SCORERS
from taq_vllm.scorers.taq import Moments, Reservoir, Settings, Statistic, matrix_entropy, z_score
from taq_vllm.scores import Scores
from taq_vllm.scoring import defaults, score
from taq_vllm.settings import settings_from
from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import load_task
from taq_vllm.units import GRANULARITIES

EXAMPLES = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def task(tmp_path_factory, files):
    """A task whose answers are what the tiny model begins with."""
    folder = tmp_path_factory.mktemp("task")
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    rows = []
    for i in range(EXAMPLES):
        prompt = f"Question: what is {i} plus {i * i}?\nAnswer:"
        ids = torch.tensor([tokenizer(prompt).input_ids])
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :])
        rows.append({"id": str(i), "prompt": prompt, "answers": [answer], "completion": answer})
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text("name: tiny\nmetric: em\ncalibration: calibration.jsonl\n")
    return load_task(folder)


def test_entropy_of_tokens_spread_evenly_over_k_directions_is_log_k():
    tokens = torch.cat([torch.eye(4), -torch.eye(4)]).repeat(3, 1)
    entropy = matrix_entropy(tokens, torch.zeros(24, dtype=torch.long), 1)
    assert entropy.value.item() == pytest.approx(math.log(4), abs=1e-9)


def test_entropy_of_tokens_along_one_line_or_all_alike_is_zero():
    line = torch.arange(10.0)[:, None] * torch.ones(1, 5)
    owners = torch.zeros(10, dtype=torch.long)
    assert matrix_entropy(line, owners, 1).value.item() == pytest.approx(0, abs=1e-6)
    assert matrix_entropy(torch.ones(10, 5), owners, 1).value.item() == 0


def test_variance_equals_torchs_per_channel_and_pooled():
    tokens = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + torch.arange(7.0)
    owners = torch.arange(50) % 5
    moments = Moments(5)
    for start in range(0, 50, 16):
        moments.update(tokens[start : start + 16], owners[start : start + 16])
    per_channel = tokens.double().var(0, unbiased=False).mean()
    assert moments.variance("channel").value == pytest.approx(per_channel.item(), rel=1e-12)
    assert moments.variance("pooled").value == pytest.approx(tokens.double().var(unbiased=False).item(), rel=1e-12)


def test_variance_holds_for_a_mean_that_would_cancel_in_float32():
    tokens = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * 0.01 + 300
    moments = Moments(1)
    moments.update(tokens, torch.zeros(4000, dtype=torch.long))
    assert moments.variance("channel").value == pytest.approx(
        tokens.double().var(0, unbiased=False).mean().item(), rel=1e-6
    )


def test_the_reservoir_is_uniform_over_the_stream():
    counts = torch.zeros(40)
    for seed in range(2000):
        reservoir = Reservoir(10, seed)
        for start in range(0, 40, 7):
            place = torch.arange(start, min(start + 7, 40))
            reservoir.update(place[:, None].float(), place)
        tokens, owners = reservoir.sample()
        assert torch.equal(tokens[:, 0].long(), owners)
        counts[owners] += 1
    # each token is kept with probability 1/4: 500 of 2000, standard deviation 19.4; 40 draws stay within 4 of them
    assert (counts - 500).abs().max() < 4 * 19.4


def test_a_reservoir_larger_than_the_stream_keeps_it_all():
    reservoir = Reservoir(10, 0)
    reservoir.update(torch.arange(6.0)[:, None], torch.arange(6))
    assert reservoir.sample()[1].tolist() == [0, 1, 2, 3, 4, 5]


def _examples(count=60, dimension=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 9, (count,), generator=generator)
    owners = torch.repeat_interleave(torch.arange(count), sizes)
    centres = torch.randn(count, dimension, generator=generator)
    tokens = centres[owners] + torch.randn(len(owners), dimension, generator=generator) * torch.arange(1, dimension + 1)
    return tokens, owners


def _bootstrap(statistic, tokens, owners, count, draws=400):
    generator = torch.Generator().manual_seed(1)
    by_example = [tokens[owners == e] for e in range(count)]
    values = []
    for _ in range(draws):
        drawn = torch.randint(count, (count,), generator=generator)
        values.append(statistic(torch.cat([by_example[e] for e in drawn])))
    return torch.tensor(values).std().item()


def test_the_standard_error_of_entropy_is_the_bootstraps_over_examples():
    tokens, owners = _examples()
    ours = matrix_entropy(tokens, owners, 60).stderr.item()
    theirs = _bootstrap(
        lambda t: matrix_entropy(t, torch.zeros(len(t), dtype=torch.long), 1).value.item(), tokens, owners, 60
    )
    # 400 draws know their own standard deviation to 3.5%; the rest is the entropy's curvature
    assert ours == pytest.approx(theirs, rel=0.2)


def test_the_standard_error_of_variance_is_the_bootstraps_over_examples():
    tokens, owners = _examples()
    moments = Moments(60)
    moments.update(tokens, owners)
    theirs = _bootstrap(lambda t: t.double().var(0, unbiased=False).mean().item(), tokens, owners, 60)
    assert moments.variance("channel").stderr.item() == pytest.approx(theirs, rel=0.15)


def test_influence_on_z_scores_is_their_derivative():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    influence = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    analytic = z_score(Statistic(values, influence)).influence
    for example in range(5):
        moved = z_score(Statistic(values + step * influence[example], influence)).value
        numeric = (moved - z_score(Statistic(values, influence)).value) / step
        assert torch.allclose(analytic[example], numeric, atol=1e-5)


def test_a_constant_column_scores_zeros_not_nan():
    result = z_score(Statistic(torch.full((4,), 0.1, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)))
    assert torch.equal(result.value, torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(result.influence).all()


PAPER = {"stability_sign": -1, "variance": "absolute"}


def test_taq_equals_equations_3_to_5_computed_from_transformers_hidden_states(files, task, tmp_path):
    scores, _ = score(files, task, "taq", tmp_path / "s.json", PAPER | {"reservoir": 100000, "batch_size": 5})
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    outputs = [[] for _ in range(files.layers)]
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda module, args, out, layer=layer: outputs[layer].append(out[0]))
    with torch.inference_mode():
        for example in task.calibration:
            model(input_ids=torch.tensor([tokenizer(example.prompt).input_ids]))
    entropy, stability = [], []
    for states in outputs:
        x = torch.cat(states).double()
        centred = x - x.mean(0)
        p = torch.linalg.eigvalsh(centred @ centred.T / len(x)).clamp(min=0)
        p = p[p > 0] / p.sum()
        entropy.append(-(p * p.log()).sum())
        stability.append(-x.var(0, unbiased=False).mean())
    h, s = torch.stack(entropy), torch.stack(stability)
    expected = 0.5 * (h - h.mean()) / h.std(unbiased=False) + 0.5 * (s - s.mean()) / s.std(unbiased=False)
    # bf16 states of padded batches differ from those of single rows in the last bit: 2^-8 relative, averaged down
    found = torch.tensor([entry.score for entry in scores.units], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=0.05)
    assert all(entry.stderr > 0 for entry in scores.units)


def test_flipping_the_stability_sign_flips_its_part(files, task, tmp_path):
    minus, _ = score(files, task, "taq", tmp_path / "a.json", {"stability_sign": -1})
    plus, _ = score(files, task, "taq", tmp_path / "b.json", {"stability_sign": 1})
    for one, other in zip(minus.units, plus.units, strict=True):
        assert one.details["z_stability"] == pytest.approx(-other.details["z_stability"])
        assert one.details["z_information"] == pytest.approx(other.details["z_information"])


def test_taqo_equals_the_naive_oracle(files, task, tmp_path):
    scores, _ = score(files, task, "taqo", tmp_path / "s.json", {"batch_size": 1}, granularity="layer")
    tokenizer = AutoTokenizer.from_pretrained(files.path)

    def answers(model):
        exact, nll = [], []
        for example in task.calibration:
            prompt = tokenizer(example.prompt).input_ids
            gold = [*tokenizer(example.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + gold])).logits[0, len(prompt) - 1 : -1].float()
            target = torch.tensor(gold)
            exact.append(float((logits.argmax(-1) == target).all()))
            nll.append(torch.nn.functional.cross_entropy(logits, target).item())
        return torch.tensor(exact), torch.tensor(nll)

    dtype = StreamedModel(files).compute_dtype
    full_exact, full_nll = answers(AutoModelForCausalLM.from_pretrained(files.path, dtype=dtype))
    for layer in range(files.layers):
        model = AutoModelForCausalLM.from_pretrained(files.path, dtype=dtype)
        for module in model.model.layers[layer].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = quantize(module.weight.data.bfloat16(), 4, False).dequantize().to(dtype)
        exact, nll = answers(model)
        found = scores.units[layer]
        assert found.score == pytest.approx((full_exact - exact).mean().item(), abs=1e-9)
        assert found.tiebreak == pytest.approx((nll - full_nll).mean().item(), abs=1e-5)
        difference = nll - full_nll
        assert found.details["nll_increase_stderr"] == pytest.approx(difference.std().item() / EXAMPLES**0.5, abs=1e-5)


def test_a_finished_score_is_not_made_again_unless_something_changed(files, task, tmp_path):
    output = tmp_path / "s.json"
    first, fresh = score(files, task, "taq", output)
    assert fresh
    again, fresh = score(files, task, "taq", output)
    assert not fresh
    assert again == first == Scores.load(output)
    other = {"alpha": 0.25, "beta": 0.75}
    with pytest.raises(ValueError, match="holds other scores"):
        score(files, task, "taq", output, other)
    assert Scores.load(output) == first
    assert score(files, task, "taq", output, other, force=True)[1]


def test_scores_of_another_version_are_made_again_and_old_files_are_of_the_first(files, task, tmp_path):
    output = tmp_path / "s.json"
    made, _ = score(files, task, "taq", output)
    assert made.made_by == f"taq-vllm {__version__}"
    made.model_copy(update={"made_by": "taq-vllm 0.0.1"}).save(output)
    again, fresh = score(files, task, "taq", output)
    assert fresh
    assert (again.units, again.made_by) == (made.units, made.made_by)
    content = json.loads(output.read_text())
    del content["made_by"]
    output.write_text(json.dumps(content))
    assert Scores.load(output).made_by == "taq-vllm 0.1.0"
    made.model_copy(update={"made_by": "taq-vllm 0.0.1", "granularity": "module"}).save(output)
    with pytest.raises(ValueError, match="holds other scores"):
        score(files, task, "taq", output)


INTERFACES = {
    "scorers": {"READS": str, "GRANULARITIES": tuple, "COST_UNIT": str | None, "KEEPS_ALL_HIDDEN_STATES": bool},
    "methods": {"READS_INPUTS": bool, "READS_OUTPUTS": bool},
}
FUNCTIONS = {"scorers": ("score_units", ["run", "settings"]), "methods": ("fit_block", ["block", "settings"])}
OPTIONAL = {"KEEPS_ALL_HIDDEN_STATES"}


@pytest.mark.parametrize("module", [*(f"scorers.{n}" for n in SCORERS), *(f"methods.{n}" for n in METHODS)])
def test_a_module_has_the_names_that_its_package_documents_and_no_others(module):
    package, _, name = module.partition(".")
    documented = importlib.import_module(f"taq_vllm.{package}").__doc__
    found = importlib.import_module(f"taq_vllm.{package}.{name.replace('-', '_')}")
    constants, (function, arguments) = INTERFACES[package], FUNCTIONS[package]
    for known in ("Settings", function, *constants):
        assert f"`{known}" in documented, known
    assigned = [node for node in ast.parse(inspect.getsource(found)).body if isinstance(node, ast.Assign)]
    own = {target.id for node in assigned for target in node.targets if target.id.isupper() and target.id[0] != "_"}
    assert constants.keys() - OPTIONAL <= own <= constants.keys()
    for known in own:
        assert isinstance(getattr(found, known), constants[known]), known
    assert issubclass(found.Settings, BaseModel)
    assert found.Settings.model_config["frozen"]
    assert found.Settings.model_config["extra"] == "forbid"
    found.Settings()
    assert list(inspect.signature(getattr(found, function)).parameters) == arguments
    if package == "scorers":
        assert found.READS in ("weights", "prompts", "answers")
        assert found.GRANULARITIES
        assert set(found.GRANULARITIES) <= set(GRANULARITIES)


@pytest.mark.parametrize("allowed_by", ["scorer taqo", "method gptq"])
def test_settings_say_what_was_got_and_what_there_is(allowed_by):
    what, name = allowed_by.split()
    module = importlib.import_module(f"taq_vllm.{what}s.{name}")
    known = next(iter(module.Settings.model_fields))
    with pytest.raises(ValueError, match=f"{allowed_by}, colour: got 'red': .*; its settings are {known}"):
        settings_from(module, allowed_by, {"colour": "red"})


@pytest.mark.parametrize(
    ("scorer", "settings", "said"),
    [
        ("magic", {}, "there are edges"),
        ("taq", {"alpha": 0.9}, "must sum to 1"),
        ("taq", {"gamma": 1}, "gamma: got 1: .*; its settings are alpha, beta"),
        ("taq", {"alpha": -0.5, "beta": 1.5}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_named(files, task, tmp_path, scorer, settings, said):
    with pytest.raises(ValueError, match=said):
        score(files, task, scorer, tmp_path / "s.json", settings)


@pytest.mark.parametrize("scorer", SCORERS)
def test_plans_are_by_matrix_where_costs_add_up_and_by_layer_where_units_are_ranked(scorer):
    expected = {"taq", "edges", "random", "uniform"}
    assert defaults(scorer) == (("monotone", "layer") if scorer in expected else ("knapsack", "module"))


def test_taq_defaults_are_the_papers_but_for_sign_and_variance():
    found = Settings()
    assert (found.stability_sign, found.variance) == (1, "relative")
    assert (found.alpha, found.beta, found.reservoir) == (0.5, 0.5, 256)
    assert (found.max_examples, found.max_tokens, found.batch_size) == (256, 512, 8)


def test_a_damaged_scores_file_is_named(tmp_path):
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match=r"s\.json is not a valid scores file"):
        Scores.load(tmp_path / "s.json")
