"""Swap selection and the swaps themselves, for every layer in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jackpot_kernels._validate import require_choice, require_one_device, require_tensor, require_tensors

PAIRS = ("best", "inverse", "random")


def new_workspace(scores: Sequence[Tensor], joint: bool = False) -> Tensor:
    """Return the memory in which ``score_update_`` leaves candidates for ``swap_``: about half a byte a
    weight.

    Args:
        scores: the scores of all layers.
        joint: one segment over all layers instead of one for each.

    Returns:
        Zeroed int64 on the scores' device.
    """
    size = torch.ops.jackpot.workspace_size(scores, joint)
    return torch.zeros(size, dtype=torch.int64, device=scores[0].device)


def swap_(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    num_kept: Tensor,
    schedule: Tensor,
    control: Tensor,
    *,
    weights: Sequence[Tensor] = (),
    effective: Sequence[Tensor] = (),
    joint: bool = False,
    pairs: str = "best",
    seed: int = 0,
    workspace: Tensor | None = None,
) -> Tensor:
    """Exchange a share of the kept and pruned weights that the scores would exchange (Eq. 28-30).

    With ``t = control[0]`` and ``r, ramp = schedule[t - 1]``, each segment's target is its first
    ``K = K_last + ceil((K_first - K_last) * ramp)`` elements by the order, never more than are kept now.
    Of the ``n`` pruned elements inside the target, ``q = ceil(n * r)`` enter; of the kept ones outside
    it, ``q`` and the surplus over ``K`` leave. Ties go to the lower position, the logical row-major
    index, after the layer's place in the list where ``joint``; the result does not depend on threads,
    instruction set or workspace.

    Args:
        scores: contiguous float32, one tensor a layer.
        masks: packed masks, int32, changed in place.
        num_kept: int64 rows of (K_first, K_last).  # [S, 2]
        schedule: float64 rows of (rate, ramp), for t = 1 ... T.  # [T, 2]
        control: int64 (steps taken, steps skipped, 1 if this step was skipped); a skipped step swaps
            nothing.  # [3]
        weights, effective: none, or one a layer; each ``effective`` that is not empty is patched in place
            so that it stays ``weight * mask``. Any floating dtype and memory format.
        joint: one segment over all layers (S = 1) instead of one for each.
        pairs: "best" takes the highest ranked of entering and the lowest ranked of leaving, "inverse" the
            other ends, "random" the smallest hashes of (seed, t, position).
        workspace: of ``new_workspace``, as given to ``score_update_``.

    Returns:
        int64 rows of (n, entered, left, bits of the float32 threshold, 1 if the scores were scanned
        again).  # [S, 5]

    Raises:
        TypeError: an argument is no tensor, or no list of tensors.
        ValueError: ``pairs`` is not known, or some tensors, but not all, are on the meta device.
        RuntimeError: a dtype, layout or length does not fit, a count or mask keeps nothing, a rate or ramp of
            t is not in [0, 1], or t is not in 1 ... T. CUDA does not wait to look at values: it swaps nothing
            where t is not in 1 ... T, and what it does with the others means nothing.
    """
    require_choice("pairs", pairs, PAIRS)
    lists = {"scores": scores, "masks": masks, "weights": weights, "effective": effective}
    for name, values in lists.items():
        require_tensors(name, values)
    for name, value in {"num_kept": num_kept, "schedule": schedule, "control": control}.items():
        require_tensor(name, value)
    stats = torch.ops.jackpot.swap_(
        scores, masks, weights, effective, num_kept, schedule, control, joint, pairs, seed, workspace
    )
    # Compiled operators leave this to their callers: autograd then notices a late backward pass.
    torch.autograd.graph.increment_version((*masks, *effective))
    return stats


@torch.library.register_fake("jackpot::swap_")
def _(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    effective: Sequence[Tensor],
    num_kept: Tensor,
    schedule: Tensor,
    control: Tensor,
    joint: bool,
    pairs: str,
    seed: int,
    workspace: Tensor | None,
) -> Tensor:
    require_one_device(
        scores=scores,
        masks=masks,
        weights=weights,
        effective=effective,
        num_kept=num_kept,
        schedule=schedule,
        control=control,
        workspace=workspace,
    )
    return num_kept.new_empty(num_kept.shape[0], 5)
