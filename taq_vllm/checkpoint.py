"""Model + plan -> a compressed-tensors checkpoint with the plan inside; and the proof that one is whole.

The format is compressed-tensors' `pack-quantized` with one config group per bitwidth, packed by that library, so
transformers loads it without this project and vLLM serves it where its fused layers are uniform. Beside the weights
lie `taq_plan.json` and `manifest.json` (sha256 of every file).

Blocks are quantized one at a time. Each becomes a safetensors file of its own in a hidden folder beside the output,
recorded when it is on disk; a killed run continues after the last recorded block and ends with the same bytes. The
folder gets its final name only when everything, the manifest included, is in it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from taq_vllm import __version__
from taq_vllm.hidden_states import HiddenStates
from taq_vllm.model_files import ModelFiles, read_header
from taq_vllm.plan import BITS_MENU, GROUP_SIZE, PLAN_FILE, MatrixPlan, Plan, TaskRef, write_atomically
from taq_vllm.progress import track
from taq_vllm.quantizer import Method, Quantized, quantize, search_clip
from taq_vllm.scoring import calibration_sequences
from taq_vllm.stream import Batch, StreamedModel, make_batches, matrices_of, replace_weight
from taq_vllm.tasks import Task

MANIFEST_FILE = "manifest.json"

_JOURNAL = "journal.jsonl"
_REQUEST = "request.json"
_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json", PLAN_FILE, MANIFEST_FILE}
_HEADER_ALLOWANCE = 64 * 1024 * 1024  # safetensors headers, tokenizer and configs, for the check of free space


@dataclass(frozen=True)
class Calibration:
    """How the quantizer's parameters are fitted with the bits fixed.

    Attributes:
        method: `rtn` reads no data; `clip` searches ranges on the task's inputs.
        examples: calibration examples read by `clip`.
        max_tokens: of each example.
        batch_size: examples per batch.
        inputs: each block's inputs come from the already `quantized` blocks before it, or from the `full` ones.
    """

    method: Method = "clip"
    examples: int = 128
    max_tokens: int = 512
    batch_size: int = 8
    inputs: Literal["quantized", "full"] = "quantized"


def quantize_model(
    files: ModelFiles,
    plan: Plan,
    output: Path,
    calibration: Calibration,
    task: Task | None = None,
    device: str = "cpu",
) -> bool:
    """Write the specialised checkpoint.

    Args:
        files: the full-precision model that the plan was made for.
        plan: bits per matrix.
        output: the new folder.
        calibration: how scales and ranges are found.
        task: whose inputs `clip` fits; needed by it.
        device: where blocks run.

    Returns:
        Whether it was written now (False: the same checkpoint was there already).

    Raises:
        ValueError: the plan does not fit the model, or `output` holds something else.
        OSError: no space left; what was written is kept for the same command to continue.
    """
    files.check_plannable()
    plan.check_fits(files.ref, files.matrices, files.head)
    plan.check_served("the plan")
    if all(m.bits == 16 for m in plan.matrices.values()):
        raise ValueError(
            "the plan leaves every matrix at 16 bits: there is nothing to quantize; serve the model as it is"
        )
    if calibration.method == "clip" and task is None:
        raise ValueError("method 'clip' fits ranges on a task's inputs: give --task, or use --method rtn")
    made_by = _made_by(files, plan, calibration, task, device)
    if output.is_dir() and any(output.iterdir()):
        manifest = _manifest_of(output)
        if manifest.get("made_by") != made_by:
            raise ValueError(f"{output} exists and holds something else: remove it, or choose another output")
        _check_sizes(output, manifest)
        _remove_leftovers(output)
        return False
    partial = output.with_name(f".{output.name}.partial")
    _check_free_space(output, plan, partial)
    try:
        with _alone_in(partial):
            _keep_only_work_of(partial, made_by)
            shards = _write_blocks(files, plan, partial, calibration, task, device)
            _write_rest(files, plan, partial, made_by, shards)
            _sync_folder(partial)
            os.rename(partial, output)
            _sync_folder(output.parent)
            _remove_leftovers(output)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"no space left while writing {output}; finished blocks are kept in {partial}. "
            "Free some space and run the same command again: it continues",
        ) from error
    return True


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
    groups: dict[str, QuantizationScheme] = {}
    for bits in BITS_MENU[:-1]:
        for symmetric in (True, False):
            targets = [n for n, m in plan.matrices.items() if m.bits == bits and m.symmetric == symmetric]
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
        ignore=[n for n, m in plan.matrices.items() if m.bits == 16] + ["lm_head"],
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
    scale_dtype = {"bfloat16": "BF16", "float16": "F16"}[files.config.get("dtype") or files.config["torch_dtype"]]
    for name, entry in plan.matrices.items():
        expected = expected_tensors(name, entry, scale_dtype)
        present = {t: (i.dtype, i.shape) for t, i in files.tensors.items() if t.startswith(f"{name}.weight")}
        if present != expected:
            raise ValueError(
                f"{name} is planned at {entry.bits} bits, so {files.path} should hold {expected}, but it holds "
                f"{present or 'nothing'}: write the checkpoint again with `taq quantize`"
            )


def _made_by(files: ModelFiles, plan: Plan, calibration: Calibration, task: Task | None, device: str) -> dict[str, Any]:
    """Everything that the bytes of a checkpoint depend on."""
    record: dict[str, Any] = {
        "taq_vllm": __version__,
        "base_fingerprint": files.ref.fingerprint,
        "plan_sha256": plan.sha256(),
        "method": calibration.method,
        "companions": {file.name: _sha256(file) for file in [files.path / "config.json", *_companions(files)]},
    }
    if calibration.method == "clip":
        assert task is not None
        if not task.calibration:
            raise ValueError(
                f"{task.path} has no calibration examples: add `calibration: FILE` to it, or use --method rtn"
            )
        examples = min(calibration.examples, len(task.calibration))
        ref = TaskRef(name=task.name, data_sha256=task.calibration_sha256, examples=examples)
        # Ranges depend on the inputs, and these in their last bits on what computes them.
        computed = {"device": torch.device(device).type, "dtype": str(StreamedModel(files, device).compute_dtype)}
        record |= {"calibration": asdict(calibration), "task": ref.model_dump(), "computed": computed}
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


def _check_free_space(output: Path, plan: Plan, partial: Path) -> None:
    written = sum(file.stat().st_size for file in partial.iterdir()) if partial.exists() else 0
    needed = plan.budget.disk_bytes + _HEADER_ALLOWANCE - written
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{output} needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
            "free some space, or choose an output on another disk",
        )


class _Shards:
    """The safetensors files of a checkpoint in the making: written whole, recorded, found again after a kill."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count
        self._journal = folder / _JOURNAL
        self.done: dict[str, str] = {}
        if self._journal.is_file():
            for line in self._journal.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut off by a killed run: that block is written again
                file = folder / entry["file"]
                if file.is_file() and _sha256(file) == entry["sha256"]:
                    self.done[entry["file"]] = entry["sha256"]

    def name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._count:05d}.safetensors"

    def load(self, number: int) -> dict[str, Tensor] | None:
        """The tensors of a shard that is already there."""
        return load_file(self._folder / self.name(number)) if self.name(number) in self.done else None

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        file = self._folder / self.name(number)
        content = serialize({name: tensors[name] for name in sorted(tensors)}, metadata={"format": "pt"})
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        self.done[file.name] = hashlib.sha256(content).hexdigest()
        with self._journal.open("a", encoding="utf-8") as stream:
            # The leading newline ends a line that a killed run may have left open.
            stream.write("\n" + json.dumps({"file": file.name, "sha256": self.done[file.name]}) + "\n")


def _write_blocks(
    files: ModelFiles, plan: Plan, partial: Path, calibration: Calibration, task: Task | None, device: str
) -> dict[str, str]:
    """One shard per block, then one for everything outside the blocks; their sha256 by file name."""
    model = StreamedModel(files, device)
    shards = _Shards(partial, model.layers + 1)
    batches: list[Batch] = []
    hidden = HiddenStates([])
    if calibration.method == "clip":
        sequences = calibration_sequences(model, task, calibration.examples, with_completion=True)
        batches = make_batches(sequences, calibration.batch_size, calibration.max_tokens)
        hidden = model.embed(batches)
    for layer in track(range(model.layers), f"quantize: {calibration.method}", model.layers):
        tensors = shards.load(layer)
        if tensors is not None and not batches:
            continue
        with model.block(layer) as block:
            prefix = f"model.layers.{layer}."
            entries = {name: plan.matrices[prefix + name] for name in matrices_of(block)}
            if calibration.inputs == "full":
                after = hidden.map(lambda states, layer=layer, block=block: model.run(layer, block, states))
            if tensors is None:
                importance = _input_energy(model, layer, block, batches, hidden) if batches else {}
                tensors = _quantize_block(prefix, block, entries, importance, model.dtype)
                shards.save(layer, tensors)
            if batches and calibration.inputs == "quantized":
                for name, module in matrices_of(block).items():
                    if entries[name].bits < 16:
                        replace_weight(module, unpack(prefix + name, tensors, entries[name]).dequantize())
                after = hidden.map(lambda states, layer=layer, block=block: model.run(layer, block, states))
            if batches:
                hidden = after
    if shards.name(model.layers) not in shards.done:
        outside = [name for name in files.tensors if not name.startswith("model.layers.")]
        shards.save(model.layers, {name: files.read(name).to(model.dtype) for name in outside})
    return shards.done


def _input_energy(
    model: StreamedModel, layer: int, block: torch.nn.Module, batches: Sequence[Batch], hidden: HiddenStates
) -> dict[str, Tensor]:
    """E[x_k^2] over the real tokens for every matrix's inputs: [K] float64 by the matrix's name in the block."""
    sums: dict[str, Tensor] = {}
    is_token: Tensor | None = None
    tokens = 0

    def observe(name: str, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        energy = inputs[0][is_token].float().square().sum(0).double()
        sums[name] = sums[name] + energy if name in sums else energy

    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: observe(name, module, inputs))
        for name, module in matrices_of(block).items()
    ]
    try:
        for batch, states in zip(batches, hidden, strict=True):
            is_token = batch.is_token.to(states.device)
            tokens += int(is_token.sum())
            model.run(layer, block, states)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def _quantize_block(
    prefix: str,
    block: torch.nn.Module,
    entries: Mapping[str, MatrixPlan],
    importance: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A block's tensors as they go to disk, by full name; `dtype` is the checkpoint's."""
    tensors = {prefix + name: tensor.to("cpu", dtype).contiguous() for name, tensor in block.state_dict().items()}
    for name, module in matrices_of(block).items():
        entry = entries[name]
        if entry.bits == 16:
            continue
        weight = tensors.pop(f"{prefix}{name}.weight").to(module.weight.device)
        try:
            if importance:
                quantized = search_clip(weight, entry.bits, entry.symmetric, importance[name])
            else:
                quantized = quantize(weight, entry.bits, entry.symmetric)
        except ValueError as error:
            raise ValueError(f"{prefix}{name}: {error}") from error
        tensors |= pack(prefix + name, quantized)
    return tensors


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
