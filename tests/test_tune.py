"""Tables of tuned launches, the search for them, and the timing that both it and the benchmark use."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from taq_kernels import timing, tune, tuned
from taq_kernels.tuned import ConfigEntry, LatencyEntry, StepEntry, Table

GPU = "NVIDIA Test 1"
CPU = torch.device("cpu")
CONFIG = {"block_m": 16, "wide": True}
QKV = ConfigEntry(((4, 4096), (8, 1024), (16, 1024)), 4096, 128, 16, CONFIG, 5.5)
PURE = ConfigEntry(((8, 6144),), 4096, 128, 16, {"block_m": 16, "wide": False}, 6.5)
LATENCY = LatencyEntry(6144, 4096, 4, 128, 16, 0, 4.25)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The packaged tables' folder and the user's, both empty."""
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    monkeypatch.setattr(tuned, "PACKAGED", packaged)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned._tables.cache_clear()
    yield packaged, tmp_path / "cache" / "taq_kernels" / "tuned"
    tuned._tables.cache_clear()


def table(configs=(QKV, PURE), latencies=(LATENCY,), device=GPU, kernel=None):
    return Table(device, kernel or tuned.kernel_version("cuda"), {"torch": "2"}, tuple(configs), tuple(latencies))


# Tables.


def test_a_table_survives_its_file(tmp_path):
    saved = table((PURE, QKV))  # in the order of the file, which is sorted
    saved.save(tmp_path / "deep" / "t.json")
    loaded = Table.load(tmp_path / "deep" / "t.json")
    assert set(loaded.configs[0].rows) != set(loaded.configs[1].rows)
    assert {entry.key: entry for entry in loaded.configs} == {entry.key: entry for entry in saved.configs}
    assert loaded.latencies == saved.latencies
    assert replace(loaded, configs=()) == replace(saved, configs=())
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["t.json"]


def test_a_table_is_found_by_the_layers_rows_whatever_their_order(folders):
    table().save(folders[0] / "nvidia-test-1.json")
    for shapes in ([(4, 4096), (8, 1024), (16, 1024)], [(16, 1024), (8, 1024), (4, 2048), (4, 2048)]):
        assert tuned.configs_for(GPU, shapes, 4096, 128) == {16: CONFIG}
    assert tuned.configs_for(GPU, [(4, 4096), (8, 1024), (16, 1024)], 4096, 64) is None
    assert tuned.configs_for(GPU, [(4, 4096), (8, 1024), (16, 1024)], 8192, 128) is None
    assert tuned.configs_for("NVIDIA Other", [(4, 4096), (8, 1024), (16, 1024)], 4096, 128) is None
    assert tuned.table_for(GPU).latencies == (LATENCY,)


def test_an_unmeasured_mixture_gets_the_launch_of_its_widest_quantized_bits(folders):
    table().save(folders[0] / "nvidia-test-1.json")
    assert tuned.configs_for(GPU, [(4, 4096), (8, 2048)], 4096, 128) == {16: PURE.config}
    assert tuned.configs_for(GPU, [(8, 4096), (16, 2048)], 4096, 128) == {16: PURE.config}
    assert tuned.configs_for(GPU, [(4, 6144)], 4096, 128) is None


def test_the_users_table_wins_entry_by_entry(folders):
    packaged, user = folders
    table().save(packaged / "nvidia-test-1.json")
    mine = replace(PURE, config={"block_m": 32})
    table([mine], []).save(user / "nvidia-test-1.json")
    assert tuned.configs_for(GPU, [(8, 6144)], 4096, 128) == {16: {"block_m": 32}}
    assert tuned.configs_for(GPU, [(4, 4096), (8, 1024), (16, 1024)], 4096, 128) == {16: CONFIG}
    assert tuned.table_for(GPU).latencies == (LATENCY,)


def test_what_is_looked_up_cannot_change_the_table(folders):
    table().save(folders[0] / "nvidia-test-1.json")
    tuned.configs_for(GPU, [(8, 6144)], 4096, 128)[16]["block_m"] = 0
    assert tuned.configs_for(GPU, [(8, 6144)], 4096, 128) == {16: PURE.config}


def test_a_table_of_other_kernels_is_ignored_with_one_warning(folders, caplog):
    table(kernel="0123456789abcdef").save(folders[0] / "nvidia-test-1.json")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tuned.configs_for(GPU, [(8, 6144)], 4096, 128) is None
    assert [record.message for record in caplog.records if "another version" in record.message] == [
        f"{folders[0] / 'nvidia-test-1.json'} was measured with another version of the kernels: not used. "
        "Run `taq tune`."
    ]


def damaged(**changes):
    record = json.loads(table().to_json())
    for path, value in changes.items():
        *where, last = path.split("__")
        place = record
        for step in where:
            place = place[int(step) if step.isdecimal() else step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "not a table of version 1"),
        (damaged(version=2), "not a table of version 1"),
        (damaged(version=None), "not a table of version 1"),
        (damaged(kernel=None), "needs exactly the fields"),
        (damaged(colour="red"), "needs exactly the fields"),
        (damaged(device=7), "device is 7"),
        (damaged(configs={}), "configs is {}"),
        (damaged(configs__0__bucket=None), r"configs\[0\] needs exactly the fields"),
        (damaged(configs__0__extra=1), r"configs\[0\] needs exactly the fields"),
        (damaged(configs__0__bucket="16"), "bucket is '16'"),
        (damaged(configs__0__bucket=True), "bucket is True"),
        (damaged(configs__0__columns=0), "not positive"),
        (damaged(configs__0__us=-1.0), "not positive"),
        (damaged(configs__0__rows=[[8, 1], [4, 1]]), "ascending bits"),
        (damaged(configs__0__rows=[[4, 1], [4, 2]]), "ascending bits"),
        (damaged(configs__0__rows=[]), "ascending bits"),
        (damaged(configs__0__rows=[[4]]), "ascending bits"),
        (damaged(configs__0__config={"block_m": "16"}), "whole numbers"),
        (damaged(latencies__0__rows=[[4, 1]]), "needed is one number"),
        (damaged(latencies__0__tokens=1.5), "tokens is 1.5"),
        (damaged(device="NVIDIA Other"), "was measured on 'NVIDIA Other', this is 'NVIDIA Test 1'"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_file_and_remedy(folders, text, said):
    file = folders[0] / "nvidia-test-1.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        tuned.configs_for(GPU, [(8, 6144)], 4096, 128)
    assert str(file) in str(error.value)
    assert "taq tune" in str(error.value)


def test_comments_do_not_change_the_kernels_version():
    first = '"""Doc."""\n\nA = 1  # why\n\n\ndef f(x):\n    """Doc."""\n    return x + A\n'
    second = "A = 1\ndef f(x):\n\n    # other\n    return x + A"
    assert tuned._code_alone(second) == "A = 1\ndef f(x):\n    return x + A"  # whatever Python reads it
    assert tuned._code_alone(first) == tuned._code_alone(second)
    assert tuned._code_alone(first) != tuned._code_alone(second.replace("x + A", "x - A"))


def test_packaged_tables_are_of_these_kernels():
    for file in tuned.PACKAGED.glob("*.json"):
        packaged = Table.load(file)
        assert file.name == tuned.file_name(packaged.device)
        assert packaged.kernel == tuned.kernel_version(tuned.CPU if packaged.device == tuned.CPU else "cuda")


def test_the_fingerprint_changes_with_every_gpu_table_and_with_the_kernel(folders, monkeypatch):
    packaged, user = folders
    seen = [tuned.fingerprint()]  # the user's folder does not exist

    def has_changed():
        seen.append(tuned.fingerprint())
        return seen[-1] not in seen[:-1] and seen[-1] == tuned.fingerprint()

    table().save(packaged / "nvidia-test-1.json")
    assert has_changed()
    table().save(user / "nvidia-test-1.json")
    assert has_changed()
    table([PURE]).save(user / "nvidia-test-1.json")
    assert has_changed()
    table(device="NVIDIA Other").save(user / "nvidia-other.json")
    assert has_changed()
    monkeypatch.setattr(tuned, "kernel_version", lambda kind: f"another {kind}")
    assert has_changed()
    Table(tuned.CPU, "0", {}).save(user / "cpu.json")  # which launches nothing on a GPU
    assert not has_changed()
    assert seen[-1] == seen[-2]


def test_looking_up_needs_no_torch():
    code = """if True:
        import sys
        from taq_kernels import tuned
        tuned.configs_for("x", [(4, 128)], 128, 128)
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# A model's layers.


LLAMA = {
    "model.layers.0.self_attn.q_proj": (4096, 4096),
    "model.layers.0.self_attn.k_proj": (1024, 4096),
    "model.layers.0.self_attn.v_proj": (1024, 4096),
    "model.layers.0.self_attn.o_proj": (4096, 4096),
    "model.layers.0.mlp.gate_proj": (14336, 4096),
    "model.layers.0.mlp.up_proj": (14336, 4096),
    "model.layers.0.mlp.down_proj": (4096, 14336),
}
LLAMA |= {name.replace(".0.", ".1."): shape for name, shape in LLAMA.items()}


def shapes_of(layers):
    return {(layer.shapes, layer.columns, layer.group_size) for layer in layers}


def test_layers_are_fused_and_each_shape_is_tuned_once():
    assert shapes_of(tune.layers_of(LLAMA, {}, (32, 8))) == {
        (((bits, rows),), columns, 128)
        for bits in (4, 8)
        for rows, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    }


def test_a_plans_mixtures_are_tuned_as_well():
    bits = dict.fromkeys(LLAMA, 16) | {name: 4 for name in LLAMA if ".0." in name}
    bits |= {"model.layers.0.self_attn.k_proj": 8, "model.layers.0.self_attn.v_proj": 16}
    bits |= {"model.layers.1.mlp.up_proj": 8}
    mixed = shapes_of(tune.layers_of(LLAMA, bits, (32, 8))) - shapes_of(tune.layers_of(LLAMA, {}, (32, 8)))
    assert mixed == {
        (((4, 4096), (8, 1024), (16, 1024)), 4096, 128),
        (((8, 14336), (16, 14336)), 4096, 128),
    }


def test_layers_are_cut_as_vllm_cuts_them():
    """Key/value heads are copied where there are more ranks than heads; a group cut in two becomes two smaller ones."""
    cut = shapes_of(tune.layers_of(LLAMA, {}, (32, 8), tensor_parallel_size=16))
    assert {(rows, columns, group) for ((_, rows),), columns, group in cut} == {
        (256 + 128 + 128, 4096, 128),
        (4096, 256, 128),
        (2 * 896, 4096, 128),
        (4096, 896, 128),
    }
    qwen = {"model.layers.0.mlp.down_proj": (3584, 18944)}
    assert shapes_of(tune.layers_of(qwen, {}, (28, 4), 8)) == {(((b, 3584),), 2368, 64) for b in (4, 8)}
    fused = {"model.layers.0.self_attn.qkv_proj": (5120, 3072)}
    assert shapes_of(tune.layers_of(fused, {}, (24, 8), 12)) == {(((b, 256 + 256),), 3072, 128) for b in (4, 8)}


def test_matrices_that_stay_in_16_bits_are_timed_in_16_bits_and_not_tuned():
    layers = tune.layers_of({"model.layers.0.mlp.down_proj": (256, 200)}, {}, (4, 2))
    assert shapes_of(layers) == {(((16, 256),), 200, 128)}
    assert [(task.chooses, task.layer.shapes) for task in tune._tasks(layers, CPU, (1,))] == [(False, ((16, 256),))]


def test_the_head_is_tuned_like_a_layer_and_padded_where_it_is_cut():
    head = {"lm_head": (1000, 256)}
    assert shapes_of(tune.layers_of(head, {}, (4, 2))) == {(((bits, 1000),), 256, 128) for bits in (4, 8)}
    assert shapes_of(tune.layers_of(head, {}, (4, 2), 2)) == {(((bits, 512),), 256, 128) for bits in (4, 8)}


def test_steps_survive_their_file_and_tables_without_them_are_read(tmp_path):
    step = StepEntry("0123456789abcdef", 16, 0, 850.5, 4000.0)
    table().with_entries(steps=[replace(step, us=1.0)]).with_entries(steps=[step]).save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json").steps == (step,)
    record = json.loads(table().to_json())
    del record["steps"]
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert Table.load(tmp_path / "old.json") == table()
    record["steps"] = [{"model": "a", "tokens": 1, "threads": 0, "us": 2.0, "step_us": 1.0}]
    (tmp_path / "old.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="needed is 0 to step_us"):
        Table.load(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("name", "shape", "ranks", "said"),
    [
        ("q_proj", (100, 128), 3, "3 ranks do not divide 100"),
        ("down_proj", (128, 256), 3, "3 ranks do not divide 256"),
        ("down_proj", (128, 128), 8, "pieces of 16"),
    ],
)
def test_ranks_that_cannot_be_are_refused(name, shape, ranks, said):
    with pytest.raises(ValueError, match=said):
        tune.layers_of({f"model.layers.0.self_attn.{name}": shape}, {}, (4, 4), ranks)


# Tuning a CPU.


@pytest.fixture
def few_copies(monkeypatch):
    monkeypatch.setattr(timing, "CPU_BYTES", 100_000)


LAYER = tune.Layer(((4, 192),), 256, 128)


def test_a_cpu_table_holds_latencies_for_its_threads(few_copies, tmp_path):
    outcome = tune.tune([LAYER, replace(LAYER, shapes=((8, 192),))], CPU, (1, 3), tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json") == outcome.table
    assert outcome.table.configs == ()
    threads = torch.get_num_threads()
    assert {entry.key for entry in outcome.table.latencies} == {
        (192, 256, bits, 128, tokens, threads) for bits in (4, 8, 16) for tokens in (1, 3)
    }


def test_a_run_that_was_cut_short_continues_and_keeps_what_it_had(few_copies, tmp_path):
    path = tmp_path / "t.json"

    def stop_after_two(items, description, total):
        yield from list(items)[:2]

    first = tune.tune([LAYER], CPU, (1, 2), path, track=stop_after_two)
    assert (first.measured, first.kept, first.left) == (2, 0, 4)
    second = tune.tune([LAYER], CPU, (1, 2), path)
    assert (second.measured, second.kept, second.left) == (4, 2, 0)
    assert set(first.table.latencies) <= set(second.table.latencies)
    third = tune.tune([LAYER], CPU, (1, 2), path)
    assert (third.measured, third.kept) == (0, 6)
    assert third.table.latencies == second.table.latencies


def test_measurements_of_other_kernels_are_not_kept(few_copies, tmp_path):
    path = tmp_path / "t.json"
    old = LatencyEntry(192, 256, 4, 128, 1, torch.get_num_threads(), 1e9)
    Table(tuned.CPU, "0123456789abcdef", {}, (), (old,)).save(path)
    assert tune.tune([LAYER], CPU, (1,), path).measured == 3
    assert all(entry.us < 1e9 for entry in Table.load(path).latencies)


def test_another_devices_table_is_not_written_over(tmp_path):
    path = tmp_path / "t.json"
    table().save(path)
    before = path.read_text()
    with pytest.raises(ValueError, match="holds 'NVIDIA Test 1', this is 'cpu'"):
        tune.tune([LAYER], CPU, (1,), path)
    assert path.read_text() == before


def test_a_wrong_product_is_not_timed(few_copies):
    weights = tune._Weights(CPU).of(LAYER)
    x = weights.inputs(2)
    exact = x.float() @ weights._dense.t()
    weights.check(x, exact.bfloat16())
    for wrong in (exact * 0, exact * torch.nan, exact.roll(1, dims=1), x.float() @ weights._dense.roll(1, dims=1).t()):
        with pytest.raises(ArithmeticError, match="relative error"):
            weights.check(x, wrong)


def test_the_fastest_configuration_that_is_right_is_chosen(few_copies, monkeypatch):
    """What a GPU is asked, with a stand-in for its products: some cannot be launched, some are wrong, some are slow."""
    from taq_kernels import gemm

    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    found = gemm.candidates(LAYER.shapes, LAYER.columns, 90, 132, 32)
    unlaunchable, wrong, fastest = found[1], found[2], found[5]

    def products(self, x, configs):
        assert set(configs) == {32}
        if configs[32] == unlaunchable:
            raise RuntimeError("out of resource: shared memory")
        y = x.float() @ self._dense.t()
        return [lambda: y * 0 if configs[32] == wrong else y]

    def times(runners, device, runs=9):
        us = {place: 0.1 if found[place] in (unlaunchable, wrong) else 2.0 for place in runners} | {5: 1.0}
        return {place: timing.Times((us[place],) * runs) for place in runners}

    monkeypatch.setattr(tune._Weights, "products", products)
    monkeypatch.setattr(timing, "time_in_turns", times)
    entry = tune._choose(tune.Task(LAYER, 32, True), tune._Weights(CPU))
    assert gemm.Config(**entry.config) == fastest
    assert (entry.key, entry.us) == ((((4, 192),), 256, 128, 32), 1.0)
    assert tuned.Table(GPU, "0", {}, (entry,)).to_json()


def test_a_device_that_is_lost_ends_the_search(few_copies, monkeypatch):
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)

    def lost(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune._Weights, "products", lost)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tune._choose(tune.Task(LAYER, 16, True), tune._Weights(CPU))


def test_no_configuration_that_works_is_an_error(few_copies, monkeypatch):
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    monkeypatch.setattr(tune._Weights, "products", lambda *_: [lambda: torch.zeros(16, 192)])
    with pytest.raises(ValueError, match=r"no configuration works .* M = 16; the first: .* relative error 1"):
        tune._choose(tune.Task(LAYER, 16, True), tune._Weights(CPU))


# Timing.


def test_runs_walk_over_the_copies():
    seen = []
    runner = timing.make_runner([lambda i=i: seen.append(i) for i in range(3)], CPU)
    timing.time_in_turns({"a": runner}, CPU, runs=7)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_contenders_take_turns():
    seen = []
    runners = {name: timing.make_runner([lambda name=name: seen.append(name)], CPU) for name in "ab"}
    times = timing.time_in_turns(runners, CPU, runs=3)
    assert seen == ["a", "b"] * 3
    assert all(len(each.us) == 3 for each in times.values())


def test_three_rounds_are_made_however_little_time_there_is():
    runner = timing.make_runner([lambda: None], CPU)
    assert len(timing.time_in_turns({"a": runner}, CPU, runs=9, seconds=0)["a"].us) == 3


def test_times_are_summed_up_by_order():
    times = timing.Times(tuple(map(float, (9, 1, 8, 2, 7, 3, 6, 4, 5, 10, 11))))
    assert (times.minimum, times.median, times.p90) == (1, 6, 10)


def test_copies_exceed_the_caches_but_are_not_too_many():
    gpu = torch.device("cuda")
    assert timing.copies_needed(8_000_000, gpu) * 8_000_000 >= timing.GPU_BYTES
    assert timing.copies_needed(10**9, gpu) == timing.COPIES
    assert timing.copies_needed(10**9, CPU) == 2
    assert timing.copies_needed(1, CPU) == timing.MOST_COPIES


def test_graphs_last_long_enough_to_weigh_their_start_out():
    assert [timing.repeats_needed(us) for us in (timing.GRAPH_US * 2, timing.GRAPH_US, 1400, 100)] == [1, 1, 2, 15]


def test_a_copy_of_a_layer_shares_nothing_with_the_others(few_copies):
    from taq_kernels import ops

    def addresses(operands):
        tensors = [value for value in vars(operands).values() if isinstance(value, torch.Tensor)] + operands.tables
        return {tensor.data_ptr() for tensor in tensors}

    weights = tune._Weights(CPU).of(LAYER)
    first, second, *_ = weights._copies
    assert isinstance(first, ops.Operands)
    assert not addresses(first) & addresses(second)
    assert torch.equal(first.weights, second.weights)


def test_the_floor_reads_part_after_part_and_grows_for_large_ones():
    floor = timing.Floor(CPU, total_bytes=4096)
    calls = floor.calls(1000)
    assert len(calls) == 4
    parts = [call.__defaults__[0] for call in calls]
    assert torch.cat(parts).equal(floor._words)
    assert [call.__defaults__[0].nbytes for call in floor.calls(10_000)] == [79 * 128] * 2  # 10,112: whole lines


def test_random_codes_have_products_of_unit_variance():
    torch.manual_seed(0)
    for bits in (4, 8):
        codes, scales = timing.random_codes(bits, 64, 1024, 128, CPU)
        w = (codes.float() - 2 ** (bits - 1)).view(64, -1, 128) * scales.float()[..., None]
        y = torch.randn(256, 1024) @ w.view(64, 1024).t()
        assert 0.5 < y.var().item() < 2


READ = """
import torch
from taq_kernels import read
words = torch.randint(-100, 100, (70_001,), dtype=torch.int32)
for launch in read.LAUNCHES:
    assert read.read(words, *launch).sum() == words.sum(), launch
"""


def test_the_kernel_of_the_floor_reads_every_word_once():
    """In Triton's interpreter, which has to be chosen before the kernel is defined."""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", READ], env=env, check=True)


# On a GPU.


@pytest.mark.gpu
def test_a_gpu_is_tuned_and_its_table_is_used(folders, monkeypatch):
    from taq_kernels import gemm, ops

    device = torch.device("cuda")
    layer = tune.Layer(((4, 512), (8, 256)), 512, 128)
    outcome = tune.tune([layer], device, (1, 300))
    assert {entry.bucket for entry in outcome.table.configs} == set(gemm.BUCKETS)
    assert {(entry.bits, entry.tokens) for entry in outcome.table.latencies} == {
        (bits, tokens) for bits in (4, 8, 16) for tokens in (1, 300)
    }
    found = tuned.configs_for(torch.cuda.get_device_name(), layer.shapes, layer.columns, layer.group_size)
    assert all(gemm.Config(**config) for config in found.values())
    shards = [ops.pack(*timing.random_codes(b, n, 512, 128, device), None, b, 128) for b, n in layer.shapes]
    assert ops.join(shards).launches  # what was found can be launched


@pytest.mark.gpu
def test_the_gpus_floor_is_read_from_memory():
    """The fastest way to read is slower than the L2, and not slower than a tenth of any supported GPU's memory."""
    device = torch.device("cuda")
    runner = timing.make_runner(timing.Floor(device).calls(30_000_000), device)
    us = timing.time_in_turns({"": runner}, device)[""].median
    assert 30e6 / 20e12 < us / 1e6 < 30e6 / 50e9
