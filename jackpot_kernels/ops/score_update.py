"""SGD on the scores of every layer in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jackpot_kernels._validate import require_one_device


def score_update_(
    scores: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    hyper: Tensor,
    control: Tensor,
    *,
    found_inf: Tensor | None = None,
    workspace: Tensor | None = None,
    joint: bool = False,
) -> None:
    """SGD on the scores of all layers (Eq. 6, 18), or nothing at all when any gradient is not finite.

    g = grad * inv_scale + weight_decay * s;  m = momentum * m + g;
    s = s - lr * (g + momentum * m if nesterov else m)

    Every product-and-sum above is one fused multiply-add in float32, in this order, so that the bits are
    the same on every instruction set, device and number of threads.

    Args:
        scores, momenta: contiguous float32, updated in place, one tensor a layer.
        grads: contiguous float32 of the same shapes; an empty tensor leaves its layer as it is.
        masks: packed masks, int32, read for the candidates.
        hyper: float32 rows of (lr, momentum, weight_decay, nesterov 0 or 1, inv_scale).  # [L, 5]
        control: int64 (steps taken, steps skipped, 1 if this step was skipped), updated in place.  # [3]
        found_inf: float32 scalar of a GradScaler; anything but 0 skips the step.
        workspace: of ``new_workspace``; the update then emits the candidates of the next ``swap_`` on its
            way.
        joint: as for ``new_workspace`` and ``swap_``.

    Raises:
        ValueError: some tensors, but not all, are on the meta device.
        RuntimeError: a dtype, layout or length does not fit.
    """
    torch.ops.jackpot.score_update_(
        scores, momenta, grads, masks, hyper, control, found_inf, workspace, joint
    )
    # Compiled operators leave this to their callers: autograd then notices a late backward pass.
    torch.autograd.graph.increment_version((*scores, *momenta))


@torch.library.register_fake("jackpot::score_update_")
def _(
    scores: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    hyper: Tensor,
    control: Tensor,
    found_inf: Tensor | None,
    workspace: Tensor | None,
    joint: bool,
) -> None:
    require_one_device(
        scores=scores,
        momenta=momenta,
        grads=grads,
        masks=masks,
        hyper=hyper,
        control=control,
        found_inf=found_inf,
        workspace=workspace,
    )
