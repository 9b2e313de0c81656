import math
from dataclasses import replace

import pytest
import torch
import vllm.model_executor.layers.linear as vllm_linear
from compressed import compress_matrix, config_dict
from plans import make_plan, mixed
from taq_kernels import ops, packing
from tiny_models import make_tiny
from transformers import AutoConfig
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from taq_vllm.checkpoint import Calibration, quantize_model
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import PLAN_FILE, MatrixPlan, resident_bytes
from taq_vllm.plugin.config import TaqConfig
from taq_vllm.plugin.linear import DenseRun, Matrix, MatrixSpec, PackedRun
from taq_vllm.quantizer import quantize

pytestmark = pytest.mark.usefixtures("vllm_world")

PREFIX = "model.layers.0"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SIXTEEN = (16, True)

# Relative RMS error of one rounding to bf16: half a spacing at most, a spacing / sqrt(12) on average, over mantissas as
# they come 0.79 of this value. A layer rounds its output once; the weights that it is compared with are rounded to
# bf16, as in transformers, and the kernel's are not.
ROUNDING = 2**-9
LAYER_ERROR = math.sqrt(2) * ROUNDING


class Disk:
    """Matrices as compressed-tensors writes them, and what they stand for."""

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype
        self.tensors, self.weights, self.bits_of = {}, {}, {}

    def add(self, name, rows, columns, bits, symmetric=True, seed=0):
        generator = torch.Generator().manual_seed(seed + len(self.weights))
        weight = torch.randn(rows, columns, generator=generator).to(self.dtype)
        name = f"{PREFIX}.{name}"
        if bits == 16:
            self.tensors[name], self.weights[name] = {"weight": weight}, weight
        else:
            self.tensors[name], self.weights[name] = compress_matrix(weight, bits, symmetric)
            self.bits_of[name] = (bits, symmetric)
        return self

    def config(self, fused=FUSED):
        ignore = [name for name in self.weights if name not in self.bits_of]
        config = TaqConfig.from_config(config_dict(self.bits_of, ignore))
        config.packed_modules_mapping = dict(fused)
        config.maybe_update_config("nowhere")
        return config


@pytest.fixture
def as_rank(monkeypatch):
    """Layers built afterwards take themselves for this rank of so many."""

    def become(rank, size):
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: size)

    return become


def load(layer, disk, shards):
    """Hand the layer its tensors as vLLM's loader does; `shards` maps matrix to shard id."""
    for name, shard_id in shards.items():
        for kind, tensor in disk.tensors[f"{PREFIX}.{name}"].items():
            param = getattr(layer, kind)
            if shard_id is None:
                param.weight_loader(param, tensor)
            else:
                param.weight_loader(param, tensor, shard_id)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}


def qkv_layer(disk, columns=256, heads=4, kv_heads=2, head_size=64, fused=FUSED, **kwargs):
    return QKVParallelLinear(
        columns,
        head_size,
        heads,
        kv_heads,
        bias=False,
        params_dtype=disk.dtype,
        quant_config=disk.config(fused),
        prefix=f"{PREFIX}.qkv_proj",
        **kwargs,
    )


def make(kind, disk, name, *sizes, config=None):
    """A layer of a kind other than QKV."""
    quant_config = config or disk.config()
    return kind(*sizes, bias=False, params_dtype=disk.dtype, quant_config=quant_config, prefix=f"{PREFIX}.{name}")


def output(layer, x, bias=None):
    return layer.quant_method.apply(layer, x, bias)


def error(got, x, weight):
    expected = x.double() @ weight.double().t()
    return ((got.double() - expected).norm() / expected.norm()).item()


def activations(tokens, columns, dtype=torch.bfloat16):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(5)).to(dtype)


def mixed_qkv(q=(4, False), k=(8, True), v=SIXTEEN, heads=4, kv_heads=2, columns=256, head_size=64):
    disk = Disk()
    for name, rows, key in (("q_proj", heads, q), ("k_proj", kv_heads, k), ("v_proj", kv_heads, v)):
        disk.add(name, rows * head_size, columns, *key)
    return disk


def stacked(disk, *names):
    return torch.cat([disk.weights[f"{PREFIX}.{name}"] for name in names])


@pytest.mark.parametrize("tokens", [1, 7, 160])
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((4, False), (8, True), SIXTEEN),
        (SIXTEEN, (4, True), (4, False)),
        ((8, False), SIXTEEN, (4, True)),
        ((4, True), (4, True), (4, True)),
        ((8, True), (8, True), (4, False)),
    ],
)
def test_fused_layer_computes_each_shard_with_its_own_bits(tokens, q, k, v):
    disk = mixed_qkv(q, k, v)
    layer = load(qkv_layer(disk), disk, QKV)
    x = activations(tokens, 256)
    assert error(output(layer, x), x, stacked(disk, *QKV)) < LAYER_ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_activation_dtypes_are_as_exact_as_they_allow(dtype):
    disk = Disk(dtype).add("o_proj", 128, 256, 4, False)
    layer = make(RowParallelLinear, disk, "o_proj", 256, 128)
    load(layer, disk, {"o_proj": None})
    x = activations(9, 256, dtype)
    bound = {torch.float16: 2 * 2**-12, torch.float32: 1e-6}[dtype]
    assert error(output(layer, x), x, stacked(disk, "o_proj")) < bound


def test_quantized_neighbours_share_a_call_whatever_their_bits_and_rows():
    disk = Disk().add("gate_proj", 48, 256, 4, False).add("up_proj", 48, 256, 8, True)
    layer = make(MergedColumnParallelLinear, disk, "gate_up_proj", 256, [48, 48])
    load(layer, disk, {"gate_proj": 0, "up_proj": 1})
    (run,) = layer.taq_runs
    assert (run.bits, run.sizes) == ([4, 8], [48, 48])
    x = activations(3, 256)
    assert error(output(layer, x), x, stacked(disk, "gate_proj", "up_proj")) < LAYER_ERROR


def load_as_on_a_gpu(interpreted, monkeypatch):
    """Layers loaded afterwards are packed as an H200 would have them."""

    def h200_tables(shapes, columns, group_size, device, configs):
        configs = {bucket: interpreted.heuristic(shapes, columns, 90, 132, bucket) for bucket in interpreted.BUCKETS}
        tables = interpreted.build_tables(shapes, columns, group_size, configs, 132)
        return tables.tables, tables.launches

    monkeypatch.setattr(ops, "has_dense_tiles", lambda device, dtype: True)
    monkeypatch.setattr(ops, "pack", packing.pack_tiles)
    monkeypatch.setattr(ops, "pack_dense", packing.pack_dense_tiles)
    monkeypatch.setattr(ops, "_launch_tables", h200_tables)
    monkeypatch.setattr(ops, "warm_up", lambda *arguments: None)


@pytest.mark.parametrize("tokens", [3, 300])
def test_a_gpu_gets_a_layer_as_one_call_with_its_16_bit_matrix_in_it(interpreted, monkeypatch, tokens):
    """Loaded on a CPU by the code that loads on a GPU, computed in Triton's interpreter."""
    load_as_on_a_gpu(interpreted, monkeypatch)
    disk = mixed_qkv()
    layer = load(qkv_layer(disk), disk, QKV)
    (run,) = layer.taq_runs
    assert (run.bits, run.sizes) == ([4, 8, 16], [256, 128, 128])
    calls = []
    monkeypatch.setattr(torch.ops.taq, "linear", lambda *operands: calls.append(operands) or operands[0])
    x = activations(tokens, 256)
    output(layer, x)
    ((*operands, bias),) = calls
    assert bias is None
    # The interpreter cuts bf16 results off instead of rounding them, which doubles that error.
    assert error(interpreted.linear(*operands), x, stacked(disk, *QKV)) < 2 * LAYER_ERROR


def test_kernels_are_warmed_as_they_will_be_called(monkeypatch):
    warmed = []
    monkeypatch.setattr(ops, "warm_up", lambda operands, columns, dtype, bias: warmed.append((columns, dtype, bias)))
    disk = mixed_qkv(v=(4, True))
    for has_bias in (False, True):
        layer = QKVParallelLinear(
            256,
            64,
            4,
            2,
            bias=has_bias,
            params_dtype=disk.dtype,
            quant_config=disk.config(),
            prefix=f"{PREFIX}.qkv_proj",
        )
        load(layer, disk, QKV)
    (_, _, without), (columns, dtype, with_bias) = warmed
    assert without is None
    assert (columns, dtype, with_bias.shape) == (256, torch.bfloat16, (512,))


def test_dummy_weights_are_as_asymmetric_as_real_ones():
    spec = MatrixSpec("q", 4, False, None, stored=True)
    matrix = Matrix(spec, None, (64, 256), (slice(0, 64),), slice(0, 256))
    matrix.fill_with_noise(torch.device("cpu"), torch.bfloat16)
    assert matrix.shard.zero_points.unique().tolist() == [8]


def test_bias_is_added_once_in_every_kind_of_layer():
    bias = torch.randn(512, generator=torch.Generator().manual_seed(3)).bfloat16()
    for v in (SIXTEEN, (4, True)):
        disk = mixed_qkv(v=v)
        layer = load(qkv_layer(disk), disk, QKV)
        x = activations(4, 256)
        expected = x.double() @ stacked(disk, *QKV).double().t() + bias.double()
        assert ((output(layer, x, bias) - expected).norm() / expected.norm()).item() < LAYER_ERROR


def test_shard_that_arrives_whole_is_packed_at_once_and_its_raw_tensors_are_let_go():
    disk = mixed_qkv()
    layer = qkv_layer(disk)
    q, k, _ = layer.quant_method.matrices
    for kind, tensor in disk.tensors[f"{PREFIX}.q_proj"].items():
        assert q.shard is None
        getattr(layer, kind).weight_loader(getattr(layer, kind), tensor, "q")
    assert q.shard is not None
    assert not q.tensors
    assert k.shard is None


def test_resident_bytes_are_what_the_plan_says():
    disk = mixed_qkv(heads=8, kv_heads=4, columns=512)
    layer = load(qkv_layer(disk, 512, 8, 4), disk, QKV)
    quantized = resident_bytes(4, (512, 512), symmetric=False) + resident_bytes(8, (256, 512), symmetric=True)
    zero_points_beside_asymmetric_ones = 256 * 512 // 128
    planned = quantized + zero_points_beside_asymmetric_ones + resident_bytes(16, (256, 512), symmetric=True)
    assert sum(run.resident_bytes for run in layer.taq_runs) == planned
    assert {type(run) for run in layer.taq_runs} == {PackedRun, DenseRun}
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == quantized + zero_points_beside_asymmetric_ones
    assert not any(parameter.numel() for parameter in layer.parameters() if parameter.dtype != torch.bfloat16)


def test_lora_finds_the_layers_device():
    disk = mixed_qkv()
    layer = load(qkv_layer(disk), disk, QKV)
    assert _get_lora_device(layer) == torch.device("cpu")
    assert not hasattr(layer, "weight")


# Tensor parallelism: every rank's part, put together, is the whole layer.


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 2), (2, 1), (4, 2), (4, 4)])
def test_qkv_split_over_ranks_is_the_whole_with_replicated_kv_heads(as_rank, size, kv_heads):
    disk = mixed_qkv(heads=4, kv_heads=kv_heads)
    q, k, v = (disk.weights[f"{PREFIX}.{name}"] for name in QKV)
    x = activations(3, 256)
    for rank in range(size):
        as_rank(rank, size)
        layer = load(qkv_layer(disk, kv_heads=kv_heads), disk, QKV)
        local_kv = max(1, kv_heads // size) * 64
        kv_rank = rank * kv_heads // size if kv_heads < size else rank
        rows = [
            q[rank * 256 // size : (rank + 1) * 256 // size],
            *(w[kv_rank * local_kv : (kv_rank + 1) * local_kv] for w in (k, v)),
        ]
        assert error(output(layer, x), x, torch.cat(rows)) < LAYER_ERROR


def test_merged_and_plain_column_layers_are_split_by_rows(as_rank):
    disk = Disk().add("gate_proj", 96, 256, 4, False).add("up_proj", 96, 256, 8).add("fc", 40, 256, 4, False)
    gate, up, fc = (disk.weights[f"{PREFIX}.{name}"] for name in ("gate_proj", "up_proj", "fc"))
    x = activations(3, 256)
    for rank in range(2):
        as_rank(rank, 2)
        config = disk.config()
        merged = make(MergedColumnParallelLinear, disk, "gate_up_proj", 256, [96, 96], config=config)
        load(merged, disk, {"gate_proj": 0, "up_proj": 1})
        mine = slice(48 * rank, 48 * (rank + 1))
        assert error(output(merged, x), x, torch.cat([gate[mine], up[mine]])) < LAYER_ERROR
        plain = make(ColumnParallelLinear, disk, "fc", 256, 40, config=config)
        load(plain, disk, {"fc": None})
        assert error(output(plain, x), x, fc[20 * rank : 20 * (rank + 1)]) < LAYER_ERROR


def test_replicated_layer_is_whole_on_every_rank(as_rank):
    disk = Disk().add("fc", 48, 256, 8)
    as_rank(1, 2)
    layer = make(ReplicatedLinear, disk, "fc", 256, 48)
    load(layer, disk, {"fc": None})
    x = activations(3, 256)
    assert error(output(layer, x), x, stacked(disk, "fc")) < LAYER_ERROR


@pytest.mark.parametrize(
    ("columns", "size", "group_size"),
    [(512, 2, 128), (640, 2, 64), (384, 2, 64), (640, 4, 32), (128, 4, 32)],
)
@pytest.mark.parametrize("key", [(4, False), (4, True), (8, True), (8, False), SIXTEEN])
def test_row_parallel_split_that_cuts_groups_has_exactly_the_same_weights(as_rank, columns, size, group_size, key):
    disk = Disk(torch.float32).add("down_proj", 64, columns, *key).add("other", 16, 128, 4)
    x = activations(3, columns, torch.float32)
    total = 0
    for rank in range(size):
        as_rank(rank, size)
        layer = make(RowParallelLinear, disk, "down_proj", columns, 64)
        load(layer, disk, {"down_proj": None})
        if key[0] < 16:
            assert layer.taq_runs[0].group_size == group_size
        total = total + output(layer, x.chunk(size, 1)[rank].contiguous())
    # Float32: any difference in a weight would be a step of 2^-4 or 2^-8 of its range.
    assert error(total, x, stacked(disk, "down_proj")) < 1e-6


@pytest.mark.parametrize("key", [(4, False), (8, True)])
def test_rounding_while_loading_sees_whole_groups_on_every_rank(as_rank, key):
    columns, size = 640, 2
    name = f"{PREFIX}.down_proj"
    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(8))
    rounded = quantize(weight.bfloat16(), *key)  # fp32 models become bf16 first
    expected = replace(rounded, scale=rounded.scale.float()).dequantize()
    x = activations(3, columns, torch.float32)
    total = 0
    for rank in range(size):
        as_rank(rank, size)
        config = TaqConfig()
        config._planned = {name: (name, MatrixPlan(bits=key[0], symmetric=key[1], shape=(64, columns), why="pinned"))}
        disk = Disk(torch.float32)
        layer = make(RowParallelLinear, disk, "down_proj", columns, 64, config=config)
        disk.tensors[name] = {"weight": weight}
        load(layer, disk, {"down_proj": None})
        total = total + output(layer, x.chunk(size, 1)[rank].contiguous())
    assert error(total, x, expected) < 1e-6


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16])
def test_rounding_while_loading_is_the_offline_checkpoint_whatever_the_dtypes(model_dtype, tmp_path, monkeypatch):
    model = make_tiny("qwen3", tmp_path / "model", dtype=model_dtype, num_hidden_layers=1)
    plan = make_plan(model, mixed)
    quantize_model(ModelFiles(model), plan, tmp_path / "offline", Calibration(method="rtn"))
    plan.save(model / PLAN_FILE)
    name = f"{PREFIX}.self_attn"

    def load_from(folder, engine_dtype):
        hf_config = AutoConfig.from_pretrained(folder)
        stored = getattr(hf_config, "quantization_config", None)
        config = TaqConfig.from_config(stored) if stored else TaqConfig()
        config.packed_modules_mapping = dict(FUSED)
        config.maybe_update_config(str(folder), hf_config)
        monkeypatch.setattr(config, "check_all_claimed", lambda: None)
        disk, files = Disk(engine_dtype), ModelFiles(folder)
        for matrix in QKV:
            start = f"{name}.{matrix}."
            kinds = [tensor.removeprefix(start) for tensor in files.tensors if tensor.startswith(start)]
            disk.tensors[f"{PREFIX}.{matrix}"] = {kind: files.read(start + kind) for kind in kinds}
        layer = QKVParallelLinear(
            256, 64, 4, 2, bias=False, params_dtype=engine_dtype, quant_config=config, prefix=f"{name}.qkv_proj"
        )
        return dict(load(layer, disk, QKV).named_buffers())

    for engine_dtype in (torch.bfloat16, torch.float16, torch.float32):
        online, offline = (load_from(folder, engine_dtype) for folder in (model, tmp_path / "offline"))
        assert online.keys() == offline.keys()
        assert online.keys() == {f"taq_runs.0.{name}" for name in ("weights", "scales", "zero_points")}
        assert all(torch.equal(online[key], offline[key]) for key in online)


def test_row_parallel_split_into_pieces_below_32_names_the_sizes_that_work(as_rank):
    disk = Disk().add("down_proj", 64, 640, 4)
    as_rank(0, 8)
    with pytest.raises(
        ValueError, match=r"down_proj has 640 in-features.*size 8 .* 80.* Allowed.*: 1, 2, 4, 5, 10, 20;"
    ):
        make(RowParallelLinear, disk, "down_proj", 640, 64)


# Fused on disk (Phi-3): one matrix for q, k and v, another for gate and up.


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("key", [(4, False), (8, True)])
def test_layer_that_is_fused_on_disk_is_split_by_its_parts(as_rank, size, key):
    fused = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}
    disk = Disk().add("qkv_proj", 512, 256, *key).add("gate_up_proj", 192, 256, *key)
    qkv, gate_up = (disk.weights[f"{PREFIX}.{name}"] for name in fused)
    x = activations(3, 256)
    for rank in range(size):
        as_rank(rank, size)
        config = disk.config(fused)
        layer = load(qkv_layer(disk, fused=fused), disk, {"qkv_proj": None})
        parts = [part.chunk(size)[rank] for part in qkv.split([256, 128, 128])]
        assert error(output(layer, x), x, torch.cat(parts)) < LAYER_ERROR
        layer = make(MergedColumnParallelLinear, disk, "gate_up_proj", 256, [96, 96], config=config)
        load(layer, disk, {"gate_up_proj": None})
        parts = [part.chunk(size)[rank] for part in gate_up.split([96, 96])]
        assert error(output(layer, x), x, torch.cat(parts)) < LAYER_ERROR


# Checks while loading.


def give(layer, kind, tensor, shard_id):
    param = getattr(layer, kind)
    param.weight_loader(param, tensor, shard_id)


def test_tensor_of_another_bitwidth_is_refused_with_both_shapes():
    disk = mixed_qkv()
    layer = qkv_layer(disk)
    other = mixed_qkv(q=(8, True))
    with pytest.raises(
        ValueError, match=r"q_proj\.weight_packed: got torch.int32 of shape \[256, 64\], 4 bits asymm.*\[256, 32\]"
    ):
        give(layer, "weight_packed", other.tensors[f"{PREFIX}.q_proj"]["weight_packed"], "q")


def test_quantized_tensor_for_a_16_bit_matrix_is_refused_and_the_other_way_round():
    disk = mixed_qkv()
    layer = qkv_layer(disk)
    with pytest.raises(ValueError, match=r"v_proj: got a tensor 'weight_scale', but 16 bits .* 'weight'"):
        give(layer, "weight_scale", disk.tensors[f"{PREFIX}.k_proj"]["weight_scale"], "v")
    with pytest.raises(ValueError, match=r"q_proj: got a tensor 'weight', but 4 bits asymmetric .* 'weight_packed'"):
        give(layer, "weight", disk.weights[f"{PREFIX}.q_proj"], "q")


def test_zero_points_of_a_symmetric_matrix_are_refused():
    disk = mixed_qkv()
    layer = qkv_layer(disk)
    with pytest.raises(ValueError, match=r"k_proj: got a tensor 'weight_zero_point', but 8 bits symmetric"):
        give(layer, "weight_zero_point", torch.zeros(32, 2, dtype=torch.int32), "k")


def test_wrong_stored_shape_is_refused():
    layer = qkv_layer(mixed_qkv())
    with pytest.raises(ValueError, match=r"k_proj\.weight_shape: got \[128, 512\], the model needs \[128, 256\]"):
        give(layer, "weight_shape", torch.tensor([128, 512]), "k")


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_matrix_that_did_not_arrive_whole_is_an_error(missing):
    disk = mixed_qkv()
    del disk.tensors[f"{PREFIX}.q_proj"][missing]
    with pytest.raises(ValueError, match=f"q_proj: the checkpoint has no {missing}"):
        load(qkv_layer(disk), disk, QKV)


def test_in_features_that_are_not_whole_groups_are_refused():
    config = TaqConfig.from_config(config_dict({f"{PREFIX}.fc": (4, True)}))
    with pytest.raises(ValueError, match="fc has 192 in-features, which 128 does not divide; it must stay at 16 bits"):
        ReplicatedLinear(192, 32, bias=False, quant_config=config, prefix=f"{PREFIX}.fc")


def test_loading_a_second_time_is_an_error_and_not_silence():
    disk = mixed_qkv()
    layer = load(qkv_layer(disk), disk, QKV)
    with pytest.raises(ValueError, match="loaded a second time by vLLM's reload_weights alone"):
        give(layer, "weight_packed", disk.tensors[f"{PREFIX}.q_proj"]["weight_packed"], "q")
