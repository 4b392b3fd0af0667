"""The step as the authors' released code makes it, where it differs from the paper."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jackpot_kernels.ops.effective_weight import effective_weight
from jackpot_kernels.ops.search_step import SearchStep
from jackpot_kernels.ops.threshold import threshold

COMPAT = ("authors",)

# What the optimizer's state calls their schedule; no function can have this name.
AUTHORS = "compat=authors"


def step_unless_tied(step: SearchStep, grads: Sequence[Tensor], found_inf: Tensor | None = None) -> None:
    """Take ``step``, but swap nothing in a segment whose scores tie at the threshold.

    The released code counts leaving weights as those at or below the (K+1)-th highest score and entering ones
    as those above it. When the K-th equals the (K+1)-th these counts differ, and it drops every swap of the
    layer.

    ``step.num_kept`` does not fall. This waits for the device.
    """
    before = [mask.clone() for mask in step.masks]
    step(grads, found_inf)
    tied = _tied(step.scores, step.num_kept[:, 0], step.joint)
    step.stats[tied, 1:3] = 0
    for i, (mask, old) in enumerate(zip(step.masks, before, strict=True)):
        if tied[0 if step.joint else i]:
            mask.copy_(old)
            effective = step.effective[i]
            if effective.numel():
                effective.copy_(effective_weight(step.weights[i], mask, effective.dtype))


def _tied(scores: Sequence[Tensor], num_kept: Tensor, joint: bool) -> Tensor:
    """Tell for each segment, on the CPU, whether the K-th and the (K+1)-th highest score are equal."""
    values, _ = threshold(scores, num_kept, joint)
    segment = [0 if joint else i for i in range(len(scores))]
    reached = torch.zeros_like(num_kept)
    for s, tensor in zip(segment, scores, strict=True):
        reached[s] += (tensor >= values[s]).sum()
    return (reached > num_kept).cpu()
