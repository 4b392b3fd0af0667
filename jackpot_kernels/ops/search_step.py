"""The whole search step, for every layer in one call."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from jackpot_kernels._validate import require_choice, require_one_device
from jackpot_kernels.ops.swap import PAIRS

# A step has no derivative. Torch would look at each tensor to find that out, which took 26 us of a step of
# ResNet-32 and 170 us of ResNet-50 on the CPU, from cold caches.
_LIBRARY = torch.library.Library("jackpot", "IMPL")
_LIBRARY.impl("search_step_", torch.library.fallthrough_kernel, "Autograd")


class SearchStep:
    """Do ``score_update_``, then ``swap_`` (Algorithm 1 of arXiv 2104.08700), at each call.

    All but the gradients is handed over once, here. Torch takes a microsecond to hand over a tensor, which
    for the six of each layer was a tenth of a step of ResNet-50 on the CPU.

    Args:
        scores, momenta, masks, hyper, num_kept, schedule, control, weights, effective, joint, pairs, seed,
            workspace: as for ``score_update_`` and ``swap_``. They are held, and may be written to between
            steps.
        stats: int64, takes at each step what ``swap_`` returns.  # [S, 5]

    Raises:
        ValueError: ``pairs`` is not known.
    """

    def __init__(
        self,
        scores: Sequence[Tensor],
        momenta: Sequence[Tensor],
        masks: Sequence[Tensor],
        hyper: Tensor,
        num_kept: Tensor,
        schedule: Tensor,
        control: Tensor,
        stats: Tensor,
        *,
        weights: Sequence[Tensor] = (),
        effective: Sequence[Tensor] = (),
        joint: bool = False,
        pairs: str = "best",
        seed: int = 0,
        workspace: Tensor | None = None,
    ) -> None:
        require_choice("pairs", pairs, PAIRS)
        self.scores, self.masks, self.weights, self.effective = scores, masks, weights, effective
        self.num_kept, self.stats, self.joint = num_kept, stats, joint
        self._control = control
        self._written = (*scores, *momenta, *masks, *effective)
        lists = (scores, momenta, masks, weights, effective)
        settings = (hyper, num_kept, schedule, control, stats)
        self._search = torch.ops.jackpot.search_begin(*lists, *settings, joint, pairs, seed, workspace)
        # The memory is torch's own at the end of a program, which needs no tidying up.
        weakref.finalize(self, _end, control, self._search).atexit = False

    # Nothing tells a compiler what a step writes to: it would drop the step, or read what was there before.
    # `torch.compiler.disable` does the same as this, but imports the compiler.
    @torch._disable_dynamo
    def __call__(self, grads: Sequence[Tensor], found_inf: Tensor | None = None) -> None:
        """Take a step.

        Args:
            grads, found_inf: as for ``score_update_``.

        Raises:
            ValueError: a gradient is on the meta device.
            RuntimeError: a dtype, layout or length does not fit, or, on the CPU, no step of the schedule is
                left; nothing has changed then. On a GPU, which the host does not wait for, a step past the
                schedule updates the scores and swaps nothing.
        """
        torch.ops.jackpot.search_step_(self._control, self._search, grads, found_inf)
        self.mark_written()

    def mark_written(self) -> None:
        """Tell autograd of a step, which then notices a late backward pass.

        Compiled operators leave this to their callers, and a replay of a captured step has no other.
        """
        torch.autograd.graph.increment_version(self._written)


def _end(control: Tensor, search: int) -> None:
    # An object may be collected at any time, also while torch.compile traces another model with fake tensors.
    with torch._C._DisableTorchDispatch():
        torch.ops.jackpot.search_end(control, search)


@torch.library.register_fake("jackpot::search_step_")
def _(control: Tensor, search: int, grads: Sequence[Tensor], found_inf: Tensor | None) -> None:
    require_one_device(control=control, grads=grads, found_inf=found_inf)
