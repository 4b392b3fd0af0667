"""What a search and a training do, apart from model, data and device."""

from dataclasses import dataclass, fields
from typing import Any

from jackpot_kernels._validate import require_choice, require_number
from jackpot_kernels.budgets import BUDGETS, num_pruned
from jackpot_kernels.criteria import CRITERIA
from jackpot_kernels.ops.swap import PAIRS
from jackpot_kernels.search.compat import COMPAT
from jackpot_kernels.search.optimizer import SCOPES
from jackpot_kernels.search.schedule import SCHEDULES

METHODS = ("sr-popup", "supermask")
NORMALIZATIONS = ("stats", "frozen", "recalibrate")
LR_SCHEDULES = ("steps", "cosine")


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search; the defaults are those of the paper for CIFAR.

    Args:
        method: "sr-popup", or "supermask" (see ``Supermask``), which has no schedule, pairs or compat.
        compat: "authors" searches as their released code does; see ``SRPopup``.
        normalization: what batch normalisation does. "stats": its running statistics move with training;
            "frozen": it keeps and uses those of the dense network; "recalibrate": as "stats", and they are
            estimated anew before each evaluation.
        random_scores: start as edge-popup does, from random scores and the mask that they give; the budgets
            are still those of ``criterion``.
        amp: autocast to bfloat16; scores stay float32.
        channels_last: keep the weights of convolutions in that memory format.
        compile: take steps through ``torch.compile``, whose code may round otherwise; evaluations do not.
        evaluate_every: epochs from one evaluation on the test set to the next; the last epoch always has one.
        log_every: steps from one step record to the next.
        workers: processes that load a data set which is not held in tensors.

    The others are those of ``initialize`` and ``SRPopup``.

    Raises:
        TypeError: when a setting is not of its type.
        ValueError: when one is out of its range, or has no meaning beside another.
    """

    sparsity: float = 0.9
    epochs: int = 30
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    method: str = "sr-popup"
    criterion: str = "magnitude"
    budget: str = "global"
    scope: str = "layer"
    schedule: str = "quartic"
    pairs: str = "best"
    compat: str | None = None
    eta: float = 0.99
    keep_last_dense: bool = True
    normalization: str = "stats"
    random_scores: bool = False
    amp: bool = False
    seed: int = 0
    log_every: int = 10
    workers: int = 0
    evaluate_every: int = 1
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        _require_common(self)
        num_pruned(self.sparsity, 0)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        require_choice("method", self.method, METHODS)
        if self.compat is not None:
            require_choice("compat", self.compat, COMPAT)
        self._require_meaning()
        require_choice("criterion", self.criterion, CRITERIA)
        require_choice("budget", self.budget, BUDGETS)
        require_choice("scope", self.scope, SCOPES)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("pairs", self.pairs, PAIRS)
        require_choice("normalization", self.normalization, NORMALIZATIONS)

    def _require_meaning(self) -> None:
        """Refuse settings that the method does not have."""
        for name in ("schedule", "pairs", "compat"):
            value, default = getattr(self, name), getattr(SearchSettings, name)
            if self.method == "supermask" and value != default:
                raise ValueError(f"{name} must be left at {default} with method 'supermask', got {value!r}")
        if self.compat is not None and self.schedule != SearchSettings.schedule:
            raise ValueError(
                f"schedule must be left at {SearchSettings.schedule} with compat, got {self.schedule!r}"
            )


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a dense training or a fine-tuning; the defaults are the usual recipe for CIFAR.

    Args:
        nesterov: use Nesterov's momentum, as ``torch.optim.SGD`` defines it.
        schedule: of the learning rate by epoch: "steps" divides it by 10 after a half and after three
            quarters of the epochs, "cosine" lets it fall towards 0.
        amp: autocast to bfloat16; parameters stay float32.

    The others are those of ``torch.optim.SGD`` and ``SearchSettings``.

    Raises:
        TypeError, ValueError: as of ``SearchSettings``.
    """

    epochs: int = 160
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "steps"
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    evaluate_every: int = 1
    log_every: int = 10
    workers: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        _require_common(self)
        if self.nesterov and self.momentum == 0:
            raise ValueError("momentum must be above 0 for nesterov, got 0")
        require_choice("schedule", self.schedule, LR_SCHEDULES)


def _require_common(settings: Any) -> None:
    """Check what searches and trainings have in common."""
    for field in fields(settings):
        value: Any = getattr(settings, field.name)
        wanted: Any = int | float if field.type is float else field.type
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise TypeError(f"{field.name} must be {getattr(wanted, '__name__', wanted)}, got {value!r}")
    least = {"epochs": 1, "batch_size": 1, "log_every": 1, "workers": 0, "seed": 0, "evaluate_every": 1}
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(settings, name)}")
    if settings.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {settings.seed}")
    for name in ("lr", "momentum", "weight_decay"):
        require_number(name, getattr(settings, name))
