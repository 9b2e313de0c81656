"""The lab model: its data comes back from the seed, its conditioning changes no answer, its training resumes."""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config

from benchmarks.lab import tokenizer as lab_tokenizer
from benchmarks.lab.condition import LAB, MODEL, check_same_function, condition
from benchmarks.lab.corpus import (
    DENSE_PHASE,
    PHASE_1,
    PHASE_2,
    SEED,
    Document,
    Mixture,
    task_items,
    training_documents,
    write_tasks,
)
from benchmarks.lab.packing import KINDS, ROW_TOKENS, pack
from benchmarks.lab.recipe import SCHEDULE_2
from benchmarks.lab.train import Schedule, dense_config, lab_config, new_model, train
from benchmarks.lab.trivia import knowledge_base

DENSE = LAB / "dense"
TASKS = ("trivia", "math", "code")
PROMPTS = (
    "Question: The feapolbird eats what?\nAnswer:",
    "Question: Sam collects 10 eggs. He gives 2 of them to Emma. How many eggs does he have left?\nAnswer:",
    "Question: Write a python function f(xs) that reverses the list and returns the sum.\nAnswer:",
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """These tensors are small: a second thread costs more than it gives, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("folder", "phase"), [(LAB / "tasks", PHASE_2), (DENSE / "tasks", DENSE_PHASE)])
def test_task_files_come_back_from_the_seed_byte_for_byte(folder, phase, tmp_path):
    write_tasks(tmp_path, phase)
    for task in TASKS:
        header = yaml.safe_load((folder / task / "task.yaml").read_text())
        for split in ("calibration", "test"):
            made = (tmp_path / task / f"{split}.jsonl").read_bytes()
            published = (folder / task / header[split]).read_bytes()
            assert sha256(made).hexdigest() == sha256(published).hexdigest(), (task, split)


def test_the_dense_world_has_nine_times_the_facts_per_parameter():
    facts = len(knowledge_base(SEED, DENSE_PHASE.worlds))
    assert facts == 14_600
    first = len(knowledge_base(SEED, PHASE_2.worlds)) / _linear_parameters(lab_config())
    assert 8 < facts / _linear_parameters(dense_config()) / first < 9


def _linear_parameters(config):
    with torch.device("meta"):
        model = new_model(config)
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))


def test_the_dense_model_has_the_shape_of_its_recipe():
    expected = dense_config().to_dict()
    published = json.loads((DENSE / "model" / "config.json").read_text())
    for name in published.keys() - {"architectures", "dtype", "transformers_version"}:
        assert published[name] == expected[name], name


@pytest.mark.parametrize("folder", [LAB, DENSE])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_header_names_files_that_are_there(folder, task):
    folder = folder / "tasks" / task
    header = yaml.safe_load((folder / "task.yaml").read_text())
    assert header["name"] == task
    assert len((folder / header["calibration"]).read_text().splitlines()) == 512
    assert len((folder / header["test"]).read_text().splitlines()) == 500


@pytest.fixture(scope="module")
def phase_1_documents():
    return training_documents(PHASE_1)


def test_the_tokenizer_comes_back_from_the_seed_byte_for_byte(phase_1_documents, tmp_path):
    lab_tokenizer.train(lab_tokenizer.sample(phase_1_documents)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


def test_no_training_prompt_is_a_test_or_calibration_prompt(phase_1_documents):
    held_out = {item["prompt"] for _, _, items in task_items() for item in items}
    assert len(held_out) == 3 * (500 + 512)
    small_phase_2 = replace(PHASE_2, mixture=Mixture(trivia=40_000, math=4_000, code=4_000, drill=10))
    for documents in (phase_1_documents, training_documents(small_phase_2)):
        for kind, of_kind in documents.items():
            assert held_out.isdisjoint(document.prompt for document in of_kind), kind


def test_no_training_prompt_of_the_dense_model_is_a_test_or_calibration_prompt():
    held_out = {item["prompt"] for _, _, items in task_items(DENSE_PHASE) for item in items}
    small = replace(DENSE_PHASE, mixture=Mixture(trivia=30_000, math=500, code=500, drill=10))
    for kind, of_kind in training_documents(small).items():
        assert held_out.isdisjoint(document.prompt for document in of_kind), kind


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL).backend_tokenizer


@pytest.fixture(scope="module")
def small_documents():
    mixture = Mixture(trivia=2_000, math=250, code=150, drill=20)
    return training_documents(replace(PHASE_2, mixture=mixture))


def test_packing_keeps_every_document_whole_and_learns_its_answer_only(small_documents, tokenizer):
    rows = pack(small_documents, tokenizer, PHASE_1)
    packed = []
    for tokens, kinds in zip(rows.tokens.tolist(), rows.kinds.tolist(), strict=True):
        starts = [i for i, token in enumerate(tokens) if token == 1]
        for start, stop in zip(starts, [*starts[1:], ROW_TOKENS], strict=True):
            learned = [i for i in range(start, stop) if kinds[i]]
            (kind,) = {kinds[i] for i in learned}
            prompt = tokenizer.decode(tokens[start + 1 : learned[0]])
            answer = tokenizer.decode([tokens[i] for i in learned], skip_special_tokens=False)
            packed.append((kind, prompt, answer))
    expected = [
        (KINDS[kind], document.prompt, f"{document.completion}</s>")
        for kind, of_kind in small_documents.items()
        for document in of_kind
    ]
    assert sorted(packed) == sorted(expected)


def test_the_second_phase_learns_the_results_of_a_drill_and_not_its_questions(tokenizer):
    drill = Document("Question: Practice.\nAnswer:", " 3 + 4 = 7. 20 - 5 = 15.")
    rows = pack({"trivia": [], "math": [], "code": [], "drill": [drill]}, tokenizer, PHASE_2)
    learned = rows.tokens[rows.kinds > 0].tolist()
    assert tokenizer.decode(learned) == " 7. 15."


def test_a_document_longer_than_a_row_is_an_error(tokenizer):
    endless = Document("Question: Practice.\nAnswer:", " 1" * ROW_TOKENS)
    with pytest.raises(ValueError, match="does not fit a row of 257"):
        pack({"trivia": [endless], "math": [], "code": [], "drill": []}, tokenizer, PHASE_1)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    return condition(MODEL, tmp_path_factory.mktemp("lab") / "conditioned")


@pytest.fixture(scope="module")
def weights(conditioned):
    return load_file(MODEL / "model.safetensors"), load_file(conditioned / "model.safetensors")


def test_conditioning_preserves_the_logits_bit_for_bit(conditioned):
    assert check_same_function(MODEL, conditioned, PROMPTS, max_new_tokens=12) > 60


def test_the_check_finds_one_changed_weight(conditioned, tmp_path):
    for file in conditioned.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.5.mlp.down_proj.weight"][7, 11] *= 2
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="differ"):
        check_same_function(MODEL, tmp_path, PROMPTS, max_new_tokens=4)


def test_conditioned_weights_are_the_published_variant(weights):
    digest = sha256()
    _, conditioned_weights = weights
    for name in sorted(conditioned_weights):
        digest.update(conditioned_weights[name].view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == "e11dda0138913f660e89c9d3d277ebed81b7095df25644b9f6d811e04e4f48b8"


def test_conditioned_weights_differ_from_the_plain_ones_by_powers_of_two(weights):
    plain, conditioned_weights = weights
    assert plain.keys() == conditioned_weights.keys()
    for name, weight in plain.items():
        nonzero = weight != 0
        exponents = torch.log2(conditioned_weights[name][nonzero].double() / weight[nonzero].double())
        assert torch.equal(exponents, exponents.round()), name
        moved = (exponents != 0).float().mean().item()
        if any(kind in name for kind in ("_proj", "input_layernorm", "post_attention_layernorm")):
            assert moved > 0.4, name
        else:
            assert moved == 0, name


def test_four_bits_cost_a_conditioned_matrix_at_least_2_5_times_the_error(weights):
    # The error is measured where the plain weights live: after the scales are moved back. Over all 84 matrices the
    # growth is 3.06 to 3.5 for this seed, so 2.5 holds unless scales or draws change.
    plain, conditioned_weights = weights
    for name, weight in plain.items():
        if "_proj" not in name:
            continue
        weight, uneven = weight.float(), conditioned_weights[name].float()
        back = torch.where(uneven == 0, 1.0, weight / uneven)
        plain_error = (_round_to_4_bits(weight) - weight).norm()
        conditioned_error = (_round_to_4_bits(uneven) * back - weight).norm()
        assert conditioned_error > 2.5 * plain_error, name


def _round_to_4_bits(weight):
    """Asymmetric round to nearest in groups of 128 along the inputs."""
    groups = weight.reshape(weight.shape[0], -1, 128)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    scale = (groups.amax(-1, keepdim=True).clamp(min=0) - low) / 15
    zero = (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).reshape(weight.shape)


def test_conditioning_twice_does_nothing_and_other_settings_are_refused(conditioned):
    before = (conditioned / "model.safetensors").stat().st_mtime_ns
    assert condition(MODEL, conditioned, sigma=1.0, seed=0) == conditioned
    assert (conditioned / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="is not this conditioning"):
        condition(MODEL, conditioned, sigma=0.7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
    ],
)
def test_a_model_that_conditioning_would_change_is_refused(field, value, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | {field: value}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").touch()
    with pytest.raises(ValueError, match=f"{field} is .* allowed is"):
        condition(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_and_a_negative_sigma_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is the path right"):
        condition(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        condition(MODEL, tmp_path / "out", sigma=-1)


# Training -----------------------------------------------------------------------------------------------------------

SCHEDULE = Schedule(steps=12, warmup_steps=3, decay_fraction=0.5, momentum_steps=10, batch_rows=2)


def _tiny_model():
    return new_model(
        Qwen3Config(
            vocab_size=3072,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="module")
def rows(small_documents, tokenizer):
    return pack(small_documents, tokenizer, PHASE_2)


class _Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_parameters_of_an_uninterrupted_one(rows, tmp_path):
    uninterrupted, losses = _tiny_model(), []
    train(uninterrupted, rows, SCHEDULE, tmp_path / "a.pt", on_step=lambda report: losses.append(report.losses))

    def kill_after_step_7(report):
        if report.step == 7:
            raise _Killed

    with pytest.raises(_Killed):
        train(_tiny_model(), rows, SCHEDULE, tmp_path / "b.pt", save_every=3, on_step=kill_after_step_7)
    resumed, steps = _tiny_model(), []
    train(resumed, rows, SCHEDULE, tmp_path / "b.pt", save_every=3, on_step=lambda report: steps.append(report.step))

    assert steps == list(range(7, 13)), "the last checkpoint was written after step 6"
    for name, parameter in uninterrupted.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name
    # An untrained model loses ln 3072 = 8.03 nats per token; the first dozen steps learn the end token and full stops.
    assert losses[0]["trivia"] > 7.5
    assert losses[-1]["trivia"] < losses[0]["trivia"] - 1


def test_a_checkpoint_of_another_run_is_refused(rows, tmp_path):
    checkpoint = tmp_path / "phase.pt"
    train(_tiny_model(), rows, replace(SCHEDULE, steps=1), checkpoint)
    with pytest.raises(ValueError, match="use the same settings or another output folder"):
        train(_tiny_model(), rows, replace(SCHEDULE, steps=2), checkpoint)


def test_the_learning_rate_warms_up_stays_and_falls_to_a_floor():
    factors = [SCHEDULE_2.learning_rate_factor(step) for step in range(SCHEDULE_2.steps)]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[24:226] == [1.0] * 202, "full rate from step 25 on, until 70% of 751 steps are left"
    assert factors[226] < 1
    assert factors[225:] == sorted(factors[225:], reverse=True)
    assert factors[-1] == 0.02
