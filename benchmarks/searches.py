"""A search in the middle of its way: the state in which steps are timed."""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import jackpot_kernels as jk
from benchmarks.shapes import Shape
from jackpot_kernels.search.schedule import ramp_table, rate_table, step_table

SPARSITY = 0.9
TOTAL_STEPS, WARM_STEPS = 500, 250
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
# Standard deviations of a step's score gradients: what stays from step to step, and what a batch adds to it.
DIRECTION, NOISE = 1e-3, 3e-3


@dataclass
class State:
    """All that a search step reads and writes besides the gradients; lists hold one tensor a layer."""

    weights: list[Tensor]
    scores: list[Tensor]
    momenta: list[Tensor]
    masks: list[Tensor]  # packed
    effective: list[Tensor]
    hyper: Tensor  # [L, 5]
    num_kept: Tensor  # [L, 2]
    schedule: Tensor  # [T, 2]
    control: Tensor  # [3]

    def copy(self) -> "State":
        return deepcopy(self)


class Search:
    """``SRPopup`` at 90 % over layers of the given shapes, after ``WARM_STEPS`` steps of made-up gradients.

    As in training, a score gradient is in proportion to its weight, and has a part that stays and a part that
    is new at every step. Weights are Gaussian with He's deviation.
    """

    def __init__(self, shapes: Sequence[Shape], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._random = random.Random(seed)
        self.model = jk.convert(nn.Sequential(*map(_layer, shapes)))
        self.layers = list(jk.masked_layers(self.model).values())
        self._scales = [torch.randn(shape, generator=generator) for shape in shapes]  # weight / deviation
        for layer, scale in zip(self.layers, self._scales, strict=True):
            layer.weight.copy_(scale * (2 / layer.weight[0].numel()) ** 0.5)
        self._directions = [torch.randn(s.shape, generator=generator) * s * DIRECTION for s in self._scales]
        self._noise = torch.randn(2 * max(s.numel() for s in self._scales), generator=generator) * NOISE
        self.gradients = [torch.zeros(shape) for shape in shapes]
        jk.initialize(self.model, SPARSITY, keep_last_dense=False)
        self.optimizer = jk.SRPopup(self.model, LR, MOMENTUM, WEIGHT_DECAY, total_steps=TOTAL_STEPS)
        self._attach()
        for _ in range(WARM_STEPS):
            self.draw_gradients()
            self.optimizer.step()

    def fork(self) -> "Search":
        """Return a search of its own that goes on from here."""
        twin = deepcopy(self)
        # A copy of an optimizer takes some thirty steps to aim as closely as the search has learnt to.
        twin.optimizer._workspace.copy_(self.optimizer._workspace)
        twin._attach()
        return twin

    def _attach(self) -> None:
        for layer, gradient in zip(self.layers, self.gradients, strict=True):
            layer.scores.grad = gradient
            layer.effective_weight()

    def draw_gradients(self) -> None:
        """Write the next step's gradients into the scores' ``grad``, which are ``gradients``."""
        for gradient, scale, direction in zip(self.gradients, self._scales, self._directions, strict=True):
            start = self._random.randrange(self._noise.numel() - gradient.numel() + 1)
            noise = self._noise[start : start + gradient.numel()].view_as(gradient)
            torch.addcmul(direction, scale, noise, out=gradient)

    def state(self) -> State:
        """Return a copy of the state."""
        rows = [(LR, MOMENTUM, WEIGHT_DECAY, 0.0, 1.0)] * len(self.layers)
        kept = torch.tensor([layer.num_kept for layer in self.layers])
        return State(
            weights=[layer.weight.detach() for layer in self.layers],
            scores=[layer.scores.detach() for layer in self.layers],
            momenta=[self.optimizer.state[layer.scores]["momentum_buffer"] for layer in self.layers],
            masks=[layer.mask_words for layer in self.layers],
            effective=[layer.effective_weight() for layer in self.layers],
            hyper=torch.tensor(rows),
            num_kept=torch.stack([kept, kept], 1),
            schedule=step_table(rate_table("quartic", TOTAL_STEPS), ramp_table("cubic", TOTAL_STEPS)),
            control=torch.tensor([self.optimizer.steps, 0, 0]),
        ).copy()


def _layer(shape: Shape) -> nn.Module:
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=False)
    return nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
