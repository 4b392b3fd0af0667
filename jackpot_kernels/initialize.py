"""Start a search: the first mask and scores of every masked layer (Eq. 8)."""

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from jackpot_kernels import budgets, criteria
from jackpot_kernels._validate import require_bool, require_values, require_whole
from jackpot_kernels.convert import MaskedLayer, require_masked_layers


def initialize(
    model: nn.Module,
    sparsity: float = 0.9,
    criterion: str | Mapping[str, Tensor] = "magnitude",
    budget: str | Mapping[str, int] = "global",
    keep_last_dense: bool = True,
    eta: float = 0.99,
    *,
    loss_fn: criteria.LossFunction | None = None,
    batches: criteria.Batches | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Set mask and scores of every masked layer: score 1 for kept weights, ``eta`` for pruned ones (Eq. 8).

    A layer keeps its first K weights by importance, larger first, ties lowest logical index; in the global
    budget the layer's position comes before the index. A second call starts again. Weights keep their bits.

    Args:
        model: network with masked layers, as ``convert`` makes it.
        sparsity: fraction to remove, in [0, 1), over the layers that the budget covers; ``ceil(sparsity *
            numel)`` weights go. Where that would leave a layer none, it keeps its best one and a warning says
            so.
        criterion: "magnitude", "snip", "grasp", "random", or the importance of each layer by name.
        budget: "global" (one selection by the criterion over all layers fixes what each keeps), "magnitude"
            (one by magnitude, whatever the criterion), "uniform", "erk", or the count that each layer keeps
            by name, and then ``sparsity`` is not used.
        keep_last_dense: the last masked layer keeps all its weights and the budget covers the others; its
            scores are frozen, so that no search moves it. A count given for it in ``budget`` goes before
            this.
        eta: first score of pruned weights, in [0, 1].
        loss_fn, batches: for "snip" and "grasp"; see ``criteria.snip``.
        generator: for "random"; torch's own when None.

    Raises:
        TypeError: when an argument has a wrong type.
        ValueError: when an argument has a wrong value, or no layer is left to prune. The model is then as it
            was.
    """
    layers = require_masked_layers(model)
    for name, layer in layers.items():
        require_whole(f"weight of {name!r}", layer.weight)
        require_values(f"weight of {name!r}", layer.weight)
    budgets.num_pruned(sparsity, 0)
    require_bool("keep_last_dense", keep_last_dense)
    eta = _checked_eta(eta)
    searched = _searched(layers, budget, keep_last_dense)
    importance = _importance(model, layers, searched, criterion, loss_fn, batches, generator)
    ranked = criteria.magnitude(searched) if budget == "magnitude" else importance
    num_kept = _num_kept(ranked, budget, sparsity)
    masks = {name: budgets.kept_masks([importance[name]], [num_kept[name]])[0] for name in searched}
    for name, layer in layers.items():
        mask = masks.get(name, torch.ones_like(layer.mask))
        layer.mask = mask
        with torch.no_grad():
            layer.scores.fill_(eta).masked_fill_(mask, 1.0)
        layer.scores.grad = None
        layer.scores.requires_grad_(name in searched)


def _checked_eta(eta: float) -> float:
    if isinstance(eta, bool) or not isinstance(eta, Real):
        raise TypeError(f"eta must be a number, got {type(eta).__name__}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    # Torch fills with no other numbers, such as fractions.
    return float(eta)


def _searched(
    layers: Mapping[str, MaskedLayer], budget: str | Mapping[str, int], keep_last_dense: bool
) -> dict[str, MaskedLayer]:
    """Return the layers that the budget covers."""
    last = list(layers)[-1]
    if not keep_last_dense or (isinstance(budget, Mapping) and last in budget):
        return dict(layers)
    if len(layers) == 1:
        raise ValueError(f"keep_last_dense must be False when {last!r} is the only masked layer, got True")
    return {name: layer for name, layer in layers.items() if name != last}


def _importance(
    model: nn.Module,
    layers: Mapping[str, MaskedLayer],
    searched: Mapping[str, MaskedLayer],
    criterion: str | Mapping[str, Tensor],
    loss_fn: criteria.LossFunction | None,
    batches: criteria.Batches | None,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    if isinstance(criterion, Mapping):
        whole = layers.keys() - searched.keys()
        importance = criteria.given(searched, {name: t for name, t in criterion.items() if name not in whole})
    elif criterion == "magnitude":
        importance = criteria.magnitude(searched)
    elif criterion == "random":
        importance = criteria.random(searched, generator)
    elif criterion in ("snip", "grasp"):
        if loss_fn is None or batches is None:
            missing = "loss_fn" if loss_fn is None else "batches"
            raise ValueError(f"{missing} must be given for criterion {criterion!r}, got None")
        gradient_criterion = criteria.snip if criterion == "snip" else criteria.grasp
        importance = gradient_criterion(model, loss_fn, batches)
    else:
        names = ", ".join(criteria.CRITERIA)
        raise ValueError(f"criterion must be one of {names} or a dict of tensors, got {criterion!r}")
    for name in searched:
        if not importance[name].isfinite().all():
            raise ValueError(f"importance of {name!r} must be finite, got NaN or inf")
    return {name: importance[name] for name in searched}


def _num_kept(
    importance: Mapping[str, Tensor], budget: str | Mapping[str, int], sparsity: float
) -> dict[str, int]:
    if isinstance(budget, Mapping):
        return budgets.given(importance, budget)
    if not isinstance(budget, str) or budget not in budgets.BUDGETS:
        raise ValueError(
            f"budget must be one of {', '.join(budgets.BUDGETS)} or a dict of counts, got {budget!r}"
        )
    return budgets.BUDGETS[budget](importance, sparsity)
