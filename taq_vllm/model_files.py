"""What lies in a model's folder, read from headers alone: tensors, shapes, the matrices that can be planned.

Every step starts here: sizes, names and fingerprints come from `config.json` and the headers of the safetensors
files, without torch and without loading a weight. A file that is missing or cut short is found here, before
anything runs. Single tensors, or rows of one, are read on demand into memory of their own: pages of a mapped file would
count as this process's for as long as the system likes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from taq_vllm.plan import ModelRef, Shape
from taq_vllm.units import HEAD, layer_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
_ROUTER = ".mlp.gate.weight"  # of a mixture of experts: small, and a wrong expert is worse than a rounded one

_FINGERPRINT_SAMPLE = 256  # bytes of each tensor: tells a fine-tuned model from its base, which headers cannot
_BYTES_PER_PARAMETER = 2
_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1} | {
    f"{kind}{bits}": bits // 8
    for kind, widths in {"I": (16, 32, 64), "U": (16, 32, 64), "F": (16, 32, 64), "BF": (16,)}.items()
    for bits in widths
}

_TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte of the data in the file."""
    end: int

    def read(self, stream: BinaryIO) -> "Tensor":
        """The tensor, from its opened file.

        Raises:
            ValueError: the file is shorter than its header says.
        """
        return read_tensor(stream, self.start, self.shape, _torch_dtype(self.dtype))


class ModelFiles:
    """A model folder with `config.json` and safetensors files.

    Attributes:
        path: the folder.
        id: the hub id, or the name of the local folder.
        config: the content of config.json.
        tensors: every tensor by name.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        """Read the headers of a local folder, or of a hub model, which is downloaded first.

        Raises:
            ValueError: no such model, no config.json, or a safetensors file that is missing or damaged.
        """
        self.revision = revision
        self.path = _local_folder(str(model), revision)
        # A folder goes by its name: plans travel, and the paths of the machine that made them mean nothing elsewhere.
        self.id = self.path.resolve().name if Path(model).is_dir() else str(model)
        config_file = self.path / "config.json"
        if not config_file.is_file():
            raise ValueError(f"no config.json in {self.path}: give the folder of a Hugging Face model")
        try:
            self.config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{config_file} is not JSON ({error}); restore it from the model's source") from error
        self.tensors: Mapping[str, TensorInfo] = _read_headers(self.path)

    def check_plannable(self) -> None:
        """Refuse what this project cannot plan, by name.

        Raises:
            ValueError: an architecture outside `ARCHITECTURES`, capped logits, or a checkpoint that is already
                quantized.
        """
        architectures = self.config.get("architectures") or ["(none named)"]
        if architectures[0] not in ARCHITECTURES:
            raise ValueError(
                f"{self.id} is a {architectures[0]}; supported are {', '.join(ARCHITECTURES)}. "
                "Other architectures can be served by vLLM without a plan."
            )
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if self.config.get(name):
                raise ValueError(
                    f"{self.id} has {name} {self.config[name]}, which is not supported; vLLM serves it without a plan"
                )
        if "quantization_config" in self.config:
            method = self.config["quantization_config"].get("quant_method", "an unnamed method")
            raise ValueError(
                f"{self.id} is already quantized ({method}); scores and plans are made from the 16-bit model"
            )
        if not self.matrices:
            raise ValueError(f"{self.id} has no weight matrices inside transformer blocks ({self.path})")

    @cached_property
    def matrices(self) -> dict[str, Shape]:
        """(N, K) of every weight matrix inside a transformer block but routers, in layer order, by name."""
        names = [
            name.removesuffix(".weight")
            for name, info in self.tensors.items()
            if name.startswith("model.layers.")
            and name.endswith(".weight")
            and not name.endswith(_ROUTER)
            and len(info.shape) == 2
        ]
        order = {name: place for place, name in enumerate(names)}
        names.sort(key=lambda name: (layer_of(name), order[name]))
        return {name: self.tensors[f"{name}.weight"].shape for name in names}

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding doubles as the head."""
        return f"{HEAD}.weight" not in self.tensors

    @cached_property
    def head(self) -> dict[str, Shape]:
        """(V, d) of the head under its name, `lm_head`; a tied one has the embedding's."""
        source = "model.embed_tokens.weight" if self.tied else f"{HEAD}.weight"
        return {HEAD: self.tensors[source].shape} if source in self.tensors else {}

    @cached_property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return 1 + max(layer_of(name) for name in self.matrices)

    def bytes_beside(self, planned: Iterable[str]) -> int:
        """Bytes of everything but the named matrices, in 16 bits: embeddings, norms, biases, a head not planned."""
        planned = {f"{name}.weight" for name in planned}
        others = [info for name, info in self.tensors.items() if name not in planned]
        return sum(math.prod(info.shape) for info in others) * _BYTES_PER_PARAMETER

    @cached_property
    def ref(self) -> ModelRef:
        """Identity of the model: its tensors' names, shapes, dtypes and the first bytes of each."""
        digest = hashlib.sha256()
        by_file: dict[Path, list[str]] = {}
        for name, info in self.tensors.items():
            by_file.setdefault(info.file, []).append(name)
        samples: dict[str, bytes] = {}
        for file, names in by_file.items():
            with file.open("rb") as stream:
                for name in names:
                    info = self.tensors[name]
                    stream.seek(info.start)
                    samples[name] = stream.read(min(_FINGERPRINT_SAMPLE, info.end - info.start))
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            digest.update(samples[name])
        return ModelRef(id=self.id, revision=self.revision, fingerprint=digest.hexdigest())

    def read(self, name: str) -> "Tensor":
        """One tensor, on the CPU, in the dtype it is stored in.

        Raises:
            ValueError: the model has no such tensor, or its file is damaged.
        """
        info = self.info(name)
        with info.file.open("rb", buffering=0) as stream:
            return info.read(stream)

    def read_rows(self, name: str, rows: Sequence[int]) -> "Tensor":
        """Some rows of a matrix, [len(rows), K], on the CPU, in the dtype it is stored in; nothing else is read.

        Raises:
            ValueError: the model has no such tensor, no such row, or its file is damaged.
        """
        import torch

        info = self.info(name)
        count, *row_shape = info.shape
        dtype = _torch_dtype(info.dtype)
        if rows and not 0 <= min(rows) <= max(rows) < count:
            raise ValueError(f"{name} has {count} rows, got row {max(rows)} (and {min(rows)}): tokens of another model")
        row_bytes = math.prod(row_shape) * dtype.itemsize
        found = torch.empty(len(rows), *row_shape, dtype=dtype)
        content = memoryview(found.view(-1).view(torch.uint8).numpy()) if len(rows) else memoryview(b"")
        with info.file.open("rb", buffering=0) as stream:
            for place, row in enumerate(rows):
                _read_into(stream, info.start + row * row_bytes, content[place * row_bytes : (place + 1) * row_bytes])
        return found

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies.

        Raises:
            ValueError: the model has no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name}; restore the checkpoint from its source")
        return self.tensors[name]


def read_tensor(stream: BinaryIO, start: int, shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
    """A tensor from the bytes of an opened, unbuffered file.

    Args:
        stream: its position does not matter.
        start: first byte.
        shape: of the tensor.
        dtype: of the tensor.

    Raises:
        ValueError: the file ends before the tensor does.
    """
    import torch

    size = math.prod(shape) * dtype.itemsize
    content = torch.empty(size, dtype=torch.uint8)
    _read_into(stream, start, memoryview(content.numpy()))
    return content.view(dtype).view(tuple(shape))


def _read_into(stream: BinaryIO, start: int, content: memoryview) -> None:
    done = 0
    while done < len(content):  # one call reads at most 2 GiB
        count = os.preadv(stream.fileno(), [content[done:]], start + done)
        if count == 0:
            raise ValueError(f"{stream.name} is cut short: restore it from its source")
        done += count


def write_tensors(
    file: Path,
    tensors: "Mapping[str, tuple[torch.dtype, Sequence[int]]]",
    read: "Callable[[str], Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file with one tensor in memory at a time, and wait until it is on the disk.

    Args:
        file: written under this name from the start; rename it afterwards if it must appear whole.
        tensors: dtype and shape by name, in the file's order.
        read: gives a tensor, contiguous and on the CPU.
        metadata: of the header.

    Returns:
        The file's sha256.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _safetensors_dtype(dtype), "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that data begin at a multiple of 8
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def write(content: bytes | memoryview) -> None:
            digest.update(content)
            stream.write(content)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name, (dtype, shape) in tensors.items():
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), f"{name} is not as announced"
            if tensor.numel():
                write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    return getattr(torch, _TORCH_DTYPES[name])


def _safetensors_dtype(dtype: "torch.dtype") -> str:
    name = str(dtype).removeprefix("torch.")
    return next(key for key, value in _TORCH_DTYPES.items() if value == name)


def _local_folder(model: str, revision: str | None) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
            )
        )
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"no model at {model}: it is not a folder, and it could not be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of safetensors files: restore it from its source") from error
    else:
        names = ["model.safetensors"]
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors.update(read_header(folder / name))
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file: 8 bytes of header length, JSON, then the data.

    Raises:
        ValueError: the file is missing, cut short, or has a damaged header.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: restore it from the model's source, or write the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is cut short inside its header ({size} bytes): restore it from its source")
        content = stream.read(length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        tensors = {name: _tensor_info(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a damaged header ({error}): restore it from its source") from error
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: info.start):
        if info.start != end:
            raise ValueError(f"{file} has a damaged header (gaps between tensors): restore it from its source")
        end = info.end
    if size != end:
        raise ValueError(f"{file} has {size} bytes, its header says {end}: restore it from its source")
    return tensors


def _tensor_info(file: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    info = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + end)
    if any(not isinstance(side, int) or side < 0 for side in info.shape):
        raise ValueError(f"shape {info.shape}")
    if end - start != math.prod(info.shape) * _DTYPE_BYTES[info.dtype]:
        raise ValueError(f"{end - start} bytes for {info.dtype} of shape {list(info.shape)}")
    return info
