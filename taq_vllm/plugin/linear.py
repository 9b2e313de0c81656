"""`TaqLinearMethod`: loads the matrices of one vLLM layer, each with its own bits, and computes the layer.

A fused layer (q, k, v or gate, up) keeps each of its matrices by itself. vLLM hands checkpoint tensors to a parameter
found by name; ours are empty *routers* that pass the tensor on to the matrix it belongs to, which checks it, cuts out
this rank's part, and packs it on its device the moment its last tensor arrives. At most one layer's raw tensors are
held at a time. A GPU computes a layer in one launch, 16-bit matrices included; a CPU leaves those to vLLM's own method.

Row-parallel layers may cut a group of 128 input features in two. The parts get the same scale as smaller groups of 64
or 32, so that the weights are the same for every number of ranks. The head is a layer like the others (`head` has what
differs): vLLM pads its vocabulary to whole multiples of 64 rows a rank, and padded rows are zero.

When vLLM reloads weights it collects a layer's tensors until it has counted as many elements as the layer's parameters
have, on copies of them on the meta device, and then loads and processes the layer once more. Routers say how many
elements they pass on, and what is packed anew goes to the memory of the old, which a captured CUDA graph reads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from taq_kernels import ops, packing
from taq_kernels.packing import PackedShard
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import BasevLLMParameter

from taq_vllm.plan import GROUP_SIZE
from taq_vllm.quantizer import quantize

if TYPE_CHECKING:
    from taq_vllm.plugin.config import TaqConfig

# Subclasses of these cut their weights in ways of their own.
SHARDED_LAYERS = frozenset(
    {
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        ParallelLMHead,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    }
)

_PACKED_TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_WORDS = (torch.int32,)
_INTEGERS = (torch.int32, torch.int64)
_DUMMY_WEIGHT = 1e-3  # the largest weight of `--load-format dummy`, as vLLM's own


@dataclass(frozen=True)
class MatrixSpec:
    """What one matrix of a layer is.

    Attributes:
        name: Hugging Face's module name.
        bits: 4, 8 or 16.
        symmetric: no zero points are stored.
        shape: (N, K) that the plan says; None without a plan.
        stored: the checkpoint holds it with these bits; else it holds 16 bits and rounding happens while loading.
        rounding_dtype: what weights that are not `stored` are cast to before they are rounded, as `taq quantize` does.
    """

    name: str
    bits: int
    symmetric: bool
    shape: tuple[int, int] | None
    stored: bool
    rounding_dtype: torch.dtype = torch.bfloat16

    def describe(self) -> str:
        """Bits and symmetry in words."""
        return "16 bits" if self.bits == 16 else f"{self.bits} bits {'' if self.symmetric else 'a'}symmetric"


class Router(BasevLLMParameter):
    """An empty parameter that stands for the name of a checkpoint tensor.

    Attributes:
        weight_loader_numel: elements of the tensors that it passes on, which vLLM counts while reloading.
    """


@dataclass
class Matrix:
    """One matrix of the checkpoint, and the part of it that this rank holds.

    Attributes:
        spec: what it is.
        shard_id: how vLLM calls it inside the fused layer; None if it is the whole layer.
        shape: (N, K) of the matrix in the checkpoint.
        rows: this rank's rows; several ranges where the checkpoint has a fused layer as one matrix.
        columns: this rank's columns.
        padding: zero rows below them, which only the head has.
        tensors: what has arrived and is not packed yet.
        shard: what has been packed.
    """

    spec: MatrixSpec
    shard_id: str | int | None
    shape: tuple[int, int]
    rows: tuple[slice, ...]
    columns: slice
    padding: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shard: "Shard | None" = None

    @property
    def local_rows(self) -> int:
        """Rows on this rank, padding included."""
        return sum(part.stop - part.start for part in self.rows) + self.padding

    @property
    def local_columns(self) -> int:
        """Columns on this rank."""
        return self.columns.stop - self.columns.start

    @property
    def group_size(self) -> int:
        """Columns that share a scale on this rank: 128, or less where the split over ranks cuts groups."""
        return math.gcd(GROUP_SIZE, self.local_columns, self.columns.start)

    @property
    def expected(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Shape and allowed dtypes of each tensor that the checkpoint must have."""
        rows, columns = self.shape
        bits = self.spec.bits
        if bits == 16 or not self.spec.stored:
            return {"weight": (self.shape, _FLOATS)}
        groups = columns // GROUP_SIZE
        tensors = {
            "weight_packed": ((rows, columns * bits // 32), _WORDS),
            "weight_scale": ((rows, groups), _FLOATS),
            "weight_shape": ((2,), _INTEGERS),
        }
        if not self.spec.symmetric:
            tensors["weight_zero_point"] = ((-(-rows * bits // 32), groups), _WORDS)
        return tensors

    def check(self, kind: str, tensor: Tensor) -> None:
        """Check one tensor of the checkpoint.

        Raises:
            ValueError: it is not what the plan or the config says.
        """
        name = self.spec.name
        remedy = (
            "Weights and plan are not of one checkpoint: write it again with `taq quantize`, or see `taq verify`."
            if self.spec.stored
            else "The plan is for another model: make one with `taq plan`."
        )
        if kind not in self.expected:
            raise ValueError(
                f"{name}: got a tensor {kind!r}, but {self.spec.describe()} in this checkpoint are stored as "
                f"{', '.join(map(repr, self.expected))}. {remedy}"
            )
        shape, dtypes = self.expected[kind]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name}.{kind}: got {tensor.dtype} of shape {list(tensor.shape)}, {self.spec.describe()} for "
                f"{list(self.shape)} weights need {' or '.join(map(str, dtypes))} of shape {list(shape)}. {remedy}"
            )
        if kind == "weight_shape" and tuple(tensor.tolist()) != self.shape:
            raise ValueError(
                f"{name}.weight_shape: got {tensor.tolist()}, the model needs {list(self.shape)}. {remedy}"
            )

    def take(self, kind: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Receive one tensor of the checkpoint; the last one packs this rank's part.

        Args:
            kind: the tensor's name within the matrix, for example "weight_packed".
            tensor: the whole tensor.
            device: where the part will live.
            dtype: of the activations.

        Raises:
            ValueError: it is not what the plan or the config says.
        """
        self.check(kind, tensor)
        self.tensors[kind] = tensor
        if self.tensors.keys() == self.expected.keys():
            self.shard = self._pack(device, dtype)
            self.tensors.clear()

    def check_complete(self) -> None:
        """Check that everything has arrived.

        Raises:
            ValueError: something has not.
        """
        if self.shard is None:
            missing = [kind for kind in self.expected if kind not in self.tensors]
            raise ValueError(
                f"{self.spec.name}: the checkpoint has no {', '.join(missing)}. It is incomplete: see `taq verify`, "
                "or write it again with `taq quantize`."
            )

    def fill_with_noise(self, device: torch.device, dtype: torch.dtype) -> None:
        """Random weights for `--load-format dummy`."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.local_rows, self.local_columns)
        bits = self.spec.bits
        if bits == 16:
            weight = torch.empty(shape, dtype=dtype).uniform_(-_DUMMY_WEIGHT, _DUMMY_WEIGHT, generator=generator)
            self.shard = self._keep_dense(weight.to(device))
            return
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
        scale = torch.full((shape[0], shape[1] // self.group_size), _DUMMY_WEIGHT * 2 ** (1 - bits), dtype=dtype)
        # The middle, where symmetric weights have it: dummy weights take the memory and the kernel of real ones.
        zero_point = None if self.spec.symmetric else torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
        parts = (None if part is None else part.to(device) for part in (codes, scale, zero_point))
        self.shard = ops.pack(*parts, bits, self.group_size)

    def _keep_dense(self, weight: Tensor) -> "Shard":
        if ops.has_dense_tiles(weight.device, weight.dtype):
            return ops.pack_dense(weight, self.group_size)
        return DenseShard(weight)

    def _pack(self, device: torch.device, dtype: torch.dtype) -> "Shard":
        bits = self.spec.bits
        if bits == 16:
            weight = self._pad(self._take_rows(self.tensors["weight"]))[:, self.columns]
            return self._keep_dense(weight.to(device, dtype, copy=True).contiguous())
        if self.spec.stored:
            # Eight 4-bit or four 8-bit codes a word; a rank's columns begin and end on multiples of 32.
            words = self._take_rows(self.tensors["weight_packed"])
            words = words[:, self.columns.start * bits // 32 : self.columns.stop * bits // 32]
            codes = packing.unpack_words(words.to(device), bits)
            scale = self._take_rows(self.tensors["weight_scale"])
            zero_point = None
            if not self.spec.symmetric:
                zero_words = self.tensors["weight_zero_point"]
                zero_point = self._take_rows(packing.unpack_zero_points(zero_words, bits, self.shape[0]))
        else:
            weight = self._take_rows(self.tensors["weight"]).to(device, self.spec.rounding_dtype)
            rounded = quantize(weight, bits, self.spec.symmetric)
            codes = rounded.codes[:, self.columns]
            scale = rounded.scale
            zero_point = None if self.spec.symmetric else rounded.zero_point
        # The group that each of this rank's (smaller) groups lies in.
        starts = torch.arange(self.columns.start, self.columns.stop, self.group_size) // GROUP_SIZE
        scale = scale.to(device)[:, starts]
        zero_point = None if zero_point is None else zero_point.to(device)[:, starts]
        # A scale of zero makes a row of zeros, whatever its codes are.
        codes, scale = self._pad(codes), self._pad(scale)
        zero_point = None if zero_point is None else self._pad(zero_point)
        return ops.pack(codes, scale, zero_point, bits, self.group_size)

    def _take_rows(self, tensor: Tensor) -> Tensor:
        parts = [tensor[part] for part in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _pad(self, tensor: Tensor) -> Tensor:
        if not self.padding:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(self.padding, *tensor.shape[1:])])


@dataclass(frozen=True)
class DenseShard:
    """A 16-bit matrix on this rank: [N, K]."""

    weight: Tensor

    @property
    def rows(self) -> int:
        """N."""
        return self.weight.shape[0]


Shard = DenseShard | PackedShard


def matrices_of(
    layer: LinearBase | ParallelLMHead,
    specs: Sequence[MatrixSpec],
    output_partition_sizes: Sequence[int],
    input_size: int,
    input_size_per_partition: int,
) -> list[Matrix]:
    """This rank's part of each matrix of a layer.

    Args:
        layer: one of `SHARDED_LAYERS`.
        specs: the layer's matrices as the checkpoint has them, in order.
        output_partition_sizes: rows of each shard on this rank.
        input_size: K.
        input_size_per_partition: columns on this rank.

    Raises:
        ValueError: another shape than planned, K is not whole groups, or the split over ranks leaves groups of fewer
            than 32 columns.
    """
    shards = _shards(layer, output_partition_sizes)
    start = layer.tp_rank * input_size_per_partition if isinstance(layer, RowParallelLinear) else 0
    columns = slice(start, start + input_size_per_partition)
    if len(specs) == 1:
        # One matrix on disk for all shards of the layer: q, k, v (gate, up) lie below each other.
        rows, offset = [], 0
        for _, total, first, count in shards:
            rows.append(slice(offset + first, offset + first + count))
            offset += total
        padding = sum(output_partition_sizes) - sum(count for _, _, _, count in shards)
        matrices = [Matrix(specs[0], None, (offset, input_size), tuple(rows), columns, padding)]
    elif len(specs) == len(shards):
        matrices = [
            Matrix(spec, shard_id, (total, input_size), (slice(first, first + count),), columns)
            for spec, (shard_id, total, first, count) in zip(specs, shards, strict=True)
        ]
    else:
        raise ValueError(
            f"{layer.prefix}: the checkpoint has {len(specs)} matrices for a layer of {len(shards)} parts; "
            "such a layer cannot be served with --quantization taq"
        )
    for matrix in matrices:
        _check_shape(matrix, layer)
    return matrices


def _shards(
    layer: LinearBase | ParallelLMHead, output_partition_sizes: Sequence[int]
) -> list[tuple[str | int | None, int, int, int]]:
    """(shard id, rows on all ranks, first row and number of rows on this rank) of each part of a layer."""
    sizes = output_partition_sizes
    if isinstance(layer, ParallelLMHead):
        start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        return [(None, layer.org_vocab_size, start, end - start)]
    if isinstance(layer, QKVParallelLinear):
        kv_rank = layer.tp_rank // layer.num_kv_head_replicas
        totals = (
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        )
        ranks = (layer.tp_rank, kv_rank, kv_rank)
        return [
            (shard_id, total, rank * size, size)
            for shard_id, total, rank, size in zip("qkv", totals, ranks, sizes, strict=True)
        ]
    if isinstance(layer, MergedColumnParallelLinear):
        return [
            (index, total, layer.tp_rank * size, size)
            for index, (total, size) in enumerate(zip(layer.output_sizes, sizes, strict=True))
        ]
    rank = layer.tp_rank if isinstance(layer, ColumnParallelLinear) else 0
    return [(None, layer.output_size, rank * sizes[0], sizes[0])]


def _check_shape(matrix: Matrix, layer: LinearBase | ParallelLMHead) -> None:
    spec, (_, columns) = matrix.spec, matrix.shape
    if spec.shape is not None and tuple(spec.shape) != matrix.shape:
        raise ValueError(
            f"{spec.name} is {list(matrix.shape)} in this model and {list(spec.shape)} in the plan; the plan is for "
            "another model. Make one with `taq plan`."
        )
    if spec.bits == 16:
        return
    if columns % GROUP_SIZE:
        raise ValueError(
            f"{spec.name} has {columns} in-features, which {GROUP_SIZE} does not divide; it must stay at 16 bits"
        )
    if matrix.group_size not in packing.GROUP_SIZES:
        allowed = [
            size
            for size in range(1, 65)
            if columns % size == 0 and math.gcd(GROUP_SIZE, columns // size) in packing.GROUP_SIZES
        ]
        raise ValueError(
            f"{spec.name} has {columns} in-features; --tensor-parallel-size {layer.tp_size} gives each rank "
            f"{matrix.local_columns}, which cuts its groups of {GROUP_SIZE} into pieces of {matrix.group_size}, and "
            f"{min(packing.GROUP_SIZES)} is the least. Allowed for this layer: {', '.join(map(str, allowed))}; or "
            "plan 16 bits for it."
        )


class TaqLinearMethod(LinearMethodBase):
    """A layer in which at least one matrix is quantized."""

    # LoRA looks for `weight_packed` to learn the layer's device; the other names have served once all is loaded.
    kept_names: tuple[str, ...] = ("weight_packed",)

    def __init__(self, config: "TaqConfig", specs: list[MatrixSpec]) -> None:
        self.config = config
        self.specs = specs
        # Built here because it looks at vLLM's current config, which is set while the model is built.
        self.dense_method = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the routers; storage comes when tensors do.

        Raises:
            ValueError: the plan or the split over ranks does not suit this layer.
        """
        self.matrices = matrices_of(layer, self.specs, output_partition_sizes, input_size, input_size_per_partition)
        self.params_dtype = params_dtype
        self.is_dummy = _loads_dummies()
        self.is_loading = True
        _register_routers(layer, ("weight", *_PACKED_TENSORS), params_dtype, self._load)
        for kind in ("weight", *_PACKED_TENSORS):
            shapes = [matrix.expected[kind][0] for matrix in self.matrices if kind in matrix.expected]
            getattr(layer, kind).weight_loader_numel = sum(map(math.prod, shapes))
        ops.register()

    def _load(self, kind: str, param: Router, tensor: Tensor, shard_id: str | int | None) -> None:
        matrix = _matrix_of(self.matrices, shard_id, kind)
        if param.is_meta:  # vLLM counts what a reload copies
            with _reload_named(True):
                matrix.check(kind, tensor)
            torch.empty(tensor.shape, device="meta").copy_(tensor)
            self.is_loading = True
            return
        if not self.is_loading:
            raise ValueError(
                f"{matrix.spec.name}: weights are packed and can be loaded a second time by vLLM's reload_weights alone"
            )
        matrix.take(kind, tensor, param.device, self.params_dtype)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that everything was loaded and form the runs that `apply` computes.

        Raises:
            ValueError: a planned matrix that no layer has, or one of this layer that is not complete.
        """
        if not self.is_loading:
            return
        is_reload = hasattr(layer, "taq_runs")
        self.config.check_all_claimed()
        device = layer.weight_packed.device
        for matrix in self.matrices:
            if self.is_dummy:
                matrix.fill_with_noise(device, self.params_dtype)
            with _reload_named(is_reload):
                matrix.check_complete()
        self.is_dummy = False
        runs = [
            (is_dense, [matrix.shard for matrix in run])
            for is_dense, run in groupby(self.matrices, key=lambda matrix: isinstance(matrix.shard, DenseShard))
        ]
        for matrix in self.matrices:
            matrix.shard = None
        self.is_loading = False
        if is_reload:
            with _reload_named(True):
                for run, (_, shards) in zip(layer.taq_runs, runs, strict=True):
                    run.replace(shards)
            return
        bias = None if getattr(layer, "skip_bias_add", False) else layer.bias  # the head cannot skip it
        layer.taq_runs = nn.ModuleList(
            DenseRun(shards, self.dense_method) if is_dense else PackedRun(shards, self.params_dtype, bias)
            for is_dense, shards in runs
        )
        for kind in ("weight", *_PACKED_TENSORS):
            if kind not in self.kept_names:
                delattr(layer, kind)
        resident_bytes = sum(run.resident_bytes for run in layer.taq_runs)
        self.config.layer_loaded(self.specs, resident_bytes, device)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] @ W^T + bias: [..., N of all shards]."""
        runs = layer.taq_runs
        if len(runs) == 1:
            return runs[0](x, bias)
        biases = [None] * len(runs) if bias is None else bias.split([run.rows for run in runs])
        return torch.cat([run(x, part) for run, part in zip(runs, biases, strict=True)], dim=-1)


class PackedRun(nn.Module):
    """Neighbouring matrices of a layer that one call of `taq::linear` computes."""

    def __init__(self, shards: list[PackedShard], dtype: torch.dtype, bias: Tensor | None) -> None:
        """Args: `dtype` of the activations; the `bias` of the layer, which this run's calls will have a part of."""
        super().__init__()
        operands = ops.join(shards)
        self.rows = sum(operands.sizes)
        # With a bias the kernel is another one; which values it has does not matter.
        ops.warm_up(operands, shards[0].columns, dtype, None if bias is None else bias[: self.rows])
        self.register_buffer("weights", operands.weights, persistent=False)
        self.register_buffer("scales", operands.scales, persistent=False)
        self.register_buffer("zero_points", operands.zero_points, persistent=False)
        for index, table in enumerate(operands.tables):
            self.register_buffer(f"table_{index}", table, persistent=False)
        self.table_count = len(operands.tables)
        self.launches = operands.launches
        self.bits = operands.bits
        self.sizes = operands.sizes
        self.group_size = operands.group_size
        self.resident_bytes = sum(buffer.nbytes for buffer in self.buffers())
        # vLLM takes the buffers away while it reloads a model, and puts the same ones back afterwards.
        self.storage = _stored(operands)

    def replace(self, shards: list[PackedShard]) -> None:
        """Other weights of the same shapes and bits, in the memory of these.

        Raises:
            ValueError: their scales have another dtype.
        """
        for kept, new in zip(self.storage, _stored(ops.join(shards)), strict=True):
            if kept.dtype != new.dtype:
                raise ValueError(f"got scales in {new.dtype}, and the engine was started with {kept.dtype}")
            kept.copy_(new)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N of these matrices]."""
        return torch.ops.taq.linear(
            x,
            self.weights,
            self.scales,
            self.zero_points,
            [getattr(self, f"table_{index}") for index in range(self.table_count)],
            self.launches,
            self.bits,
            self.sizes,
            self.group_size,
            bias,
        )


def _stored(operands: ops.Operands) -> list[Tensor]:
    """What holds the weights."""
    tensors = (operands.weights, operands.scales, operands.zero_points)
    return [tensor for tensor in tensors if tensor is not None]


class DenseRun(nn.Module):
    """Neighbouring 16-bit shards of a layer: vLLM's own unquantized product, whatever the platform has for it."""

    def __init__(self, shards: list[DenseShard], method: UnquantizedLinearMethod) -> None:
        super().__init__()
        self.rows = sum(shard.rows for shard in shards)
        self.resident_bytes = sum(shard.weight.nbytes for shard in shards)
        self.method = method
        self._process(shards)
        self.storage = (self.weight.data,)

    def _process(self, shards: list[DenseShard]) -> None:
        self.weight = nn.Parameter(torch.cat([shard.weight for shard in shards]), requires_grad=False)
        self.method.process_weights_after_loading(self)

    def replace(self, shards: list[DenseShard]) -> None:
        """Other weights of the same shapes, in the memory of these unless the platform keeps them in its own form."""
        self._process(shards)
        self.storage[0].copy_(self.weight)
        del self.weight  # vLLM puts the storage back in its place

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N of these shards]."""
        return self.method.apply(self, x, bias)


class Checks:
    """What is checked of a layer that stays at 16 bits, put before vLLM's own method for such a layer."""

    is_embedding = False  # the head of a model whose embedding doubles as its head: nothing arrives, nothing is held

    def __init__(self, config: "TaqConfig", specs: list[MatrixSpec]) -> None:
        super().__init__()
        self.config = config
        self.specs = specs
        self.is_planned = any(spec.shape is not None for spec in specs)
        self.missing: set[str] = set()
        self.is_loading = True
        self.is_counted = False

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """vLLM's parameter with a loader that checks first.

        Raises:
            ValueError: the plan does not suit this layer.
        """
        if not self.is_planned:
            super().create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
            return
        self.matrices = matrices_of(layer, self.specs, output_partition_sizes, input_size, input_size_per_partition)
        if not _loads_dummies():
            self.missing.update(spec.name for spec in self.specs)
        load = extra_weight_attrs.pop("weight_loader")

        def check_and_load(param: nn.Parameter, tensor: Tensor, *shard_id: Any) -> None:
            self._load("weight", param, tensor, *shard_id)
            load(param, tensor, *shard_id)

        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=check_and_load,
            **extra_weight_attrs,
        )
        _register_routers(layer, _PACKED_TENSORS, params_dtype, self._load)

    def _load(self, kind: str, param: nn.Parameter, tensor: Tensor, shard_id: str | int | None = None) -> None:
        matrix = _matrix_of(self.matrices, shard_id, kind)
        with _reload_named(param.is_meta):
            matrix.check(kind, tensor)
        if not self.is_loading:  # a reload, which has to bring all of the layer
            self.is_loading, self.missing = True, {spec.name for spec in self.specs}
        self.missing.discard(matrix.spec.name)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that everything was loaded, then vLLM's own preparation.

        Raises:
            ValueError: a planned matrix that no layer has, or one of this layer that the checkpoint does not have.
        """
        self.config.check_all_claimed()
        with _reload_named(self.is_counted):
            if self.missing:
                raise ValueError(
                    f"{sorted(self.missing)[0]}: the checkpoint has no weight. It is incomplete: see `taq verify`, or "
                    "write it again with `taq quantize`."
                )
        self.is_loading = False
        device, resident_bytes = layer.weight.device, 0 if self.is_embedding else layer.weight.nbytes
        super().process_weights_after_loading(layer)
        if hasattr(layer, "weight_packed"):
            for kind in _PACKED_TENSORS:
                delattr(layer, kind)
            if not self.is_counted:
                self.is_counted = True  # a reload changes nothing of the summary
                self.config.layer_loaded(self.specs, resident_bytes, device)


@register_weight_loader_v2_supported_method
class CheckedUnquantizedMethod(Checks, UnquantizedLinearMethod):
    """A layer that stays at 16 bits: vLLM's own method, with the same checks as for the others if it is planned."""


def _loads_dummies() -> bool:
    """Whether no checkpoint is read: `--load-format dummy`."""
    vllm_config = get_current_vllm_config_or_none()
    return vllm_config is not None and vllm_config.load_config.load_format == "dummy"


@contextmanager
def _reload_named(is_reload: bool) -> Iterator[None]:
    """Say in errors of a reload what it has cost: vLLM has taken the old weights apart by then."""
    try:
        yield
    except ValueError as error:
        if not is_reload:
            raise
        raise ValueError(f"{error} This engine has lost its weights by now: start it again.") from error


def _register_routers(
    layer: LinearBase | ParallelLMHead, kinds: Sequence[str], params_dtype: torch.dtype, load: Callable[..., None]
) -> None:
    # vLLM warns where checkpoint and parameter differ in dtype.
    dtypes = {"weight": params_dtype, "weight_scale": params_dtype, "weight_shape": torch.int64}
    for kind in kinds:

        def route(param: Router, tensor: Tensor, shard_id: str | int | None = None, kind: str = kind) -> None:
            load(kind, param, tensor, shard_id)

        empty = torch.empty(0, dtype=dtypes.get(kind, torch.int32))
        layer.register_parameter(kind, Router(data=empty, weight_loader=route))


def _matrix_of(matrices: Sequence[Matrix], shard_id: str | int | None, kind: str) -> Matrix:
    if len(matrices) == 1:
        return matrices[0]
    for matrix in matrices:
        if matrix.shard_id == shard_id:
            return matrix
    names = ", ".join(matrix.spec.name for matrix in matrices)
    raise ValueError(
        f"got {kind!r} of a fused matrix where the checkpoint's config has {names}; the checkpoint's tensors and "
        "its config are not of one model"
    )
