import json
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compressed import compress_checkpoint, config_dict, scheme_of
from compressed_tensors.utils.match import match_targets
from huggingface_hub import constants
from plans import make_plan, mixed
from taq_kernels import tuned
from tiny_models import make_tiny
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.models.utils import WeightsMapper

import taq_vllm
from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE
from taq_vllm.plugin import config as plugin_config
from taq_vllm.plugin.config import TaqConfig
from taq_vllm.plugin.deferred import DeferredTaqConfig
from taq_vllm.plugin.linear import CheckedUnquantizedMethod, TaqLinearMethod

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("qwen3", tmp_path_factory.mktemp("models") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def plan(model):
    return make_plan(model, mixed)


@pytest.fixture(scope="module")
def checkpoint(model, plan, tmp_path_factory):
    """What `taq quantize` writes."""
    out = tmp_path_factory.mktemp("checkpoints") / "ours"
    quantize_model(ModelFiles(model), plan, out, Calibration(method="rtn"))
    return out


@pytest.fixture(scope="module")
def foreign(model, tmp_path_factory):
    """What another tool writes: no plan, no `taq` key."""
    bits_of = {name: mixed(name) for name in ModelFiles(model).matrices if mixed(name)[0] < 16}
    return compress_checkpoint(model, tmp_path_factory.mktemp("checkpoints") / "foreign", bits_of)


@pytest.fixture(autouse=True)
def no_plan_in_environment(monkeypatch):
    monkeypatch.delenv("TAQ_PLAN", raising=False)


@pytest.fixture
def copy(tmp_path):
    def copy_of(folder):
        return shutil.copytree(folder, tmp_path / folder.name)

    return copy_of


def resolve(folder, **kwargs):
    """What vLLM makes of its command line."""
    taq_vllm.register()
    args = EngineArgs(str(folder), max_model_len=64, enforce_eager=True, **kwargs)
    return args.create_engine_config()


# Registration.


def test_registering_is_repeatable_and_gives_our_class():
    taq_vllm.register()
    taq_vllm.register()
    assert QUANTIZATION_METHODS.count("taq") == 1
    assert type(get_quantization_config("taq")()) is TaqConfig


REGISTER = """
import sys, time
import vllm.engine.arg_utils
import taq_vllm
before, started = set(sys.modules), time.process_time()
taq_vllm.register()
seconds = time.process_time() - started
print(seconds, *(name for name in set(sys.modules) - before if name.startswith("vllm.model_executor.layers")))
"""


def test_importing_the_package_imports_neither_torch_nor_vllm():
    code = "import sys, taq_vllm; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_registering_is_cheap_and_imports_no_layers():
    done = subprocess.run([sys.executable, "-c", REGISTER], capture_output=True, text=True, check=True)
    seconds, *layers = done.stdout.splitlines()[-1].split()
    assert layers == []
    assert float(seconds) < 0.05  # of processor time, whatever else runs on the machine


def test_entry_point_leads_to_register():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="taq")
    assert entry.load() is taq_vllm.register


def test_config_survives_the_way_to_a_worker(model, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    config = TaqConfig.from_config_file(tmp_path / "plan.json")
    config.maybe_update_config(str(model), SimpleNamespace())
    assert pickle.loads(pickle.dumps(config)).plan == plan


# Which way in: command line and folder to configuration.


@pytest.mark.parametrize("quantization", [None, "taq", "TAQ"])
def test_our_checkpoint_is_recognised_with_and_without_the_flag(checkpoint, plan, quantization):
    config = resolve(checkpoint, quantization=quantization).quant_config
    assert type(config) is TaqConfig
    assert config.plan == plan
    assert not config.rounds_while_loading


def test_our_checkpoint_is_left_to_vllm_if_the_user_says_so(checkpoint):
    assert type(resolve(checkpoint, quantization="compressed-tensors").quant_config) is CompressedTensorsConfig


def test_foreign_checkpoint_is_ours_only_with_the_flag(foreign):
    assert type(resolve(foreign).quant_config) is CompressedTensorsConfig
    config = resolve(foreign, quantization="taq").quant_config
    assert type(config) is TaqConfig
    assert config.plan is None


def test_other_methods_are_not_claimed():
    for method in ("awq", "gptq", "fp8", ""):
        assert DeferredTaqConfig.override_quantization_method({"quant_method": method, "taq": {}}, "taq") is None


def test_16_bit_model_without_flag_is_served_as_it_is(model):
    assert resolve(model).quant_config is None


def test_plan_for_a_16_bit_model_is_found_beside_the_weights(model, plan, copy):
    folder = copy(model)
    plan.save(folder / PLAN_FILE)
    config = resolve(folder, quantization="taq").quant_config
    assert config.rounds_while_loading
    assert config.plan == plan


def test_plan_for_a_16_bit_model_is_found_where_overrides_or_environment_say(model, plan, tmp_path, monkeypatch):
    path = tmp_path / "elsewhere.json"
    plan.save(path)
    overrides = {"quantization_config_file": str(path)}
    assert resolve(model, quantization="taq", hf_overrides=overrides).quant_config.plan == plan
    monkeypatch.setenv("TAQ_PLAN", str(path))
    assert resolve(model, quantization="taq").quant_config.plan == plan


def test_named_plan_goes_before_the_one_beside_the_weights(model, plan, copy, tmp_path):
    folder = copy(model)
    plan.save(folder / PLAN_FILE)
    other = make_plan(model, lambda name: (8, True))
    other.save(tmp_path / "other.json")
    overrides = {"quantization_config_file": str(tmp_path / "other.json")}
    assert resolve(folder, quantization="taq", hf_overrides=overrides).quant_config.plan == other


def test_missing_plan_is_an_error_that_names_every_option(model):
    with pytest.raises(ValueError, match="no plan for it") as error:
        resolve(model, quantization="taq")
    for option in (PLAN_FILE, "quantization_config_file", "TAQ_PLAN=", "taq quantize", "taq plan"):
        assert option in str(error.value)


def test_named_plan_that_does_not_exist_is_an_error(model, monkeypatch):
    monkeypatch.setenv("TAQ_PLAN", "/nowhere/plan.json")
    with pytest.raises(ValueError, match=r"no plan at /nowhere/plan\.json"):
        resolve(model, quantization="taq")


def test_quantized_checkpoint_refuses_another_plan(checkpoint, plan, tmp_path, monkeypatch):
    plan.save(tmp_path / "plan.json")
    monkeypatch.setenv("TAQ_PLAN", str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match="already quantized and cannot follow another plan; unset TAQ_PLAN"):
        resolve(checkpoint)


def test_two_plans_have_two_compile_cache_keys(model, plan, tmp_path, monkeypatch):
    hashes = set()
    for index, one in enumerate((plan, make_plan(model, lambda name: (8, True)), plan)):
        # The same path: only the content tells them apart.
        path = tmp_path / "plan.json"
        one.save(path)
        monkeypatch.setenv("TAQ_PLAN", str(path))
        hashes.add(resolve(model, quantization="taq").compute_hash())
        assert len(hashes) == min(index + 1, 2)


def test_a_newly_tuned_table_is_a_new_compile_cache_key(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = resolve(checkpoint).compute_hash()
    assert resolve(checkpoint).compute_hash() == before
    table = tuned.user_file("NVIDIA H200")
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    assert resolve(checkpoint).compute_hash() != before


# Plans that do not belong.


def test_plan_for_another_model_is_refused_before_anything_is_loaded(model, tmp_path, monkeypatch):
    other = make_tiny("qwen3", tmp_path / "other", num_hidden_layers=2, seed=1)
    make_plan(other, mixed).save(tmp_path / "plan.json")
    monkeypatch.setenv("TAQ_PLAN", str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match=r"but .*model has fingerprint"):
        resolve(model, quantization="taq")


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Put a model's files where a download from the hub leaves them; yields its id."""

    def put(folder, pattern="*"):
        cache = tmp_path / "hub"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        repository = cache / "models--someone--model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c0ffee")
        snapshot = repository / "snapshots" / "c0ffee"
        snapshot.mkdir(parents=True)
        for file in folder.glob(pattern):
            (snapshot / file.name).symlink_to(file)
        return "someone/model"

    return put


@pytest.fixture
def warnings(monkeypatch):
    """What the plugin warns of."""
    lines = []
    monkeypatch.setattr(plugin_config.logger, "warning", lambda message, *values: lines.append(message % values))
    return lines


def test_plan_for_another_fine_tune_of_a_hub_model_is_refused(model, plan, downloaded, warnings, tmp_path, monkeypatch):
    name = downloaded(model)
    monkeypatch.setenv("TAQ_PLAN", str(tmp_path / "plan.json"))
    plan.save(tmp_path / "plan.json")
    TaqConfig().maybe_update_config(name)
    other = make_tiny("qwen3", tmp_path / "other", num_hidden_layers=2, seed=1)
    make_plan(other, mixed).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="but someone/model has fingerprint"):
        TaqConfig().maybe_update_config(name)
    assert not warnings


@pytest.mark.parametrize("there", ["config.json", "nothing"])
def test_hub_model_that_is_not_downloaded_yet_is_served_with_a_warning(
    model, plan, downloaded, warnings, tmp_path, monkeypatch, there
):
    plan.save(tmp_path / "plan.json")
    monkeypatch.setenv("TAQ_PLAN", str(tmp_path / "plan.json"))
    config = TaqConfig()
    config.maybe_update_config(downloaded(model, there))
    assert config.plan == plan
    (line,) = warnings
    assert "someone/model" in line
    assert "not compared with the fingerprint in" in line


def test_plan_that_was_exchanged_in_a_checkpoint_is_refused(checkpoint, model, copy):
    folder = copy(checkpoint)
    make_plan(model, lambda name: (8, True)).save(folder / PLAN_FILE)
    with pytest.raises(ValueError, match="is not the plan that the checkpoint was made with"):
        resolve(folder)


def test_checkpoint_without_its_plan_is_refused(checkpoint, copy):
    folder = copy(checkpoint)
    (folder / PLAN_FILE).unlink()
    with pytest.raises(ValueError, match=rf"its {PLAN_FILE} is missing"):
        resolve(folder)


def test_plan_may_name_the_head_with_its_shape(model, copy):
    folder = copy(model)
    plan = make_plan(folder, mixed, head=True)
    plan.save(folder / PLAN_FILE)
    assert resolve(folder, quantization="taq").quant_config.plan == plan
    entry = plan.matrices["lm_head"].model_copy(update={"shape": (128, 256)})
    plan.model_copy(update={"matrices": {**plan.matrices, "lm_head": entry}}).save(folder / PLAN_FILE)
    with pytest.raises(ValueError, match=r"lm_head is \(3072, 256\) in the model and \(128, 256\) in the plan"):
        resolve(folder, quantization="taq")


def test_tied_head_below_16_bits_is_refused_before_anything_is_loaded(tmp_path):
    folder = make_tiny("qwen2", tmp_path / "tied", num_hidden_layers=2)
    make_plan(folder, lambda name: (8, True), head=True).save(folder / PLAN_FILE)
    with pytest.raises(ValueError, match=r"plan gives lm_head 8 bits, but .* doubles as its head.*`taq quantize`"):
        resolve(folder, quantization="taq")
    make_plan(folder, lambda name: (16 if name == "lm_head" else 8, True), head=True).save(folder / PLAN_FILE)
    assert resolve(folder, quantization="taq").quant_config.plan.matrices["lm_head"].bits == 16


def test_malformed_plan_is_an_error_that_names_the_field(model, plan, copy):
    folder = copy(model)
    record = json.loads(plan.to_json())
    record["matrices"]["model.layers.0.self_attn.q_proj"]["bits"] = 3
    (folder / PLAN_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: got 3 bits, allowed are 4, 8, 16"):
        resolve(folder, quantization="taq")


def test_plan_of_a_study_is_refused(model, plan, copy):
    folder = copy(model)
    record = json.loads(plan.to_json()) | {"menu": [3, 4, 8, 16]}
    record["matrices"]["model.layers.0.self_attn.q_proj"]["bits"] = 3
    (folder / PLAN_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"q_proj has 3 bits, which can be studied but not written or served"):
        resolve(folder, quantization="taq")


def test_cut_safetensors_file_is_named_before_anything_is_loaded(checkpoint, copy):
    folder = copy(checkpoint)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ValueError, match=rf"{file.name} has \d+ bytes, its header says"):
        resolve(folder)


# Which method a layer gets.


def config_of(bits_of, ignore=(), **changes):
    config = TaqConfig.from_config({**config_dict(bits_of, ignore), **changes})
    config.packed_modules_mapping = dict(FUSED)
    return config


def qkv(config, prefix="model.layers.0.self_attn.qkv_proj"):
    return QKVParallelLinear(256, 64, 4, 2, bias=False, quant_config=config, prefix=prefix)


def column(config, prefix="model.layers.0.fc"):
    return ColumnParallelLinear(256, 64, bias=False, quant_config=config, prefix=prefix)


def specs(layer):
    assert type(layer.quant_method) is TaqLinearMethod
    return [(spec.bits, spec.symmetric) for spec in layer.quant_method.specs]


@pytest.mark.usefixtures("vllm_world")
class TestMethods:
    Q, K, V = (f"model.layers.0.self_attn.{name}" for name in FUSED["qkv_proj"])

    def test_shards_get_what_their_own_target_says(self):
        config = config_of({self.Q: (4, False), self.K: (8, True)}, ignore=[self.V])
        assert specs(qkv(config)) == [(4, False), (8, True), (16, True)]

    def test_regular_expressions_and_class_names_are_targets(self):
        config = config_of({r"re:.*\.q_proj$": (8, False), "Linear": (4, True)}, ignore=[r"re:.*\.v_proj"])
        assert specs(qkv(config)) == [(8, False), (4, True), (16, True)]
        assert specs(column(config)) == [(4, True)]

    def test_fused_name_is_a_target_and_can_be_ignored(self):
        config = config_of({"model.layers.0.self_attn.qkv_proj": (8, True)})
        assert specs(qkv(config)) == [(8, True)] * 3
        config = config_of({"Linear": (4, True)}, ignore=["model.layers.0.self_attn.qkv_proj"])
        assert type(qkv(config).quant_method) is UnquantizedLinearMethod

    @pytest.mark.parametrize(
        "bits_of",
        [
            {r"re:.*q_proj$": 4, r"re:.*k_proj$": 4, r"re:.*v_proj$": 8},
            {r"re:.*self_attn.*": 4, V: 8},
            {"Linear": 4, r"re:.*v_proj$": 8},
            {"Linear": 4, r"re:.*k_proj$": 8, K: 4},
            {r"re:.*v_proj$": 8, r"re:.*self_attn.*": 4},
        ],
    )
    def test_targets_are_ranked_as_in_compressed_tensors(self, bits_of):
        layer = qkv(config_of({target: (bits, True) for target, bits in bits_of.items()}))
        linear = torch.nn.Linear(1, 1)
        expected = [bits_of[match_targets(name, linear, bits_of)[0]] for name in (self.Q, self.K, self.V)]
        assert specs(layer) == [(bits, True) for bits in expected]

    def test_expression_for_a_part_does_not_reach_the_whole_fused_layer(self):
        """`up_proj` ends `gate_up_proj`, and `v_proj` ends `qkv_proj`."""
        config = config_of({r"re:.*gate_proj": (4, True), r"re:.*up_proj": (8, True)})
        prefix = "model.layers.0.mlp.gate_up_proj"
        layer = MergedColumnParallelLinear(256, [128, 128], bias=False, quant_config=config, prefix=prefix)
        assert specs(layer) == [(4, True), (8, True)]
        config = config_of({"Linear": (4, True)}, ignore=["re:.*v_proj"])
        assert specs(qkv(config)) == [(4, True), (4, True), (16, True)]
        assert specs(qkv(config_of({"re:.*v_proj": (8, True)}))) == [(16, True), (16, True), (8, True)]

    def test_a_parts_own_target_goes_before_that_of_the_fused_layer(self):
        fused = "model.layers.0.self_attn.qkv_proj"
        config = config_of({fused: (4, True), r"re:.*\.k_proj": (8, True), "Linear": (8, False)})
        assert specs(qkv(config)) == [(4, True), (8, True), (4, True)]

    def test_uniform_checkpoint_is_ours_too(self):
        assert specs(qkv(config_of({"Linear": (4, True)}))) == [(4, True)] * 3

    def test_ignored_layer_goes_to_the_parent(self):
        config = config_of({"Linear": (4, True)}, ignore=["model.layers.0.fc"])
        assert type(column(config).quant_method) is UnquantizedLinearMethod

    @pytest.mark.parametrize(
        "weights",
        [{"group_size": 64}, {"strategy": "channel", "group_size": None}],
        ids=["groups of 64", "channels"],
    )
    def test_other_weight_only_schemes_go_to_the_parent(self, weights):
        record = config_dict({"Linear": (4, True)})
        record["config_groups"]["group_0"]["weights"].update(weights)
        config = TaqConfig.from_config(record)
        assert type(column(config).quant_method) is CompressedTensorsLinearMethod

    def test_fused_layer_of_ours_and_the_parents_schemes_is_refused_by_the_parent(self):
        record = config_dict({self.Q: (4, True), self.K: (4, True)}, ignore=[self.V])
        # Two groups, one of them of another size, beside a 16-bit matrix.
        other = scheme_of(4, True, [self.K]).model_dump()
        other["weights"]["group_size"] = 64
        record["config_groups"]["group_0"]["targets"] = [self.Q]
        record["config_groups"]["group_1"] = other
        config = TaqConfig.from_config(record)
        config.packed_modules_mapping = dict(FUSED)
        with pytest.raises(ValueError, match="Found different quantization schemes for the shards"):
            qkv(config)

    def test_targets_are_renamed_as_vllm_renames_modules(self, model, plan, tmp_path):
        mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
        config = config_of({self.Q: (4, False), self.K: (8, True)}, ignore=[self.V])
        config.apply_vllm_mapper(mapper)
        assert specs(qkv(config, "language_model.model.layers.0.self_attn.qkv_proj"))[0] == (4, False)

        plan.save(tmp_path / "plan.json")
        config = TaqConfig.from_config_file(tmp_path / "plan.json")
        config.maybe_update_config(str(model))
        config.packed_modules_mapping = dict(FUSED)
        config.apply_vllm_mapper(mapper)
        layer = qkv(config, "language_model.model.layers.0.self_attn.qkv_proj")
        assert [spec.name for spec in layer.quant_method.specs] == [self.Q, self.K, self.V]


@pytest.fixture
def planned(model, plan, monkeypatch):
    """A configuration for the 16-bit model with some entries of its plan changed or left out."""

    def build(changes=None):
        matrices = dict(plan.matrices)
        for name, entry in (changes or {}).items():
            matrices.pop(name, None)
            if entry is not None:
                matrices[name] = entry
        config = TaqConfig()
        changed = plan.model_copy(update={"matrices": matrices})
        monkeypatch.setattr(config, "_plan_for_16_bits", lambda *_: changed)
        config.maybe_update_config(str(model))
        config.packed_modules_mapping = dict(FUSED)
        return config

    return build


@pytest.mark.usefixtures("vllm_world")
class TestPlans:
    K = "model.layers.0.self_attn.k_proj"

    def test_layer_follows_the_plan(self, planned):
        layer = qkv(planned())
        assert specs(layer) == [(4, False), (8, True), (16, True)]
        assert not any(spec.stored for spec in layer.quant_method.specs)

    def test_planned_layer_of_16_bits_is_vllms_own_with_checks(self, planned):
        config = planned()
        layer = ColumnParallelLinear(384, 256, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj")
        assert type(layer.quant_method) is CheckedUnquantizedMethod
        with pytest.raises(ValueError, match=r"down_proj\.weight: got .* \[256, 385\], 16 bits .* \[256, 384\]"):
            layer.weight.weight_loader(layer.weight, torch.zeros(256, 385, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="down_proj: got a tensor 'weight_packed', but 16 bits"):
            layer.weight_packed.weight_loader(layer.weight_packed, torch.zeros(256, 48, dtype=torch.int32))

    def test_planned_16_bit_matrix_that_does_not_arrive_is_an_error(self, planned, monkeypatch):
        config = planned()
        monkeypatch.setattr(config, "check_all_claimed", lambda: None)
        layer = ColumnParallelLinear(384, 256, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj")
        with pytest.raises(ValueError, match="down_proj: the checkpoint has no weight"):
            layer.quant_method.process_weights_after_loading(layer)

    def test_forgotten_matrix_is_an_error_that_names_a_relative(self, planned):
        with pytest.raises(ValueError, match=rf"does not name {self.K}, but it names model.layers.1.self_attn.k_proj"):
            qkv(planned({self.K: None}))

    def test_layer_outside_the_plan_stays_as_it_is(self, planned):
        method = column(planned(), "visual.merger").quant_method
        assert isinstance(method, UnquantizedLinearMethod)
        assert not method.is_planned

    def test_matrix_that_no_layer_claims_is_an_error(self, planned, plan):
        extra = plan.matrices[self.K]
        config = planned({"model.layers.0.mlp.extra": extra})
        qkv(config)
        with pytest.raises(ValueError, match=r"that no layer of this model has claimed: .*another model"):
            config.check_all_claimed()

    def test_other_shape_than_planned_is_an_error(self, planned, plan):
        entry = plan.matrices[self.K].model_copy(update={"shape": (256, 256)})
        with pytest.raises(ValueError, match=r"k_proj is \[128, 256\] in this model and \[256, 256\] in the plan"):
            qkv(planned({self.K: entry}))

    def test_planned_layer_of_an_unknown_kind_is_an_error(self, planned, plan):
        class Peculiar(MergedColumnParallelLinear):
            pass

        config = planned()
        with pytest.raises(ValueError, match="gate_proj, a Peculiar that this plugin does not know how to split"):
            Peculiar(256, [384, 384], bias=False, quant_config=config, prefix="model.layers.0.mlp.gate_up_proj")

    def test_config_groups_that_differ_from_the_plan_are_an_error(self, plan, tmp_path):
        plan.save(tmp_path / PLAN_FILE)
        bits_of = {name: mixed(name) for name in plan.matrices if mixed(name)[0] < 16}
        bits_of[self.K] = (4, True)
        config = config_of(bits_of)
        config.maybe_update_config(str(tmp_path))
        with pytest.raises(ValueError, match=r"k_proj: config\.json says 4 bits symmetric, taq_plan\.json says 8 bits"):
            qkv(config)
