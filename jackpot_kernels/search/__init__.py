"""The search: when swaps happen (schedule) and the optimizer that makes them."""

from jackpot_kernels.search.optimizer import SRPopup, SwapStats

__all__ = ["SRPopup", "SwapStats"]
