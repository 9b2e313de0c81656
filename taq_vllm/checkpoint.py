"""Model + plan -> a compressed-tensors checkpoint with the plan inside; and the proof that one is whole.

The format is compressed-tensors' `pack-quantized` with one config group per bitwidth, packed by that library, so
transformers loads it without this project and vLLM serves it where its fused layers are uniform. Beside the weights
lie `taq_plan.json` and `manifest.json` (sha256 of every file).

Blocks are quantized one at a time, the head last, some rows at a time. Each block becomes a safetensors file of its
own in a hidden folder beside the output, recorded when it is on disk, and so do the hidden states that leave it; a
killed run continues after the last recorded block and ends with the same bytes. The folder gets its final name only
when everything, the manifest included, is in it. Of several processes (`distributed.py`) each runs its share of the
calibration set, and the first writes.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial as bind
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor, nn

from taq_vllm import __version__, journal, units
from taq_vllm.distributed import first, share, total, world
from taq_vllm.experts import experts_in
from taq_vllm.fitting import Block, method_named, settings_of
from taq_vllm.general_text import GeneralText
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.methods import DEFAULT_EXAMPLES, DEFAULT_METHOD
from taq_vllm.model_files import ModelFiles, read_header, write_tensors
from taq_vllm.plan import BITS_MENU, GROUP_SIZE, PLAN_FILE, MatrixPlan, Plan, TaskRef, write_atomically
from taq_vllm.progress import steps, track
from taq_vllm.quantizer import Quantized
from taq_vllm.scoring import calibration_sequences
from taq_vllm.stream import HIDDEN_LIMIT_BYTES, Batch, StreamedModel, make_batches, matrices_of
from taq_vllm.tasks import Task
from taq_vllm.units import HEAD

MANIFEST_FILE = "manifest.json"

_JOURNAL = "journal.jsonl"
_REQUEST = "request.json"
_STATES = "states"  # hidden states that leave a block, for the run that continues
_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json", PLAN_FILE, MANIFEST_FILE}
_HEADER_ALLOWANCE = 64 * 1024 * 1024  # safetensors headers, tokenizer and configs, for the check of free space
_HEAD_WEIGHTS = 1 << 26  # of the head that are quantized at a time: 268 MB in float32


@dataclass(frozen=True)
class Calibration:
    """How the quantizer's parameters are fitted with the bits fixed.

    Attributes:
        method: a module of `methods/`.
        settings: overrides of the method's own settings.
        examples: calibration examples read by methods that read any.
        max_tokens: of each example.
        batch_size: examples per batch.
        inputs: each block's inputs come from the already `quantized` blocks before it, or from the `full` ones.
        mix_general: share of the examples that is general text.
        general: where that is read.
    """

    method: str = DEFAULT_METHOD
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: int = DEFAULT_EXAMPLES
    max_tokens: int = 512
    batch_size: int = 8
    inputs: Literal["quantized", "full"] = "quantized"
    mix_general: float = 0.0
    general: GeneralText | None = None

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: no such method or setting, a ratio outside 0 to 1, or one without the other.
        """
        settings_of(self.method, self.settings)
        if not 0 <= self.mix_general <= 1:
            raise ValueError(f"got --mix-general {self.mix_general}; it is a share, from 0 to 1")
        if self.mix_general > 0 and self.general is None:
            raise ValueError(f"--mix-general {self.mix_general} needs --general-data FILE")
        if self.mix_general == 0 and self.general is not None:
            raise ValueError("--general-data needs --mix-general RATIO, as 0.25")
        if self.examples < 1:
            raise ValueError(f"got {self.examples} examples; {self.method} needs at least 1")

    @property
    def chains(self) -> int:
        """Sets of hidden states that go from block to block: the full-precision model's own, where a method needs both.

        0 for methods that read no inputs.
        """
        method = method_named(self.method)
        return 0 if not method.READS_INPUTS else 2 if method.READS_OUTPUTS and self.inputs == "quantized" else 1

    def counts(self, task: Task | None) -> tuple[int, int]:
        """Examples of the task and of general text; the share holds where the task has fewer than asked for."""
        general = round(self.examples * self.mix_general)
        wanted = self.examples - general
        available = len(task.calibration) if task else 0
        if available >= wanted:
            return wanted, general
        return available, round(available * self.mix_general / (1 - self.mix_general))


def quantize_model(
    files: ModelFiles,
    plan: Plan,
    output: Path,
    calibration: Calibration,
    task: Task | None = None,
    device: str = "auto",
    hidden_limit_bytes: float = HIDDEN_LIMIT_BYTES,
) -> bool:
    """Write the specialised checkpoint.

    Args:
        files: the full-precision model that the plan was made for.
        plan: bits per matrix.
        output: the new folder.
        calibration: how codes, scales and zero points are found.
        task: on whose inputs they are fitted, by methods that read any.
        device: where blocks run; `auto` is a GPU if there is one.
        hidden_limit_bytes: of hidden states in memory; the rest lies in files beside the output.

    Returns:
        Whether it was written now (False: the same checkpoint was there already).

    Raises:
        ValueError: the plan does not fit the model, the calibration cannot be, or `output` holds something else.
        OSError: no space left; what was written is kept for the same command to continue.
    """
    partial = output.with_name(f".{output.name}.partial")
    model = StreamedModel(files, device, hidden_limit_bytes, partial.absolute().parent)
    made_by, finished = check_request(model, plan, output, calibration, task)
    if finished:
        first(lambda: _remove_leftovers(output))
        return False
    batches = calibration_batches(model, calibration, task)
    needed = disk_bytes(model, plan, calibration, batches)
    with ExitStack() as held:

        def prepare() -> dict[str, str]:
            """Shards that an earlier run has left, by name."""
            _check_free_space(output, needed, partial)
            held.enter_context(_alone_in(partial))
            _keep_only_work_of(partial, made_by)
            return Shards.finished(partial)

        def finish() -> None:
            for file in partial.glob(f"{_STATES}*"):
                file.unlink()
            _write_rest(files, plan, partial, made_by, shards.done)
            _sync_folder(partial)
            os.rename(partial, output)
            _sync_folder(output.parent)
            _remove_leftovers(output)

        try:
            shards = Shards(partial, model.layers + 1, first(prepare))
            if len(shards.done) <= model.layers:
                chains = write_blocks(model, plan, shards, calibration, batches)
                shards.save(model.layers, _outside(model, plan, calibration, batches, chains))
            first(finish)
        except OSError as error:
            if error.errno != errno.ENOSPC or not partial.exists():
                raise
            raise OSError(
                errno.ENOSPC,
                f"no space left while writing {output}; finished blocks are kept in {partial}. "
                "Free some space and run the same command again: it continues",
            ) from error
    return True


def check_request(
    model: StreamedModel, plan: Plan, output: Path, calibration: Calibration, task: Task | None
) -> tuple[dict[str, Any], bool]:
    """Check a request for a checkpoint before anything runs; nothing is changed.

    Arguments and errors are those of `quantize_model`, whose files are here a model that can be walked.

    Returns:
        Everything that the checkpoint's bytes depend on, and whether it is at the output already.
    """
    files = model.files
    calibration.check()
    plan.check_fits(files.ref, files.matrices, files.head)
    plan.check_served("the plan")
    if all(m.bits == 16 for m in plan.matrices.values()):
        raise ValueError(
            "the plan leaves every matrix at 16 bits: there is nothing to quantize; serve the model as it is"
        )
    if method_named(calibration.method).READS_INPUTS and task is None and calibration.mix_general < 1:
        raise ValueError(
            f"method {calibration.method!r} fits on a task's inputs: give --task, or use --method rtn, which reads none"
        )
    if calibration.general is not None and task is not None:
        calibration.general.check_apart(task)
    made_by = _made_by(model, plan, calibration, task)

    def finished() -> bool:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return False
        manifest = _manifest_of(output)
        if manifest.get("made_by") != made_by:
            raise ValueError(f"{output} exists and holds something else: remove it, or choose another output")
        _check_sizes(output, manifest)
        return True

    return made_by, first(finished)


def pack(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """One matrix as compressed-tensors stores it.

    Args:
        name: the matrix.
        quantized: codes [N, K].

    Returns:
        `weight_packed` int32 [N, K * bits / 32], `weight_scale` [N, K / 128], `weight_shape` int64 [2], and for
        asymmetric codes `weight_zero_point` int32 [N * bits / 32, K / 128], by full tensor name.
    """
    offset = 2 ** (quantized.bits - 1)
    codes = (quantized.codes.to(torch.int16) - offset).to(torch.int8)
    tensors = {
        f"{name}.weight_packed": pack_to_int32(codes, quantized.bits),
        f"{name}.weight_scale": quantized.scale,
        f"{name}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not quantized.symmetric:
        zero_point = (quantized.zero_point.to(torch.int16) - offset).to(torch.int8)
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(zero_point, quantized.bits, packed_dim=0)
    return {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}


def unpack(name: str, tensors: Mapping[str, Tensor], entry: MatrixPlan) -> Quantized:
    """The inverse of `pack`."""
    offset = 2 ** (entry.bits - 1)
    rows, columns = entry.shape
    codes = unpack_from_int32(tensors[f"{name}.weight_packed"], entry.bits, torch.Size(entry.shape))
    scale = tensors[f"{name}.weight_scale"]
    if entry.symmetric:
        zero_point = torch.full_like(scale, offset, dtype=torch.uint8)
    else:
        packed = tensors[f"{name}.weight_zero_point"]
        groups = torch.Size((rows, columns // GROUP_SIZE))
        zero_point = (unpack_from_int32(packed, entry.bits, groups, packed_dim=0).to(torch.int16) + offset).to(
            torch.uint8
        )
    return Quantized(
        bits=entry.bits,
        symmetric=entry.symmetric,
        codes=(codes.to(torch.int16) + offset).to(torch.uint8),
        scale=scale,
        zero_point=zero_point,
    )


def expected_tensors(name: str, entry: MatrixPlan, scale_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """safetensors dtype and shape of every tensor that a matrix has on disk."""
    rows, columns = entry.shape
    if entry.is_embedding:
        return {}
    if entry.bits == 16:
        return {f"{name}.weight": (scale_dtype, (rows, columns))}
    per_word = 32 // entry.bits
    groups = columns // GROUP_SIZE
    tensors = {
        f"{name}.weight_packed": ("I32", (rows, -(-columns // per_word))),
        f"{name}.weight_scale": (scale_dtype, (rows, groups)),
        f"{name}.weight_shape": ("I64", (2,)),
    }
    if not entry.symmetric:
        tensors[f"{name}.weight_zero_point"] = ("I32", (-(-rows // per_word), groups))
    return tensors


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The `quantization_config` of config.json: compressed-tensors' own, plus a summary of the plan under `taq`."""

    def targets_of(bits: int, symmetric: bool | None = None) -> list[str]:
        """Matrices by name; experts, of which there are thousands, by one expression per block."""
        found = [n for n, m in plan.matrices.items() if m.bits == bits and symmetric in (None, m.symmetric)]
        experts = {name: units.experts_of(name) for name in found}
        return list(dict.fromkeys(f"re:{re.escape(e)}\\..*" if (e := experts[name]) else name for name in found))

    groups: dict[str, QuantizationScheme] = {}
    for bits in BITS_MENU[:-1]:
        for symmetric in (True, False):
            targets = targets_of(bits, symmetric)
            if targets:
                weights = QuantizationArgs(
                    num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP_SIZE
                )
                groups[f"group_{len(groups)}"] = QuantizationScheme(
                    targets=targets, weights=weights, format="pack-quantized"
                )
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=targets_of(16) + ([] if HEAD in plan.matrices else [HEAD]),
    )
    counts = {str(bits): count for bits, count in plan.counts().items()}
    return config.model_dump(mode="json", exclude_none=True) | {
        "taq": {
            "version": plan.version,
            "plan_file": PLAN_FILE,
            "plan_sha256": plan.sha256(),
            "average_bits": round(plan.budget.average_bits, 4),
            "matrices": counts,
        }
    }


@dataclass(frozen=True)
class Verified:
    """What `verify` found to be in order."""

    path: Path
    plan: Plan
    files: int
    bytes: int


def verify(path: Path) -> Verified:
    """Check that a checkpoint is whole: every file's sha256, and plan, config and tensors against each other.

    Raises:
        ValueError: what is wrong, where, and what to do.
    """
    manifest = _manifest_of(path)
    if not manifest:
        raise ValueError(f"{path} has no {MANIFEST_FILE}: it was not written by `taq quantize`, or not to its end")
    _check_sizes(path, manifest)
    again = _again(path)
    for name, entry in track(manifest["files"].items(), "verify: sha256", len(manifest["files"])):
        if (found := _sha256(path / name)) != entry["sha256"]:
            raise ValueError(
                f"{path / name} changed: its sha256 is {found[:12]}, the manifest says {entry['sha256'][:12]}. {again}"
            )
    stray = [f.name for f in path.glob("*.safetensors") if f.name not in manifest["files"]]
    if stray:
        raise ValueError(f"{path} holds {stray[0]}, which the manifest does not name: remove it. {again}")
    files = ModelFiles(path)
    plan = Plan.load(path / PLAN_FILE)
    check_tensors(files, plan)
    return Verified(path, plan, len(manifest["files"]), sum(e["bytes"] for e in manifest["files"].values()))


def check_tensors(files: ModelFiles, plan: Plan) -> None:
    """Check a checkpoint's config and tensors against its plan, from headers alone.

    Raises:
        ValueError: the first matrix that is not as planned, with what was found.
    """
    found_config = files.config.get("quantization_config", {})
    if found_config.get("taq", {}).get("plan_sha256") != plan.sha256():
        raise ValueError(
            f"{files.path / PLAN_FILE} is not the plan that config.json was written with: "
            "restore the plan, or write the checkpoint again with `taq quantize`"
        )
    if found_config != quantization_config(plan):
        raise ValueError(
            f"quantization_config in {files.path / 'config.json'} does not follow from {PLAN_FILE}; restore it"
        )
    head = plan.matrices.get(HEAD)
    if head is not None and head.tied and head.bits < 16 and files.config.get("tie_word_embeddings", True):
        raise ValueError(
            f"{files.path / 'config.json'} ties the head to the embedding, but the plan gives it {head.bits} bits: "
            "set tie_word_embeddings to false, or write the checkpoint again with `taq quantize`"
        )
    scale_dtype = {"bfloat16": "BF16", "float16": "F16"}[files.config.get("dtype") or files.config["torch_dtype"]]
    for name, entry in plan.matrices.items():
        expected = expected_tensors(name, entry, scale_dtype)
        present = {t: (i.dtype, i.shape) for t, i in files.tensors.items() if t.startswith(f"{name}.weight")}
        if present != expected:
            raise ValueError(
                f"{name} is planned at {entry.bits} bits, so {files.path} should hold {expected}, but it holds "
                f"{present or 'nothing'}: write the checkpoint again with `taq quantize`"
            )


def _made_by(model: StreamedModel, plan: Plan, calibration: Calibration, task: Task | None) -> dict[str, Any]:
    """Everything that the bytes of a checkpoint depend on."""
    files = model.files
    record: dict[str, Any] = {
        "taq_vllm": __version__,
        "base_fingerprint": files.ref.fingerprint,
        "plan_sha256": plan.sha256(),
        "method": calibration.method,
        "settings": settings_of(calibration.method, calibration.settings).model_dump(mode="json"),
        "companions": {file.name: _sha256(file) for file in [files.path / "config.json", *_companions(files)]},
    }
    if method_named(calibration.method).READS_INPUTS:
        examples, general = calibration.counts(task)
        if task is not None and not task.calibration and calibration.mix_general < 1:
            raise ValueError(
                f"{task.path} has no calibration examples: add `calibration: FILE` to it, or use --method rtn"
            )
        if examples + general < world()[1]:
            raise ValueError(f"got {examples + general} examples for {world()[1]} processes; give each at least one")
        # Codes depend on the inputs, and these in their last bits on what computes them.
        record["computed"] = {
            "device": model.device.type,
            "dtype": str(model.compute_dtype),
            "processes": world()[1],
        }
        names = ("examples", "max_tokens", "batch_size", "inputs", "mix_general")
        record["calibration"] = {name: getattr(calibration, name) for name in names}
        if examples:
            assert task is not None
            ref = TaskRef(name=task.name, data_sha256=task.calibration_sha256, examples=examples)
            record["task"] = ref.model_dump()
        if general:
            assert calibration.general is not None
            record["general"] = {"sha256": calibration.general.sha256, "examples": general}
    return record


def _manifest_of(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): write the checkpoint again with `taq quantize`") from error


def _again(path: Path) -> str:
    return f"Remove {path} and write it again with `taq quantize`, or restore the file."


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """Check that every file of the manifest is there with its size."""
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing. {_again(path)}")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{file} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}. {_again(path)}"
            )


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Make the folder and hold it against other runs; the lock goes with the process."""
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing in {partial}: wait for it, or choose another output") from error
        yield
    finally:
        os.close(handle)


def _keep_only_work_of(partial: Path, made_by: dict[str, Any]) -> None:
    """Empty the folder unless an earlier run of the same request left it."""
    request = partial / _REQUEST
    try:
        same = json.loads(request.read_text(encoding="utf-8")) == made_by
    except (OSError, ValueError):  # none, or cut off by a kill
        same = False
    if not same:
        for file in partial.iterdir():
            file.unlink()
        write_atomically(request, json.dumps(made_by))


def _remove_leftovers(output: Path) -> None:
    """The records of the build; a kill after the renaming may have left them."""
    for name in (_JOURNAL, _REQUEST):
        (output / name).unlink(missing_ok=True)


def disk_bytes(model: StreamedModel, plan: Plan, calibration: Calibration, batches: Sequence[Batch]) -> int:
    """Most that lies on the output's disk at once while a checkpoint is made, without headers and small files.

    That is its tensors, the hidden states that are saved, and those beyond the walk's limit of memory; all processes'.
    A chain of saved hidden states takes tokens (padding too) * d * bytes of the walk's dtype. All chains are saved
    before the former ones are removed, so each is there twice.

    Args:
        model: to be quantized.
        plan: bits per matrix.
        calibration: how codes are found.
        batches: of `calibration_batches`.
    """
    token_bytes = model.config.hidden_size * model.compute_dtype.itemsize
    sizes = [batch.input_ids.numel() * token_bytes for batch in batches]
    # Of one chain that takes its own place there are, for a moment, all batches and one of them anew.
    held = sum(sizes) * (2 if calibration.inputs == "full" or calibration.chains > 1 else 1) + max(sizes, default=0)
    saved = sum(sizes) * calibration.chains * 2
    spilled = max(0, held - model.storage.limit_bytes)
    return plan.budget.disk_bytes + int(total(torch.tensor(saved + spilled, dtype=torch.float64)))


def _check_free_space(output: Path, needed: int, partial: Path) -> None:
    written = sum(file.stat().st_size for file in partial.iterdir()) if partial.exists() else 0
    needed += _HEADER_ALLOWANCE - written
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{output} needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
            "free some space, or choose an output on another disk",
        )


class Shards:
    """The safetensors files of a checkpoint in the making: written whole, recorded, found again after a kill.

    Attributes:
        folder: of the files.
        done: sha256 of what is there, by file name.
    """

    def __init__(self, folder: Path, count: int, done: dict[str, str] | None = None) -> None:
        """Continue.

        Args:
            folder: that exists.
            count: of all shards.
            done: what `finished` found.
        """
        self.folder = folder
        self.done = done or {}
        self._count = count

    @staticmethod
    def finished(folder: Path) -> dict[str, str]:
        """sha256 of the files that are recorded and whole, by name."""
        done = {}
        for entry in journal.read(folder / _JOURNAL):
            file = folder / entry["file"]
            if file.is_file() and _sha256(file) == entry["sha256"]:
                done[entry["file"]] = entry["sha256"]
        return done

    def name(self, number: int) -> str:
        """Of a shard's file, the first being 0."""
        return f"model-{number + 1:05d}-of-{self._count:05d}.safetensors"

    def load(self, number: int) -> dict[str, Tensor] | None:
        """The tensors of a shard that is already there."""
        return load_file(self.folder / self.name(number)) if self.name(number) in self.done else None

    def save(self, number: int, tensors: Mapping[str, "Lazy"]) -> None:
        """Write a shard, one tensor in memory at a time, and record it."""
        self.done[self.name(number)] = first(lambda: self._write(self.name(number), tensors))

    def _write(self, name: str, tensors: Mapping[str, "Lazy"]) -> str:
        # Wide types first, as safetensors itself does: each tensor then begins at a multiple of its type's size.
        order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
        announced = {key: (tensors[key].dtype, tensors[key].shape) for key in order}
        digest = write_tensors(self.folder / name, announced, lambda key: tensors[key].read(), {"format": "pt"})
        journal.append(self.folder / _JOURNAL, {"file": name, "sha256": digest})
        return digest


@dataclass(frozen=True)
class Lazy:
    """A tensor of a shard; what stays as it is in the model is read when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Lazy":
        """One that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)


class _States:
    """Hidden states between two blocks, kept beside the shards so that a killed run need not make them again."""

    def __init__(self, model: StreamedModel, folder: Path) -> None:
        self._model = model
        self._folder = folder

    def _file(self, blocks: int, chain: int) -> Path:
        return self._folder / f"{_STATES}-{blocks:05d}-{chain}-{world()[0]}.safetensors"

    def load(self, chains: int) -> tuple[list[HiddenStates], int] | None:
        """What every process has, furthest on: hidden states and the number of blocks that they have been through."""
        files = [[self._file(blocks, chain) for chain in range(chains)] for blocks in range(self._model.layers + 1)]
        here = torch.tensor([all(file.is_file() for file in wanted) for wanted in files], dtype=torch.int32)
        everywhere = (total(here) == world()[1]).nonzero().flatten().tolist()
        if not everywhere:
            return None
        found = [self._model.resume(file) for file in files[everywhere[-1]]]
        return [hidden for hidden, _ in found], everywhere[-1]

    def save(self, chains: list[HiddenStates], blocks: int) -> None:
        """Keep these; those of the block before go when these are whole."""
        for chain, hidden in enumerate(chains):
            hidden.save(self._file(blocks, chain), blocks)
        total(torch.zeros(1))  # all processes have saved theirs
        for chain in range(len(chains)):
            self._file(blocks - 1, chain).unlink(missing_ok=True)


def write_blocks(
    model: StreamedModel, plan: Plan, shards: Shards, calibration: Calibration, batches: Sequence[Batch]
) -> list[HiddenStates]:
    """Write one shard per block, and the hidden states behind it for a run that continues.

    Args:
        model: to be quantized.
        plan: bits per matrix.
        shards: where; blocks that are there are not fitted again.
        calibration: how codes are found.
        batches: of `calibration_batches`.

    Returns:
        The chains of hidden states behind the last block.
    """
    states = _States(model, shards.folder)
    chains, ahead = (states.load(calibration.chains) if calibration.chains else None) or (None, 0)

    def save(layer: int, tensors: Mapping[str, Tensor]) -> None:
        shards.save(layer, {name: Lazy.of(tensor) for name, tensor in tensors.items()})

    return fit_blocks(model, plan, calibration, batches, chains, ahead, shards.load, save, states.save)


def fit_blocks(
    model: StreamedModel,
    plan: Plan,
    calibration: Calibration,
    batches: Sequence[Batch],
    chains: list[HiddenStates] | None = None,
    ahead: int = 0,
    load: Callable[[int], Mapping[str, Tensor] | None] = lambda layer: None,
    save: Callable[[int, Mapping[str, Tensor]], None] = lambda layer, tensors: None,
    save_states: Callable[[list[HiddenStates], int], None] = lambda chains, blocks: None,
) -> list[HiddenStates]:
    """Walk over the blocks and find the codes of each.

    Args:
        model: to be quantized.
        plan: bits per matrix; the head is not looked at.
        calibration: how codes are found.
        batches: of `calibration_batches`.
        chains: hidden states to go on with; the embedding's if not given.
        ahead: number of the blocks behind them, all of which `load` has.
        load: a block's tensors if it need not be fitted; also what other processes than the first go on with when
            the first has saved it.
        save: is given a block's number and its tensors as they go to disk, by full name.
        save_states: is given the chains behind a block, and the number of blocks that they have been through.

    Returns:
        The chains behind the last block; none for methods that read no inputs.
    """
    fit = _fit_of(calibration)
    reads_outputs = method_named(calibration.method).READS_OUTPUTS
    if chains is None:
        chains = [model.embed(batches) for _ in range(calibration.chains)]
    with steps(f"quantize: {calibration.method}", model.layers) as progress:
        for layer in range(model.layers):
            stored = load(layer)
            if stored is not None and (not chains or layer < ahead):
                progress.advance()
                continue
            assert layer >= ahead, "hidden states of a block that is not written"
            prefix = f"model.layers.{layer}."
            with model.block(layer) as module:
                entries = {name: plan.matrices[prefix + name] for name in matrices_of(module)}
                run = bind(model.run, layer, module)
                block = Block(module, entries, bind(model.run_with_gradient, layer), model.dtype, batches)
                after = None
                if chains:
                    _check_weights(prefix, block)
                    if calibration.inputs == "full":
                        after = chains[0].map(run)
                    elif len(chains) > 1:
                        chains[1].replace(run)
                        after = chains[1]
                    target = after if reads_outputs else None
                    block = Block(module, entries, block.apply, model.dtype, batches, chains[0], target)
                if stored is None:
                    tensors = _fitted_tensors(prefix, block, fit)
                    save(layer, tensors)
                    # Of several processes all go on with what the first has saved.
                    stored = tensors if world()[0] == 0 else load(layer)
                    if block.unseen and world()[0] == 0:
                        progress.say(_not_fitted(prefix, block))
                if chains:
                    if calibration.inputs == "full":
                        chains[0] = after
                    else:
                        _put_back(prefix, module, stored, entries)
                        chains[0].replace(run)
                    save_states(chains, layer + 1)
            progress.advance()
    return chains


def _not_fitted(prefix: str, block: Block) -> str:
    experts = experts_in(block.module)
    names = sorted({name.rpartition(".")[0] for name in block.unseen})
    return (
        f"{prefix}mlp.experts: no calibration token is sent to {len(names)} of {len(experts)} experts, which are "
        "rounded to nearest; more --examples, or --mix-general, would reach them"
    )


def _fit_of(calibration: Calibration) -> Callable[[Block], dict[str, Quantized]]:
    settings = settings_of(calibration.method, calibration.settings)
    return bind(method_named(calibration.method).fit_block, settings=settings)


def calibration_batches(model: StreamedModel, calibration: Calibration, task: Task | None) -> list[Batch]:
    """This process's share of the calibration set; empty for methods that read no inputs."""
    if not calibration.chains:
        return []
    return make_batches(_sequences(model, calibration, task), calibration.batch_size, calibration.max_tokens)


def _sequences(model: StreamedModel, calibration: Calibration, task: Task | None) -> list[Any]:
    """This process's share of the calibration set, as tokens."""
    examples, general = calibration.counts(task)
    sequences = calibration_sequences(model, task, examples, "if present") if examples else []
    if general:
        sequences = sequences + calibration.general.sequences(model, general, calibration.max_tokens)
    return share(sequences)


def _check_weights(prefix: str, block: Block) -> None:
    for name, matrix in block.matrices.items():
        if not torch.isfinite(matrix.weight).all():
            raise ValueError(
                f"{prefix}{name}: got weights that are not finite; the checkpoint is damaged or its dtype overflowed"
            )


def _fitted_tensors(prefix: str, block: Block, fit: Callable[[Block], dict[str, Quantized]]) -> dict[str, Tensor]:
    """A block's tensors as they go to disk, by full name."""
    _check_weights(prefix, block)
    try:
        fitted = fit(block) if block.matrices else {}
    except ValueError as error:
        raise ValueError(f"{prefix.removesuffix('.')}: {error}") from error
    tensors = {}
    for name, quantized in fitted.items():
        tensors |= pack(prefix + name, quantized)
    weights = {f"{name}.weight" for name in fitted}
    for name, tensor in block.module.state_dict().items():
        if name not in weights:
            tensors[prefix + name] = tensor.to("cpu", block.dtype).contiguous()
    return tensors


def _put_back(prefix: str, module: nn.Module, stored: Mapping[str, Tensor], entries: Mapping[str, MatrixPlan]) -> None:
    """Give a block the weights that its shard stands for: all of them, a method may have changed any."""
    state = {}
    for name, old in module.state_dict().items():
        matrix = name.removesuffix(".weight")
        if prefix + name in stored:
            new = stored[prefix + name]
        else:
            new = unpack(prefix + matrix, stored, entries[matrix]).dequantize()
        state[name] = new.to(old.device, old.dtype)
    module.load_state_dict(state, assign=True)


class _HeadRows(nn.Module):
    """Some rows of the head behind the final norm: a block of one matrix."""

    def __init__(self, norm: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.lm_head(self.norm(states))


def _outside(
    model: StreamedModel,
    plan: Plan,
    calibration: Calibration,
    batches: Sequence[Batch],
    chains: Sequence[HiddenStates],
) -> dict[str, Lazy]:
    """The tensors of the last shard: everything outside the blocks, the head as planned."""
    files = model.files
    head = plan.matrices.get(HEAD)
    names = [name for name in files.tensors if not name.startswith("model.layers.")]
    tensors: dict[str, Lazy] = {}
    if head is not None and head.bits < 16:
        names = [name for name in names if name != f"{HEAD}.weight"]
        fitted = _head_tensors(model, head, _fit_of(calibration), batches, chains)
        tensors = {name: Lazy.of(tensor) for name, tensor in fitted.items()}
    for name in names:
        shape = files.tensors[name].shape
        tensors[name] = Lazy(model.dtype, shape, lambda name=name: files.read(name).to(model.dtype))
    return tensors


def _head_tensors(
    model: StreamedModel,
    head: MatrixPlan,
    fit: Callable[[Block], dict[str, Quantized]],
    batches: Sequence[Batch],
    chains: Sequence[HiddenStates],
) -> dict[str, Tensor]:
    """The quantized head. Its rows do not depend on each other, so some are fitted at a time."""
    rows, columns = head.shape
    # A multiple of the rows that share a word of packed zero points.
    rows_at_once = max(32, _HEAD_WEIGHTS // columns // 32 * 32)
    parts: list[dict[str, Tensor]] = []
    with model.head() as loaded:
        for start in range(0, rows, rows_at_once):
            weight = loaded.weight[start : start + rows_at_once].to(model.compute_dtype)
            entries = {HEAD: head.model_copy(update={"shape": tuple(weight.shape)})}
            module = _HeadRows(loaded.norm, weight)
            block = Block(module, entries, lambda call, states: call(states), model.dtype, batches, *chains[:1])
            _check_weights("", block)
            parts.append(pack(HEAD, fit(block)[HEAD]))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return tensors | {f"{HEAD}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64)}


def _write_rest(
    files: ModelFiles, plan: Plan, partial: Path, made_by: dict[str, Any], shards: Mapping[str, str]
) -> None:
    """Index, config, tokenizer, plan and manifest; `shards` holds the sha256 of the safetensors files."""
    weight_map, total = {}, 0
    for name in sorted(shards):
        tensors = read_header(partial / name)
        total += sum(info.end - info.start for info in tensors.values())
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(partial / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    dtype = "float16" if (files.config.get("dtype") or files.config.get("torch_dtype")) == "float16" else "bfloat16"
    config = {k: v for k, v in files.config.items() if k != "torch_dtype"}
    config |= {"dtype": dtype, "quantization_config": quantization_config(plan)}
    if HEAD in plan.matrices and plan.matrices[HEAD].bits < 16:
        config["tie_word_embeddings"] = False
    write_atomically(partial / "config.json", json.dumps(config, indent=2) + "\n")
    for file in _companions(files):
        shutil.copyfile(file, partial / file.name)
    plan.save(partial / PLAN_FILE)
    content = sorted(file for file in partial.iterdir() if file.name not in (_JOURNAL, _REQUEST, MANIFEST_FILE))
    manifest = {
        "version": 1,
        "made_by": made_by,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": shards.get(file.name) or _sha256(file)}
            for file in content
        },
    }
    write_atomically(partial / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _companions(files: ModelFiles) -> list[Path]:
    """Files of the base model that are copied: tokenizer, chat template, generation settings."""
    return [
        file
        for file in sorted(files.path.iterdir())
        if file.is_file() and file.suffix in _COPIED_SUFFIXES and file.name not in _NOT_COPIED
    ]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
