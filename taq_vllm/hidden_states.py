"""The calibration batches' hidden states between two blocks: one [B, T, d] tensor per batch.

They are kept in memory up to a limit, which all hidden states of a walk share (`Storage`); batches beyond it lie in a
file without a name, which the system takes back when it is closed: also when the process is killed, so nothing is
ever left over. What comes back is what was put in, to the bit.

A walk over the blocks that may be interrupted saves them, and finds them again:

    hidden, first = model.resume(file) or (model.embed(batches), 0)
    for layer in range(first, model.layers):
        with model.block(layer) as block:
            hidden.replace(lambda states: model.run(layer, block, states))
        ...                                     # put on disk what was learned from this block, then
        hidden.save(file, blocks=layer + 1)     # atomic; takes the place of what was saved before
    file.unlink(missing_ok=True)

Saving writes all of them to disk, once per block.
"""

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from taq_vllm.model_files import read_header, read_tensor, write_tensors

_BLOCKS = "blocks"


class Storage:
    """Memory that the hidden states of one walk share, and a folder for what does not fit.

    Attributes:
        limit_bytes: most that is held in memory.
        used_bytes: held now.
        spilled_bytes: held now in files.
        most_bytes: most that was held at once, in memory and files.
        folder: where files without names are made; a disk, not a tmpfs.
    """

    def __init__(self, limit_bytes: float = float("inf"), folder: str | Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.spilled_bytes = 0
        self.most_bytes = 0
        self.folder = folder


@dataclass
class _Spilled:
    """A batch in the file of its hidden states."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    start: int
    bytes: int


class HiddenStates:
    """Hidden states of every calibration batch, in the order of the batches.

    hidden = model.embed(batches)
    after = hidden.map(lambda states: model.run(layer, block, states))   # the old ones stay
    hidden.replace(lambda states: model.run(layer, block, states))       # the old ones go, one by one

    What indexing and iterating give may be the only copy: it must not be changed in place.
    """

    def __init__(self, batches: Iterable[Tensor], storage: Storage | None = None) -> None:
        """Take batches one by one; a generator's need never be in memory together."""
        self._storage = storage or Storage()
        self._held: list[Tensor | _Spilled] = []
        self._file: BinaryIO | None = None
        self._end = 0
        weakref.finalize(self, _give_back, self._storage, self._held)
        for states in batches:
            self._held.append(self._place(states, None))

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in range(len(self)):
            yield self[batch]

    def __getitem__(self, batch: int) -> Tensor:
        held = self._held[batch]
        if isinstance(held, Tensor):
            return held
        assert self._file is not None, "a spilled batch without a file"
        return read_tensor(self._file, held.start, held.shape, held.dtype).to(held.device)

    def map(self, function: Callable[[Tensor], Tensor]) -> "HiddenStates":
        """New hidden states, batch by batch."""
        return HiddenStates((function(states) for states in self), self._storage)

    def replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put new hidden states in the place of the old ones, batch by batch."""
        for batch, held in enumerate(self._held):
            states = function(self[batch])
            self._held[batch] = self._place(states, held)

    def save(self, file: Path, blocks: int) -> None:
        """Write all batches to a safetensors file, which appears whole or stays as it was.

        Args:
            file: read by `load`.
            blocks: how many blocks these hidden states have been through.
        """
        partial = file.with_name(f".{file.name}.partial")
        shapes = {str(batch): (held.dtype, tuple(held.shape)) for batch, held in enumerate(self._held)}
        write_tensors(partial, shapes, lambda name: self[int(name)].contiguous().cpu(), {_BLOCKS: str(blocks)})
        os.replace(partial, file)

    @classmethod
    def load(
        cls, file: Path, storage: Storage | None = None, device: str | torch.device = "cpu"
    ) -> "tuple[HiddenStates, int] | None":
        """What `save` wrote last.

        Args:
            file: as given to `save`.
            storage: of the walk that goes on.
            device: where its blocks run.

        Returns:
            The hidden states and the number of blocks that they have been through; None where nothing was saved.

        Raises:
            ValueError: the file is damaged.
        """
        file.with_name(f".{file.name}.partial").unlink(missing_ok=True)  # of a killed run
        if not file.is_file():
            return None
        tensors = read_header(file)
        with file.open("rb", buffering=0) as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            batches = (tensors[str(batch)] for batch in range(len(tensors)))
            hidden = cls((info.read(stream).to(device) for info in batches), storage)
        return hidden, int(header["__metadata__"][_BLOCKS])

    def _place(self, states: Tensor, old: Tensor | _Spilled | None) -> Tensor | _Spilled:
        """Where a batch is kept, `old` being what it takes the place of."""
        storage, size = self._storage, states.nbytes
        if isinstance(old, Tensor):
            storage.used_bytes -= old.nbytes
        elif old is not None:
            storage.spilled_bytes -= old.bytes
        storage.most_bytes = max(storage.most_bytes, storage.used_bytes + storage.spilled_bytes + size)
        if storage.used_bytes + size <= storage.limit_bytes:
            storage.used_bytes += size
            return states
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=storage.folder, buffering=0)  # noqa: SIM115 - closed with its owner
        if isinstance(old, _Spilled) and old.bytes >= size:
            start = old.start
        else:
            start, self._end = self._end, self._end + size
        content = memoryview(states.contiguous().cpu().view(-1).view(torch.uint8).numpy())
        written = 0
        while written < size:
            written += os.pwrite(self._file.fileno(), content[written:], start + written)
        storage.spilled_bytes += size
        return _Spilled(states.shape, states.dtype, states.device, start, size)


def _give_back(storage: Storage, held: list[Tensor | _Spilled]) -> None:
    for entry in held:
        if isinstance(entry, Tensor):
            storage.used_bytes -= entry.nbytes
        else:
            storage.spilled_bytes -= entry.bytes
