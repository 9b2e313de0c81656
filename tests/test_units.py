import pytest

from taq_vllm.units import HEAD, layer_of, unit_of, units_of

BLOCK = [f"model.layers.3.{part}_proj" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")]
BLOCK += [f"model.layers.3.mlp.{part}_proj" for part in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("granularity", "names"),
    [
        ("layer", ["model.layers.3"]),
        ("fused", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        ("module", [name.removeprefix("model.layers.3.") for name in BLOCK]),
    ],
)
def test_units_of_a_block_in_the_models_order_with_the_head_for_itself(granularity, names):
    units = units_of([*BLOCK, HEAD], granularity)
    assert [unit.removeprefix("model.layers.3.") for unit in units] == [*names, HEAD]
    assert [name for parts in units.values() for name in parts] == [*BLOCK, HEAD]


def test_a_matrix_that_is_fused_in_the_checkpoint_is_its_own_unit():
    assert unit_of("model.layers.0.self_attn.qkv_proj", "fused") == "model.layers.0.self_attn.qkv_proj"


def test_the_layer_of_a_matrix_is_a_number_and_the_head_has_none():
    assert layer_of("model.layers.12.mlp.up_proj") == layer_of("model.layers.12") == 12
    with pytest.raises(AssertionError, match="not inside"):
        layer_of(HEAD)


def test_the_experts_of_a_block_are_one_unit_below_the_layer():
    experts = [f"model.layers.3.mlp.experts.{index}.{part}_proj" for index in (0, 10) for part in ("gate", "down")]
    for granularity in ("fused", "module"):
        assert units_of(experts, granularity) == {"model.layers.3.mlp.experts": tuple(experts)}
    assert list(units_of([*BLOCK, *experts], "layer")) == ["model.layers.3"]
