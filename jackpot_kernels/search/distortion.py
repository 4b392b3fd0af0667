"""Distortion: how far the loss after swaps is from what its gradient predicts (Eq. 22-24, Fig. 6)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from jackpot_kernels._validate import require_module
from jackpot_kernels.convert import MaskedLayer, searched_layers

LossFunction = Callable[[Tensor, Tensor], Tensor]

KINDS = ("random", "best")


class Swaps(NamedTuple):
    """Flat indices of the weights that leave a layer's mask and of as many that enter it."""

    leaving: Tensor
    entering: Tensor


class Distortion(NamedTuple):
    """What q swaps of a kind did to the loss of one batch: as Eq. 22 expects, as measured, and the rest."""

    q: int
    kind: str
    expected: float
    measured: float
    epsilon: float


def measure_distortion(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    quantities: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    *,
    loss_fn: LossFunction = F.cross_entropy,
    draws: int = 1,
    lr: float = 0.1,
    batch_statistics: bool = True,
    seed: int = 0,
) -> list[Distortion]:
    """Make swaps on every batch and measure what they do to its loss.

    "random" swaps exchange kept and pruned weights of the same layer, drawn uniformly. "best" ones are those
    that SR-popup would make after one plain step ``scores - lr * gradient`` on the batch (Eq. 18, 28): of the
    pairs that it proposes, each layer's k-th highest entering with its k-th lowest leaving score, those of
    the widest gap between the two scores. Where fewer than q are proposed there is no record.

    Everything runs in float64 on a copy, because a single swap changes the loss by less than float32 can
    tell; the model stays as it is, to the bit.

    Args:
        model: network with masked layers; swaps are made in those whose scores require a gradient.
        batches: pairs (x, y) on the model's device.
        quantities: how many swaps to make at once.
        loss_fn: ``loss_fn(model(x), y)`` is a scalar.
        draws: random draws for each batch and quantity.
        lr: learning rate of the step that proposes the best swaps.
        batch_statistics: normalise by the statistics of the batch, as a search does while it trains; False
            takes the running statistics. Otherwise the network is in eval mode either way.
        seed: of the random swaps.

    Returns:
        A record for each batch, quantity and draw of random swaps, and for each batch and quantity of best
        ones.

    Raises:
        ValueError: when there is no layer to swap in, or a quantity exceeds what can be swapped.
    """
    probe = _probe(model, batch_statistics)
    layers = searched_layers(probe)
    _require_quantities(quantities, layers)
    generator = torch.Generator().manual_seed(seed)
    records = []
    for x, y in batches:
        inputs, labels = _as_double(x), _as_double(y)

        def loss() -> Tensor:
            return loss_fn(probe(inputs), labels)  # noqa: B023

        before = loss()
        scores = [layer.scores for layer in layers.values()]
        gradients = dict(zip(layers, torch.autograd.grad(before, scores), strict=True))
        proposals = {
            name: _proposals(layer.mask, layer.scores.detach() - lr * gradients[name])
            for name, layer in layers.items()
        }
        for q in quantities:
            sets = [("random", random_swaps(layers, q, generator)) for _ in range(draws)]
            if sum(len(gaps) for _, gaps in proposals.values()) >= q:
                sets.append(("best", _widest(proposals, q)))
            for kind, swaps in sets:
                expected = expected_change(gradients, swaps)
                with torch.no_grad(), swapped(layers, swaps):
                    measured = (loss() - before).item()
                records.append(Distortion(q, kind, expected, measured, measured - expected))
    return records


def agreement(records: Iterable[Distortion]) -> dict[tuple[str, int], float]:
    """Return, by kind and quantity, the share of records in which the loss moved as Eq. 22 expects.

    Args:
        records: of ``measure_distortion``.

    Returns:
        Fractions in [0, 1]; a change of exactly 0 agrees with an expectation of exactly 0 only.
    """
    agreeing: dict[tuple[str, int], list[bool]] = {}
    for record in records:
        same = (record.measured > 0, record.measured < 0) == (record.expected > 0, record.expected < 0)
        agreeing.setdefault((record.kind, record.q), []).append(same)
    return {key: sum(votes) / len(votes) for key, votes in agreeing.items()}


def expected_change(gradients: Mapping[str, Tensor], swaps: Mapping[str, Swaps]) -> float:
    """Return the sum of ``G_j w_j`` over entering less that of ``G_i w_i`` over leaving weights (Eq. 22).

    Args:
        gradients: of the scores by layer name, ``G * weight`` (Eq. 6, 18).
        swaps: by layer name.
    """
    total = 0.0
    for name, (leaving, entering) in swaps.items():
        gradient = gradients[name].flatten().double()
        total += float(gradient[entering].sum() - gradient[leaving].sum())
    return total


def random_swaps(layers: Mapping[str, MaskedLayer], q: int, generator: torch.Generator) -> dict[str, Swaps]:
    """Draw q swaps within layers, each layer in proportion to the pairs that it can exchange at once."""
    room = {name: _room(layer) for name, layer in layers.items()}
    layer_of_pair = torch.cat([torch.full((n,), i) for i, n in enumerate(room.values())])
    drawn = layer_of_pair[torch.randperm(len(layer_of_pair), generator=generator)[:q]]
    counts = torch.bincount(drawn, minlength=len(room)).tolist()
    swaps = {}
    for (name, layer), count in zip(layers.items(), counts, strict=True):
        if count:
            mask = layer.mask.flatten()
            leaving, entering = (_draw(where, count, generator) for where in (mask, ~mask))
            swaps[name] = Swaps(leaving, entering)
    return swaps


def _draw(where: Tensor, count: int, generator: torch.Generator) -> Tensor:
    (places,) = where.nonzero(as_tuple=True)
    return places[torch.randperm(len(places), generator=generator)[:count].to(places.device)]


def _proposals(mask: Tensor, scores: Tensor) -> tuple[Swaps, Tensor]:
    """Return the swaps that scores propose (Eq. 28), widest gap first, and their gaps."""
    ranked = scores.flatten().sort(descending=True, stable=True).indices
    inside = mask.flatten()[ranked]
    num_kept = int(inside.sum())
    entering = ranked[:num_kept][~inside[:num_kept]]
    leaving = ranked[num_kept:][inside[num_kept:]].flip(0)
    return Swaps(leaving, entering), scores.flatten()[entering] - scores.flatten()[leaving]


def _widest(proposals: Mapping[str, tuple[Swaps, Tensor]], q: int) -> dict[str, Swaps]:
    """Return the q proposed swaps of the widest gaps; of equal ones those of earlier layers."""
    gaps = torch.cat([gaps for _, gaps in proposals.values()])
    layer_of_pair = torch.cat(
        [torch.full_like(gaps, i, dtype=torch.int64) for i, (_, gaps) in enumerate(proposals.values())]
    )
    chosen = layer_of_pair[gaps.sort(descending=True, stable=True).indices[:q]]
    counts = torch.bincount(chosen, minlength=len(proposals)).tolist()
    pairs = zip(proposals.items(), counts, strict=True)
    # Gaps never widen within a layer, so those chosen there are its first.
    return {
        name: Swaps(leaving[:count], entering[:count])
        for (name, ((leaving, entering), _)), count in pairs
        if count
    }


@contextmanager
def swapped(layers: Mapping[str, MaskedLayer], swaps: Mapping[str, Swaps]) -> Iterator[None]:
    """Make the swaps, and take them back afterwards."""
    before = {name: layers[name].mask for name in swaps}
    try:
        for name, (leaving, entering) in swaps.items():
            mask = before[name].clone()
            mask.view(-1)[leaving] = False
            mask.view(-1)[entering] = True
            layers[name].mask = mask
        yield
    finally:
        for name, mask in before.items():
            layers[name].mask = mask


def _probe(model: nn.Module, batch_statistics: bool) -> nn.Module:
    """Return a copy in float64 and eval mode, but for normalisation where it is to use the batch."""
    require_module(model)
    probe = deepcopy(model).double().eval()
    for module in probe.modules():
        if batch_statistics and isinstance(module, _BatchNorm):
            module.train()
    return probe


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _room(layer: MaskedLayer) -> int:
    """Return how many swaps a layer can make at once."""
    return min(layer.num_kept, layer.weight.numel() - layer.num_kept)


def _require_quantities(quantities: Sequence[int], layers: Mapping[str, MaskedLayer]) -> None:
    room = sum(_room(layer) for layer in layers.values())
    for q in quantities:
        if not 1 <= q <= room:
            raise ValueError(f"quantities must be in [1, {room}], got {q}")
