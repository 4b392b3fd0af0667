"""The memory of a search: bytes a weight of the tensors that stand after a step, gradients aside."""

from collections.abc import Iterable, Iterator, Mapping

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.checks import require_same
from benchmarks.searches import Search
from jackpot_kernels import reference


def bench_state(benchmark: BenchmarkFixture, search: Search) -> None:
    """Weight, scores, momentum, mask and effective weight; beside them all else that a search holds."""
    search.draw_gradients()
    benchmark.pedantic(search.optimizer.step, rounds=1, iterations=1)
    state = list(_state(search))
    effective = [layer.cached_effective_weight for layer in search.layers]
    expected = [reference.effective_weight(layer.weight, layer.mask_words) for layer in search.layers]
    require_same("effective weight", [t for t in effective if t is not None], expected)
    held = [vars(search.optimizer), *(vars(layer) for layer in search.layers)]
    numel = sum(layer.weight.numel() for layer in search.layers)
    bytes_of_state, bytes_of_all = num_bytes(state), num_bytes(_tensors(held))
    benchmark.extra_info["state"] = bytes_of_state / numel
    benchmark.extra_info["workspace"] = (bytes_of_all - bytes_of_state) / numel


def _state(search: Search) -> Iterator[Tensor]:
    for layer in search.layers:
        yield from (layer.weight, layer.scores, layer.mask_words, layer.effective_weight())
        yield search.optimizer.state[layer.scores]["momentum_buffer"]


def _tensors(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' memory, each piece counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
