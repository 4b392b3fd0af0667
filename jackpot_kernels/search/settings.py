"""What a search does, apart from its model, data and device."""

import math
from dataclasses import dataclass

from jackpot_kernels._validate import require_choice
from jackpot_kernels.budgets import BUDGETS, num_pruned
from jackpot_kernels.criteria import CRITERIA
from jackpot_kernels.ops.swap import PAIRS
from jackpot_kernels.search.optimizer import SCOPES
from jackpot_kernels.search.schedule import SCHEDULES

NORMALIZATIONS = ("stats", "frozen", "recalibrate")


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search; the defaults are those of the paper for CIFAR.

    Args:
        normalization: what batch normalisation does. "stats": its running statistics move with training;
            "frozen": it keeps and uses those of the dense network; "recalibrate": as "stats", and they are
            estimated anew before each evaluation.
        random_scores: start as edge-popup does, from random scores and the mask that they give; the budgets
            are still those of ``criterion``.
        amp: autocast to bfloat16; scores stay float32.
        log_every: steps from one step record to the next.
        workers: processes that load a data set which is not held in tensors.

    The others are those of ``initialize`` and ``SRPopup``.
    """

    sparsity: float = 0.9
    epochs: int = 30
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    criterion: str = "magnitude"
    budget: str = "global"
    scope: str = "layer"
    schedule: str = "quartic"
    pairs: str = "best"
    eta: float = 0.99
    keep_last_dense: bool = True
    normalization: str = "stats"
    random_scores: bool = False
    amp: bool = False
    seed: int = 0
    log_every: int = 10
    workers: int = 0

    def __post_init__(self) -> None:
        num_pruned(self.sparsity, 0)
        for name, least in {"epochs": 1, "batch_size": 1, "log_every": 1, "workers": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        require_choice("criterion", self.criterion, CRITERIA)
        require_choice("budget", self.budget, BUDGETS)
        require_choice("scope", self.scope, SCOPES)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("pairs", self.pairs, PAIRS)
        require_choice("normalization", self.normalization, NORMALIZATIONS)
