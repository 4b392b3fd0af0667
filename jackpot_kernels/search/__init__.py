"""The search: when swaps happen (schedule), the optimizer that makes them, and a CUDA graph of the step."""

from jackpot_kernels.search.graph import GraphedStep
from jackpot_kernels.search.optimizer import SRPopup, SwapStats

__all__ = ["GraphedStep", "SRPopup", "SwapStats"]
