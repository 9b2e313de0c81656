import re
from dataclasses import replace

import pytest
from taq_kernels import tuned
from taq_kernels.tuned import LatencyEntry, StepEntry, Table
from tiny_models import make_tiny

from taq_vllm.allocate import Request, allocate
from taq_vllm.budget import Latencies, Meter, Shapes, load_latencies, model_shape, parse_budget, step_rest_us
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import SYMMETRIC, Plan
from taq_vllm.scoring import baseline
from taq_vllm.units import HEAD

GPU = "NVIDIA Test 1"
STEP_US = 500.0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ModelFiles(make_tiny("qwen3", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return ModelFiles(make_tiny("qwen2", tmp_path_factory.mktemp("tied")))


def table_of(files, batches=(1, 16), device=GPU, threads=0):
    """A microsecond for 16 kB of codes, and one for the launch; layers as `taq tune` measures them."""
    shapes = {(512, 256), (256, 256), (768, 256), (256, 384), *files.head.values()}
    latencies = [
        LatencyEntry(rows, columns, bits, 128, batch, threads, 1 + rows * columns * bits / 8 / 16_000)
        for rows, columns in shapes
        for bits in (4, 8, 16)
        for batch in batches
    ]
    steps = [StepEntry(model_shape(files.matrices, files.head), batch, threads, STEP_US, 2000.0) for batch in batches]
    kernel = tuned.kernel_version("cpu" if device == "cpu" else "cuda")
    return Table(device, kernel, {}, (), tuple(latencies), tuple(steps))


def measured(files, **changes):
    return Latencies.of_table(table_of(files, **changes), "the test's table")


def test_a_budget_is_read_exactly():
    assert [(float(b.amount), b.unit, b.batch) for b in parse_budget("5.1bits, 4.2GiB ,9ms @ batch=16")] == [
        (5.1, "bits", None),
        (4.2, "GiB", None),
        (9.0, "ms", 16),
    ]
    assert parse_budget("0.1bits")[0].amount * 10 == 1


@pytest.mark.parametrize("budget", ["", "5", "9ms", "9ms@batch=0", "9ms@16", "5bits,", "5 bits 4GiB", "-1MB"])
def test_a_budget_that_cannot_be_read_shows_how_one_is_written(budget):
    with pytest.raises(ValueError, match=r"5\.0bits.*4\.2GiB.*9ms@batch=16"):
        parse_budget(budget)


@pytest.mark.parametrize("allocation", ["monotone", "knapsack", "uniform"])
@pytest.mark.parametrize("head", [False, True])
def test_a_latency_is_the_sum_of_launches_and_of_all_that_is_not_planned(files, allocation, head):
    latencies = measured(files)
    request = Request("0.7ms@batch=16", allocation, head=head, latencies=latencies)
    plan = allocate(files, baseline(files, "random", head=head), request)
    assert plan.budget.latency_us[16] <= 700
    launches = 0.0
    for layer in range(files.layers):
        bits = plan.matrices[f"model.layers.{layer}.mlp.down_proj"].bits
        launches += sum(
            latencies.us[rows, columns, bits, 16] for rows, columns in ((512, 256), (256, 256), (768, 256), (256, 384))
        )
    head_bits = plan.matrices[HEAD].bits if head else 16
    expected = launches + latencies.us[3072, 256, head_bits, 16] + STEP_US
    assert plan.budget.latency_us[16] == pytest.approx(expected, abs=1e-3)  # rounded up to picoseconds per matrix


def test_layers_that_are_one_launch_count_once_and_mixed_ones_by_rows(files):
    latencies = measured(files)
    meter = Meter(Shapes.of_files(files, head=False), parse_budget("9ms@batch=1"), SYMMETRIC, latencies)
    [limit] = meter.limits
    qkv = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    whole = {bits: latencies.us[512, 256, bits, 1] for bits in (4, 8)}
    assert sum(meter.use(name, 4, limit) for name in qkv) / 1e6 == pytest.approx(whole[4])
    mixed = meter.use(qkv[0], 8, limit) + meter.use(qkv[1], 4, limit) + meter.use(qkv[2], 4, limit)
    assert mixed / 1e6 == pytest.approx((whole[8] + whole[4]) / 2)  # q is half of the rows


def test_several_limits_hold_together(files):
    request = Request("6bits,0.7ms@batch=16", "knapsack", granularity="module", latencies=measured(files))
    plan = allocate(files, baseline(files, "random", granularity="module"), request)
    assert plan.budget.average_bits <= 6
    assert plan.budget.latency_us[16] <= 700
    alone = allocate(files, baseline(files, "random", granularity="module"), replace(request, budget="6bits"))
    assert alone.budget.latency_us is None


def test_each_of_two_limits_in_ms_is_recorded_and_kept_in_the_file(files, tmp_path):
    request = Request("0.69ms@batch=1,0.7ms@batch=16", "knapsack", latencies=measured(files))
    plan = allocate(files, baseline(files, "random"), request)
    assert set(plan.budget.latency_us) == {1, 16}
    assert plan.budget.latency_us[1] <= 690
    assert plan.budget.latency_us[16] <= 700
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json") == plan


def test_the_error_of_a_latency_that_cannot_be_met_names_one_that_can(files):
    request = Request("0.1ms@batch=16", latencies=measured(files))
    with pytest.raises(ValueError, match="below the smallest") as error:
        allocate(files, baseline(files, "edges"), request)
    smallest = re.search(r"([0-9.]+ms@batch=16)\. Ask", str(error.value)).group(1)
    plan = allocate(files, baseline(files, "edges"), replace(request, budget=smallest))
    assert {m.bits for m in plan.matrices.values()} == {4}


def test_a_tied_head_at_16_bits_is_the_embedding_and_counts_for_nothing(tied):
    scores = baseline(tied, "random", head=True)
    without = allocate(tied, scores, Request("6bits"))
    kept = allocate(tied, scores, Request("6bits", pins=("lm_head=16",)))
    assert kept.matrices[HEAD].is_embedding
    assert (kept.budget.average_bits, kept.budget.disk_bytes) == (
        without.budget.average_bits,
        without.budget.disk_bytes,
    )
    copied = allocate(tied, scores, Request("6bits", pins=("lm_head=4",)))
    rows, columns = tied.head[HEAD]
    assert copied.matrices[HEAD].disk_bytes > rows * columns // 2
    assert copied.budget.disk_bytes == copied.budget.planned_bytes + without.budget.disk_bytes - (
        without.budget.planned_bytes
    )


@pytest.mark.parametrize("budget", ["4.2bits", "5bits", "6.37bits", "9bits", "15.9bits"])
@pytest.mark.parametrize("allocation", ["monotone", "knapsack"])
def test_a_planned_tied_head_never_takes_the_average_above_the_budget(tied, budget, allocation):
    plan = allocate(tied, baseline(tied, "random", head=True), Request(budget, allocation, head=True))
    assert plan.budget.average_bits <= float(budget.removesuffix("bits"))


def test_the_smallest_budget_with_a_tied_head_can_be_asked_for(tied):
    scores = baseline(tied, "random", head=True)
    with pytest.raises(ValueError, match="below the smallest") as error:
        allocate(tied, scores, Request("3bits", "knapsack", head=True))
    smallest = re.search(r"([0-9.]+bits) or", str(error.value)).group(1)
    assert allocate(tied, scores, Request(smallest, "knapsack", head=True)).budget.average_bits <= float(smallest[:-4])


def test_missing_measurements_are_named_with_what_to_run(files, tmp_path):
    def refused(latencies, said, budget="9ms@batch=16"):
        with pytest.raises(ValueError, match=said):
            allocate(files, baseline(files, "edges"), Request(budget, latencies=latencies))

    latencies = measured(files)
    refused(None, "taq tune")
    refused(latencies, r"batch 8 .*--m 8", "9ms@batch=8")
    refused(
        replace(latencies, us={k: v for k, v in latencies.us.items() if k[0] != 768}), "768 x 256 .* no such matrix"
    )
    refused(replace(latencies, us={k: v for k, v in latencies.us.items() if k[2] != 8}), "in 8 bits at batch 16")
    with pytest.raises(ValueError, match=r"measures 4, 8, 16 bits, not 3: choose --menu 4,8,16"):
        allocate(files, baseline(files, "edges"), Request("9ms@batch=16", menu=(3, 4, 8), latencies=latencies))
    refused(replace(latencies, steps={}), "--step --m 16.*--fixed-ms")
    given = replace(latencies, steps={}, fixed_ms=1.5)
    plan = allocate(files, baseline(files, "edges"), Request("9ms@batch=16", latencies=given))
    with_step = allocate(files, baseline(files, "edges"), Request("9ms@batch=16", latencies=latencies))
    assert plan.budget.latency_us[16] - with_step.budget.latency_us[16] == pytest.approx(1500 - STEP_US)


def test_tables_of_another_device_or_kernel_and_missing_ones_are_refused(files, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    table_of(files).save(path)
    assert load_latencies(path, GPU).device == GPU
    with pytest.raises(ValueError, match=f"measured on '{GPU}', and the plan is for 'cpu'"):
        load_latencies(path, "cpu")
    replace(table_of(files), kernel="0").save(path)
    with pytest.raises(ValueError, match="another version of the kernels"):
        load_latencies(path, GPU)
    with pytest.raises(ValueError, match=r"no table at .*none\.json"):
        load_latencies(tmp_path / "none.json", GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuned._tables.cache_clear()
    with pytest.raises(ValueError, match=r"needs latencies measured on NVIDIA Test 1.*taq tune"):
        load_latencies(None, GPU)
    tuned._tables.cache_clear()


def test_a_cpus_table_for_several_numbers_of_threads_wants_one_chosen(files):
    both = table_of(files, device="cpu", threads=1).with_entries(table_of(files, device="cpu", threads=2).latencies)
    both = replace(both, configs=(), latencies=table_of(files, device="cpu", threads=1).latencies + both.configs)
    with pytest.raises(ValueError, match="1, 2 threads: choose with --threads"):
        Latencies.of_table(both, "t")
    assert Latencies.of_table(both, "t", 2).threads == 2
    with pytest.raises(ValueError, match="not for 3"):
        Latencies.of_table(both, "t", 3)


def test_the_rest_of_a_step_is_what_its_matrices_leave(files):
    latencies = measured(files)
    layers = sum(
        latencies.us[shape, columns, 16, 1] for shape, columns in ((512, 256), (256, 256), (768, 256), (256, 384))
    )
    matrices = files.layers * layers + latencies.us[3072, 256, 16, 1]
    shapes = Shapes.of_files(files, head=False)
    assert step_rest_us(latencies, shapes, matrices + 123, 1) == pytest.approx(123)
    assert step_rest_us(latencies, shapes, matrices - 1, 1) == pytest.approx(-1)
