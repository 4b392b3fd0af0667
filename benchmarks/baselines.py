"""What the search step is measured against; each baseline works on a ``State`` of its own."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Call
from benchmarks.searches import LR, MOMENTUM, WEIGHT_DECAY, State
from jackpot_kernels import reference


def exact_step(state: State, gradients: Sequence[Tensor]) -> Tensor:
    """Take one step as the reference defines it, bit for bit, and return the swaps' statistics."""
    return _reference_step(state, gradients)


def _reference_step(state: State, gradients: Sequence[Tensor], **how: Any) -> Tensor:
    return reference.search_step_(
        state.scores,
        state.momenta,
        state.masks,
        gradients,
        state.hyper,
        state.num_kept,
        state.schedule,
        state.control,
        weights=state.weights,
        effective=state.effective,
        **how,
    )


def eager_step(state: State, gradients: Sequence[Tensor]) -> Call:
    """Return the reference's step with the cheapest multiply-add that eager has."""

    def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return torch.addcmul(c, a, b)

    return lambda: _reference_step(state, gradients, multiply_add=multiply_add)


def compiled_step(state: State, gradients: Sequence[Tensor]) -> Call:
    """Return the reference's step under ``torch.compile``.

    Shapes are dynamic, for with static ones each layer size is compiled anew until Dynamo gives up.
    """
    score_update_ = torch.compile(reference.score_update_, dynamic=True)
    swap_ = torch.compile(reference.swap_, dynamic=True)

    def step() -> None:
        score_update_(
            state.scores, state.momenta, gradients, state.hyper, state.control, multiply_add=_multiply_add
        )
        swap_(
            state.scores,
            state.masks,
            state.num_kept,
            state.schedule,
            state.control,
            weights=state.weights,
            effective=state.effective,
        )

    return step


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * b + c


def authors_step(state: State, gradients: Sequence[Tensor]) -> Call:
    """Return the sequence of operations of the authors' program, whose masks are float32.

    SGD; then for each layer a sort of all scores for the threshold, ``nonzero`` for the candidates,
    ``argsort`` of both lists, the chosen positions as Python lists, and assignments by them. It parts from
    the definition only where scores tie at the threshold: the lists then differ in length, and the shorter
    one counts.
    """
    masks = [
        reference.unpack_mask(words, score.shape).float()
        for words, score in zip(state.masks, state.scores, strict=True)
    ]
    sgd = _sgd(state, gradients, foreach=True)
    rates, num_kept = state.schedule[:, 0].tolist(), state.num_kept[:, 0].tolist()

    def step() -> None:
        sgd()
        state.control[0] += 1
        rate = rates[int(state.control[0]) - 1]
        for i, (score, mask, kept) in enumerate(zip(state.scores, masks, num_kept, strict=True)):
            _authors_swap(score.view(-1), mask.view(-1), kept, rate)
            state.effective[i] = state.weights[i] * mask

    return step


def _authors_swap(score: Tensor, mask: Tensor, num_kept: int, rate: float) -> None:
    num_pruned = score.numel() - num_kept
    if num_pruned == 0:
        return
    threshold = torch.sort(score).values[num_pruned - 1]
    entering = torch.nonzero((score > threshold) & (mask == 0)).view(-1)
    leaving = torch.nonzero((score <= threshold) & (mask == 1)).view(-1)
    q = math.ceil(min(len(entering), len(leaving)) * rate)
    best = entering[torch.argsort(score[entering], descending=True)[:q]].tolist()
    worst = leaving[torch.argsort(score[leaving])[:q]].tolist()
    mask[best] = 1
    mask[worst] = 0


def fused_sgd(state: State, gradients: Sequence[Tensor]) -> Call:
    """Return the update of the scores alone, by torch's fused SGD."""
    return _sgd(state, gradients, fused=True)


def _sgd(state: State, gradients: Sequence[Tensor], **kind: bool) -> Call:
    for score, gradient in zip(state.scores, gradients, strict=True):
        score.grad = gradient
    sgd = torch.optim.SGD(state.scores, LR, MOMENTUM, weight_decay=WEIGHT_DECAY, **kind)
    for score, momentum in zip(state.scores, state.momenta, strict=True):
        sgd.state[score]["momentum_buffer"] = momentum
    return sgd.step


def compiled_sgd(state: State, gradients: Sequence[Tensor]) -> Call:
    """Return the update of the scores alone, as Inductor fuses it."""

    @torch.compile
    def update(scores: list[Tensor], momenta: list[Tensor], gradients: list[Tensor]) -> None:
        for s, m, g in zip(scores, momenta, gradients, strict=True):
            m.mul_(MOMENTUM).add_(g + WEIGHT_DECAY * s)
            s.sub_(LR * m)

    return lambda: update(state.scores, state.momenta, list(gradients))
