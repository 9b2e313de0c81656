import json
from dataclasses import replace

import pytest
from tiny_models import make_tiny

from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.general_text import GeneralText
from taq_vllm.model_files import ModelFiles
from taq_vllm.stream import StreamedModel
from taq_vllm.tasks import load_task


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return StreamedModel(ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model"))), "cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = [{"id": str(i), "prompt": f"Question: {i}?\nAnswer:", "answers": [f"{i * 7}"]} for i in range(8)]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text("name: tiny\nmetric: em\ncalibration: calibration.jsonl\n")
    return load_task(folder)


def test_plain_text_is_cut_into_pieces_of_equal_length_spread_over_it(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i}" for i in range(600)))
    general = GeneralText(file)
    few, many = general.sequences(model, 3, 64), general.sequences(model, 12, 64)
    assert {len(each.input_ids) for each in few} == {64}
    assert len(many) == 12
    everything = general.sequences(model, 1, 10_000)[0].input_ids
    assert len(everything) == model.config.max_position_embeddings
    starts = [each.input_ids[:8] for each in many]
    assert starts[0] == everything[:8]
    assert len({tuple(start) for start in starts}) == 12


def test_lines_give_their_text_prompt_or_question(model, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "one two three"}\n{"prompt": "four five"}\n{"question": "six?"}\n')
    assert len(GeneralText(file).sequences(model, 3, 64)) == 3
    with pytest.raises(ValueError, match="has 3 examples and 4 are needed"):
        GeneralText(file).sequences(model, 4, 64)


def test_a_task_gives_its_calibration_examples(model, task):
    general = GeneralText(task.path)
    assert len(general.sequences(model, 4, 64)) == 4
    assert general.sha256 == task.calibration_sha256


def test_files_that_cannot_be_used_say_what_is_needed(model, tmp_path):
    with pytest.raises(ValueError, match="no general data at"):
        GeneralText(tmp_path / "nothing.txt")
    file = tmp_path / "text.txt"
    file.write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        GeneralText(file)
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 3\)"):
        GeneralText(file)
    file.write_text("too little")
    with pytest.raises(ValueError, match="too little for 8 examples"):
        GeneralText(file).sequences(model, 8, 64)
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "fine"}\n{"words": "none"}\n')
    with pytest.raises(ValueError, match="line 2: has no text"):
        GeneralText(lines)


TESTED = [f"Question: how far is it from {i} to {i * i}?\nAnswer:" for i in range(3)] + ["Why?"]
GIVEN_AWAY = "Question:  How far is it\nfrom 1 to 1?\nanswer: 0 "


@pytest.fixture
def tested(task, tmp_path):
    test = tuple(replace(task.calibration[0], id=f"t{i}", prompt=prompt) for i, prompt in enumerate(TESTED))
    return replace(task, test=test)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("g.txt", f"one\ntwo {GIVEN_AWAY}\nthree", "line 2"),
        ("g.txt", "one\nwhy?\n", "line 2"),
        ("g.jsonl", f'\n{{"text": "fine"}}\n{json.dumps({"text": GIVEN_AWAY})}\n', "line 3"),
        ("g.jsonl", '{"prompt": "WHY?"}\n', "line 1"),
    ],
)
def test_a_test_prompt_in_the_general_text_is_refused_with_its_line(tested, tmp_path, name, content, where):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}, {where}: holds the prompt of .* test example t[13];"):
        GeneralText(tmp_path / name).check_apart(tested)


def test_a_task_as_general_data_must_not_hold_test_prompts_either(tested, task):
    GeneralText(task.path).check_apart(tested)
    leaky = replace(tested, test=(replace(tested.test[0], prompt="question: 3?  ANSWER:"),))
    with pytest.raises(ValueError, match="example 3: holds the prompt"):
        GeneralText(task.path).check_apart(leaky)


@pytest.mark.parametrize("name", ["g.txt", "g.jsonl"])
def test_text_that_only_resembles_test_prompts_is_taken(tested, tmp_path, name):
    content = "I wonder why? And how far is it from 1 to 2?\nQuestion: how far is it from 1 to 11? Answer: ten"
    (tmp_path / name).write_text(content if name == "g.txt" else json.dumps({"text": content}))
    GeneralText(tmp_path / name).check_apart(tested)


def test_quantizing_refuses_general_text_that_gives_test_prompts_away(model, tested, tmp_path):
    from plans import make_plan

    (tmp_path / "g.txt").write_text(GIVEN_AWAY * 20)
    plan = make_plan(model.files.path, lambda name: (4, False))
    calibration = Calibration(examples=4, mix_general=0.5, general=GeneralText(tmp_path / "g.txt"))
    with pytest.raises(ValueError, match=r"g\.txt, line 1: holds the prompt"):
        quantize_model(model.files, plan, tmp_path / "out", calibration, tested)


def test_the_ratio_is_the_general_share_of_the_examples(task, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some words")
    general = GeneralText(file)
    assert Calibration(examples=8, mix_general=0.25, general=general).counts(task) == (6, 2)
    assert Calibration(examples=80, mix_general=0.2, general=general).counts(task) == (8, 2)
    assert Calibration(examples=8, mix_general=1.0, general=general).counts(None) == (0, 8)
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="it is a share, from 0 to 1"):
            Calibration(mix_general=wrong, general=general).check()
    with pytest.raises(ValueError, match="needs --general-data"):
        Calibration(mix_general=0.5).check()
    with pytest.raises(ValueError, match="needs --mix-general"):
        Calibration(general=general).check()


def test_general_text_changes_the_codes_and_is_recorded(model, task, tmp_path):
    from plans import make_plan

    plan = make_plan(model.files.path, lambda name: (4, False))
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word{i}" for i in range(600)))
    mixed = Calibration(examples=8, mix_general=0.5, general=GeneralText(file))
    quantize_model(model.files, plan, tmp_path / "mixed", mixed, task)
    quantize_model(model.files, plan, tmp_path / "plain", Calibration(examples=8), task)
    first = "model-00001-of-00004.safetensors"
    assert (tmp_path / "mixed" / first).read_bytes() != (tmp_path / "plain" / first).read_bytes()
    made_by = json.loads((tmp_path / "mixed" / "manifest.json").read_text())["made_by"]
    assert made_by["general"] == {"sha256": mixed.general.sha256, "examples": 4}
    assert made_by["task"]["examples"] == 4
