"""The calibration batches' hidden states between two blocks: one [B, T, d] tensor per batch."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor


class HiddenStates:
    """Hidden states of every calibration batch, in the order of the batches.

    hidden = model.embed(batches)
    after = hidden.map(lambda states: model.run(layer, block, states))   # the old ones stay
    hidden.replace(lambda states: model.run(layer, block, states))       # the old ones go, one by one
    """

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def __getitem__(self, batch: int) -> Tensor:
        return self._batches[batch]

    def map(self, function: Callable[[Tensor], Tensor]) -> "HiddenStates":
        """New hidden states, batch by batch."""
        return HiddenStates(function(states) for states in self._batches)

    def replace(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put new hidden states in the place of the old ones, batch by batch."""
        for batch, states in enumerate(self._batches):
            self._batches[batch] = function(states)
