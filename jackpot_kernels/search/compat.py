"""The step as the authors' released code makes it, where it differs from the paper."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jackpot_kernels.ops.search_step import search_step_
from jackpot_kernels.ops.threshold import threshold

COMPAT = ("authors",)

# What the optimizer's state calls their schedule; no function can have this name.
AUTHORS = "compat=authors"


def search_step_unless_tied_(
    scores: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    words: Sequence[Tensor],
    hyper: Tensor,
    num_kept: Tensor,
    *args: Any,
    joint: bool,
    **options: Any,
) -> Tensor:
    """Do as ``search_step_`` does, but swap nothing in a segment whose scores tie at the threshold.

    The released code counts leaving weights as those at or below the (K+1)-th highest score and entering ones
    as those above it. When the K-th equals the (K+1)-th these counts differ, and it drops every swap of the
    layer.

    Args and Returns are those of ``search_step_``; ``num_kept`` does not fall. This waits for the device.
    """
    before = [mask.clone() for mask in words]
    stats = search_step_(scores, momenta, grads, words, hyper, num_kept, *args, joint=joint, **options)
    tied = _tied(scores, num_kept[:, 0], joint)
    stats[tied, 1:3] = 0
    for i in range(len(scores)):
        if tied[0 if joint else i]:
            # A second write to the mask, after which the layer builds its effective weight anew.
            words[i].copy_(before[i])
    return stats


def _tied(scores: Sequence[Tensor], num_kept: Tensor, joint: bool) -> Tensor:
    """Tell for each segment, on the CPU, whether the K-th and the (K+1)-th highest score are equal."""
    values, _ = threshold(scores, num_kept, joint)
    segment = [0 if joint else i for i in range(len(scores))]
    reached = torch.zeros_like(num_kept)
    for s, tensor in zip(segment, scores, strict=True):
        reached[s] += (tensor >= values[s]).sum()
    return (reached > num_kept).cpu()
