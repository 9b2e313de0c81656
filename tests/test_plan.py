import json

import pytest

from taq_vllm.plan import Allocation, Budget, MatrixPlan, ModelRef, Plan, resident_bytes, weight_bytes

MODEL = ModelRef(id="model", fingerprint="f" * 64)


def make_plan(**matrices: MatrixPlan) -> Plan:
    matrices = matrices or {"a": entry()}
    return Plan(
        base_model=MODEL,
        allocation=Allocation(name="uniform"),
        budget=Budget.of("5bits", matrices, other_bytes=1000),
        matrices=matrices,
    )


def entry(**changes) -> MatrixPlan:
    return MatrixPlan(**({"bits": 4, "symmetric": False, "shape": (256, 128), "why": "score"} | changes))


def test_sizes_count_codes_scales_zero_points_and_the_stored_shape():
    # 256 x 256: 65,536 weights; 2 groups per row; scales 256*2*2 B; 4-bit zero points 256*2/2 B; shape 16 B
    assert weight_bytes(4, (256, 256), symmetric=False) == 32768 + 1024 + 256 + 16
    assert weight_bytes(4, (256, 256), symmetric=True) == 32768 + 1024 + 16
    assert weight_bytes(8, (256, 256), symmetric=False) == 65536 + 1024 + 512 + 16
    assert weight_bytes(16, (256, 256), symmetric=True) == 131072


def test_resident_size_is_codes_with_two_bytes_a_scale_and_one_a_zero_point():
    assert resident_bytes(4, (256, 256), symmetric=True) == 32768 + 256 * 2 * 2
    assert resident_bytes(8, (256, 256), symmetric=False) == 65536 + 256 * 2 * 3
    assert resident_bytes(16, (256, 256), symmetric=True) == 131072


def test_asymmetric_four_bits_cost_4_156_bits_per_weight_apart_from_the_shape():
    stored = weight_bytes(4, (4096, 4096), symmetric=False) - 16
    assert 8 * stored / 4096**2 == 4 + 16 / 128 + 4 / 128


def test_plan_survives_a_round_trip_through_its_file(tmp_path):
    plan = make_plan(**{"model.layers.0.self_attn.q_proj": entry(score=0.5, rank=0), "b": entry(bits=16)})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_edited_by_hand_tells_its_own_size(tmp_path):
    plan = make_plan(a=entry(), b=entry())
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"bits": 4', '"bits": 16', 1))
    edited = Plan.load(tmp_path / "plan.json")
    assert edited.budget == Budget.of("5bits", {"a": entry(bits=16), "b": entry()}, other_bytes=1000)
    assert edited.budget.disk_bytes > plan.budget.disk_bytes


def test_each_matrix_stands_on_a_line_of_its_own():
    text = make_plan(a=entry(), b=entry(bits=8)).to_json()
    assert sum('"shape"' in line for line in text.splitlines()) == 2
    json.loads(text)


def test_hash_changes_with_a_single_bitwidth_and_not_with_spacing():
    plan = make_plan()
    assert plan.sha256() == Plan.from_json(json.dumps(plan.model_dump(mode="json"), indent=7), "x").sha256()
    assert plan.sha256() != make_plan(a=entry(bits=8)).sha256()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 5}, "got 5 bits, allowed are 4, 8, 16"),
        ({"shape": [256, 100]}, "100, which 128 does not divide"),
        ({"colour": "red"}, "colour"),
        ({"why": "whim"}, "why"),
    ],
)
def test_a_wrong_entry_is_named_with_file_field_and_what_is_allowed(tmp_path, change, said):
    record = make_plan().model_dump(mode="json")
    record["matrices"]["a"] |= change
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=said) as error:
        Plan.load(file)
    assert str(file) in str(error.value)
    assert "matrices.a" in str(error.value)


def test_a_file_that_is_not_json_or_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="taq plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"version": 1, "base_')
    with pytest.raises(ValueError, match=r"half\.json is not a valid plan"):
        Plan.load(tmp_path / "half.json")


def test_an_unknown_version_is_refused():
    record = make_plan().model_dump(mode="json") | {"version": 2}
    with pytest.raises(ValueError, match="version"):
        Plan.from_json(json.dumps(record), "x")


def test_fit_names_what_is_unknown_missing_reshaped_or_of_another_model():
    plan = make_plan(a=entry())
    plan.check_fits(MODEL, {"a": (256, 128)})
    with pytest.raises(ValueError, match="names a, which model does not have"):
        plan.check_fits(MODEL, {"b": (256, 128)})
    with pytest.raises(ValueError, match="does not name b"):
        plan.check_fits(MODEL, {"a": (256, 128), "b": (256, 128)})
    with pytest.raises(ValueError, match=r"a is \(512, 128\) in the model and \(256, 128\) in the plan"):
        plan.check_fits(MODEL, {"a": (512, 128)})
    with pytest.raises(ValueError, match="fingerprint"):
        plan.check_fits(ModelRef(id="other", fingerprint="0" * 64), {"a": (256, 128)})


def test_a_plan_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        make_plan().version = 1
