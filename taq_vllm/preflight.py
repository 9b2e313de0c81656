"""What scoring or quantizing a model will take, before it begins: bytes to read, memory, disk and time.

The asked run is really made, with all its settings and all its calibration examples, on the model's first two blocks.
What a block costs is measured there and carried to the whole model:

    time   = (loading and running blocks) * runs of all blocks / runs of two + (everything else) * blocks / two
    memory = what the process held before, a block, hidden states, and what else the two blocks took at their peak

How often block l runs is a + b (l + 1): b is 0 for one pass over the model, and the number of perturbed units where
each costs a pass over the blocks behind it. Nothing of the sample is kept. Bytes to read are those of the tensors as
they are stored. Of several processes (`distributed.py`) each runs its share of the examples: memory and reading are
those of one of them, disk is what all need together.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taq_vllm import checkpoint, model_files, scoring, stream
from taq_vllm.checkpoint import Calibration
from taq_vllm.distributed import device_of, first, share, total, world
from taq_vllm.model_files import ModelFiles, TensorInfo
from taq_vllm.plan import Plan
from taq_vllm.progress import duration, gigabytes
from taq_vllm.stream import HIDDEN_LIMIT_BYTES, StreamedModel
from taq_vllm.tasks import Task
from taq_vllm.units import HEAD, Granularity, layer_of, units_of

_SAMPLED = 2


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        read_bytes: of the model, read in the course of the run; each reading of a block counts.
        memory_bytes: of the process at its peak, by what holds it.
        device_bytes: of the GPU's memory at its peak; 0 on a CPU.
        disk_bytes: written and there at once on the output's disk: the result, and what the run keeps to continue or,
            without a disk of their own for them, to spill.
        free_bytes: on the output's disk.
        spill_bytes: of hidden states on another disk, the spill folder's.
        spill_free_bytes: on that disk.
        seconds: from start to end.
        sampled_blocks: blocks that were run to know.
        sampled_seconds: that they took.
        block_runs: how often blocks run, all calibration examples each time.
    """

    read_bytes: int
    memory_bytes: dict[str, int]
    device_bytes: int
    disk_bytes: int
    free_bytes: int
    spill_bytes: int
    spill_free_bytes: int
    seconds: float
    sampled_blocks: int
    sampled_seconds: float
    block_runs: int

    @property
    def peak_memory_bytes(self) -> int:
        """All of `memory_bytes`."""
        return sum(self.memory_bytes.values())

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"peak_memory_bytes": self.peak_memory_bytes}

    def lines(self) -> list[str]:
        """For a person."""
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.memory_bytes.items())
        gpu = f"; GPU memory {gigabytes(self.device_bytes)}" if self.device_bytes else ""
        disks = [_disk("disk", self.disk_bytes, self.free_bytes, "output")]
        if self.spill_bytes:
            disks.append(_disk("spill folder's disk", self.spill_bytes, self.spill_free_bytes, "spill folder"))
        return [
            f"reads {gigabytes(self.read_bytes)} of weights ({self.block_runs} block runs)",
            f"peak memory about {gigabytes(self.peak_memory_bytes)} ({parts}){gpu}",
            *disks,
            f"time about {duration(self.seconds)}, from {self.sampled_blocks} blocks in "
            f"{duration(self.sampled_seconds)}",
        ]


def score_estimate(
    files: ModelFiles,
    task: Task | None,
    scorer: str,
    output: Path,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    granularity: Granularity | None = None,
    head: bool = False,
    hidden_limit_bytes: float = HIDDEN_LIMIT_BYTES,
    spill_folder: Path | None = None,
    force: bool = False,
) -> Estimate:
    """What `scoring.score` will take with the same arguments, finished work not counted.

    Raises:
        ValueError: what it would refuse.
    """
    request = scoring.check_request(files, task, scorer, output, settings, force, granularity, head)
    with _folder_beside(output) as folder:
        started = time.monotonic()
        before = _reset_peak()
        model = None
        sequences = []
        spill_folder = spill_folder or folder
        if request.task is not None:
            model = _TwoBlocks(files, device, hidden_limit_bytes, spill_folder)
            sequences = scoring.calibration_sequences(model, request.task, request.examples, request.reads == "answers")
        units = units_of([*files.matrices, *(files.head if head else ())], request.granularity)
        few = {name: matrices for name, matrices in units.items() if name == HEAD or layer_of(name) < _SAMPLED}
        on = str(model.device) if model else device_of(device)
        share_here = share(sequences)
        run = scoring.Run(files, on, model, request.task, share_here, request.granularity, few, folder / "journal")
        request.module.score_units(run, request.settings)
        seconds = time.monotonic() - started
        total(torch.zeros(1))  # all processes have written what they keep
        kept = _bytes_in(folder)
        if model is None:
            whole = files.layers / min(_SAMPLED, files.layers)
            names = {name for matrices in units.values() for name in matrices}
            weights = sum(_stored_bytes(_matrix(files, name)) for name in names)
            memory = {"libraries": before, "work": max(0, scoring.peak_memory_bytes() - before)}
            free = shutil.disk_usage(folder).free
            return Estimate(weights, memory, 0, 0, free, 0, 0, seconds * whole, _SAMPLED, seconds, 0)
        more_sets = files.layers - model.layers if getattr(request.module, "KEEPS_ALL_HIDDEN_STATES", False) else 0
        return model.estimate(before, started, seconds, kept, folder, spill_folder, more_sets)


def quantize_estimate(
    files: ModelFiles,
    plan: Plan,
    output: Path,
    calibration: Calibration,
    task: Task | None = None,
    device: str = "auto",
    hidden_limit_bytes: float = HIDDEN_LIMIT_BYTES,
) -> Estimate:
    """What `checkpoint.quantize_model` will take with the same arguments, finished work not counted.

    Raises:
        ValueError: what it would refuse.
    """
    checkpoint.check_request(StreamedModel(files, device), plan, output, calibration, task)
    with _folder_beside(output) as folder:
        started = time.monotonic()
        before = _reset_peak()
        model = _TwoBlocks(files, device, hidden_limit_bytes, folder)
        # The last shard, of what is outside the blocks, is not sampled: it is copied, and counted as bytes alone.
        batches = checkpoint.calibration_batches(model, calibration, task)
        shards = checkpoint.Shards(folder, model.layers + 1)
        checkpoint.write_blocks(model, plan, shards, calibration, batches)
        seconds = time.monotonic() - started
        estimate = model.estimate(before, started, seconds, 0, folder, folder, 0)
        outside = [info for name, info in files.tensors.items() if not name.startswith("model.layers.")]
        return replace(
            estimate,
            read_bytes=estimate.read_bytes + sum(map(_stored_bytes, outside)),
            disk_bytes=checkpoint.disk_bytes(model, plan, calibration, batches),
        )


class _TwoBlocks(StreamedModel):
    """The first two blocks of a model, with a clock."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ready = time.monotonic()
        self._blocks_s = 0.0
        self._runs = [0] * self.layers
        self._loads = [0] * self.layers
        self._heads = 0
        self._set_bytes = 0
        self._row_bytes = 0
        self._rows_read = 0
        self._batches = 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def layers(self) -> int:
        """No more than are sampled."""
        return min(_SAMPLED, super().layers)

    def embed(self, batches: Any) -> Any:
        """Timed: what comes before is done once."""
        hidden = super().embed(batches)
        self._batches = max(1, len(batches))
        self._set_bytes = sum(states.nbytes for states in hidden)
        rows = [len(batch.input_ids.unique()) for batch in batches]
        table = self.files.info(stream._EMBEDDING)
        row_bytes = _stored_bytes(table) // table.shape[0]
        self._row_bytes = max(rows, default=0) * row_bytes
        self._rows_read += sum(rows) * row_bytes
        self._ready = time.monotonic()
        return hidden

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """Timed and counted."""
        started = time.monotonic()
        with super().block(layer) as block:
            self._blocks_s += time.monotonic() - started
            self._loads[layer] += 1
            yield block

    @contextmanager
    def head(self) -> Iterator[Any]:
        """Counted."""
        self._heads += 1
        with super().head() as head:
            yield head

    def run_with_gradient(self, layer: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Timed and counted."""
        started = time.monotonic()
        try:
            return super().run_with_gradient(layer, block, hidden)
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._blocks_s += time.monotonic() - started
            self._runs[layer] += 1

    def estimate(
        self, before: int, started: float, seconds: float, kept: int, folder: Path, spill_folder: Path, more_sets: int
    ) -> Estimate:
        """From what was counted.

        Args:
            before: bytes that the process held before the sample.
            started: when the sample began.
            seconds: that it took.
            kept: bytes on disk when it ended.
            folder: on the output's disk.
            spill_folder: where hidden states lie that memory does not hold.
            more_sets: sets of hidden states that the whole model holds beyond the sample's.
        """
        layers = self.files.layers
        runs = _over_all(self._runs, layers)
        share = runs / max(1, sum(self._runs)) if any(self._runs) else layers / self.layers
        fixed = self._ready - started
        others = max(0.0, seconds - fixed - self._blocks_s)
        blocks = [self._tensors_of(layer) for layer in range(self.layers)]
        block_bytes = max(sum(math.prod(info.shape) for info in infos) for infos in blocks)
        block_bytes *= self.compute_dtype.itemsize
        # One tensor at a time is there twice: as it is stored, and as it is computed with.
        converted = [i for infos in blocks for i in infos if model_files._torch_dtype(i.dtype) != self.compute_dtype]
        most = self.storage.most_bytes + more_sets * self._set_bytes
        hidden = int(min(most, self.storage.limit_bytes))
        sampled_hidden = int(min(self.storage.most_bytes, self.storage.limit_bytes))
        on_cpu = {
            "embedding rows": self._row_bytes,
            "a block": block_bytes + max(map(_stored_bytes, converted), default=0),
            "hidden states": sampled_hidden,
        }
        work = scoring.peak_memory_bytes() - before
        memory = {"libraries": before}
        device_bytes = 0
        if self.device.type == "cuda":
            device_bytes = torch.cuda.max_memory_allocated(self.device) + hidden - sampled_hidden
        else:
            memory |= on_cpu | {"hidden states": hidden}
            work -= sum(on_cpu.values())
        memory["work"] = max(0, work)
        head_bytes = _stored_bytes(_matrix(self.files, HEAD)) if self._heads else 0
        weights = sum(_stored_bytes(info) for infos in blocks for info in infos) / self.layers
        # All processes spill to one disk.
        spilled = int(total(torch.tensor(max(0, int(most) - hidden))))
        elsewhere = os.stat(spill_folder).st_dev != os.stat(folder).st_dev
        return Estimate(
            read_bytes=int(_over_all(self._loads, layers) * weights)
            + int(self._heads * layers / self.layers) * head_bytes
            + self._rows_read,
            memory_bytes=memory,
            device_bytes=device_bytes,
            disk_bytes=kept + (0 if elsewhere else spilled),
            free_bytes=shutil.disk_usage(folder).free,
            spill_bytes=spilled if elsewhere else 0,
            spill_free_bytes=shutil.disk_usage(spill_folder).free if elsewhere else 0,
            seconds=fixed + self._blocks_s * share + others * layers / self.layers,
            sampled_blocks=self.layers,
            sampled_seconds=seconds,
            block_runs=round(runs / self._batches),
        )

    def _tensors_of(self, layer: int) -> list[TensorInfo]:
        prefix = f"model.layers.{layer}."
        return [info for name, info in self.files.tensors.items() if name.startswith(prefix)]


def _over_all(counts: list[int], layers: int) -> int:
    """Sum over all layers of a + b (l + 1), from its values at the first two."""
    if len(counts) < 2:
        return sum(counts)
    slope = counts[1] - counts[0]
    start = counts[0] - slope
    return start * layers + slope * layers * (layers + 1) // 2


def _stored_bytes(info: TensorInfo) -> int:
    return info.end - info.start


def _matrix(files: ModelFiles, name: str) -> TensorInfo:
    """Of a matrix, or of the head under its name: a tied one is the embedding."""
    return files.info(stream._EMBEDDING if name == HEAD and files.tied else f"{name}.weight")


@contextmanager
def _folder_beside(output: Path) -> Iterator[Path]:
    """One for all processes, removed when they have left it."""

    def make() -> str:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.dry-run-")

    folder = Path(first(make))
    try:
        yield folder
        total(torch.zeros(1))  # none reads in it any more
    finally:
        if world()[0] == 0:
            shutil.rmtree(folder)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _reset_peak() -> int:
    """Let the process's peak memory begin anew; what it holds now.

    Where the system does not allow it this is the peak since the start, and what the sample adds to it is less.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return scoring.peak_memory_bytes()


def _disk(name: str, needed: int, free: int, choice: str) -> str:
    enough = "" if needed <= free else f": NOT ENOUGH, free some space or choose another {choice}"
    return f"{name} {gigabytes(needed)}, {gigabytes(free)} free{enough}"
