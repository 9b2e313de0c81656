import json

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
