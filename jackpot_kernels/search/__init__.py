"""The search: when swaps happen (schedule), the optimizers, and a CUDA graph of the step."""

from jackpot_kernels.search.graph import GraphedStep
from jackpot_kernels.search.optimizer import SRPopup, SwapStats
from jackpot_kernels.search.supermask import Supermask

__all__ = ["GraphedStep", "SRPopup", "Supermask", "SwapStats"]
