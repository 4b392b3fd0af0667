"""What a captured step finds by its address: kept while it may be replayed, compared with what is there."""

import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from jackpot_kernels.convert import masked_layers


class CapturedLayers:
    """What a captured forward pass finds by its address in the masked layers of a model.

    What layers keep of their weights they drop as they like; here it stays for as long as this object does.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._layers = [] if model is None else list(masked_layers(model).values())
        # Layers drop what is out of date as they are looked at: no captured step patches it.
        self.look()

    def look(self) -> None:
        """Take what the layers hold now for what was captured."""
        self._kept, self._addresses = self._look()

    @property
    def is_current(self) -> bool:
        """Whether the layers hold the same masks and weights now.

        They do not when some were built anew since, in another dtype or for another mask, or lie elsewhere.
        """
        kept, addresses = self._look()
        return all(map(operator.is_, kept, self._kept)) and addresses == self._addresses

    def replaying(self) -> AbstractContextManager[None]:
        """Return what surrounds a replay on the host."""
        return nullcontext()

    def _look(self) -> tuple[list[Tensor | None], list[int]]:
        kept: list[Tensor | None] = []
        addresses = []
        for layer in self._layers:
            # As attributes of a module they take ten times as long to read.
            weight, scores = layer._parameters.get("weight"), layer._parameters["scores"]
            words = layer._buffers["mask_words"]
            kept += words, layer.cached_effective_weight, layer.cached_cast_weight
            addresses += [tensor.data_ptr() for tensor in (weight, scores, words) if tensor is not None]
        return kept, addresses


@contextmanager
def capturing_layers(model: nn.Module | None) -> Iterator[CapturedLayers]:
    """Let a CUDA graph capture a step inside that changes no mask."""
    captured = CapturedLayers(model)
    yield captured
    captured.look()
