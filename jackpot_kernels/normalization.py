"""Batch normalisation while weights are pruned: its statistics move, stay, or are estimated again."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from jackpot_kernels._validate import require_module


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Estimate the running statistics of batch normalisation again, as their mean over the batches.

    Every batch counts alike. Only ``running_mean``, ``running_var`` and ``num_batches_tracked`` change;
    everything else runs in eval mode, and training flags and momenta are put back. When a batch fails, the
    statistics are put back too.

    Args:
        model: network; layers held by ``freeze_statistics`` are estimated as well, and stay frozen.
        batches: inputs on the model's device, or tuples that begin with them, such as (x, y).

    Raises:
        ValueError: when there is no batch, or no batch normalisation with running statistics.
    """
    norms = _norms(model)
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    training = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        for module, _ in training:
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            # Without a momentum the running statistics are the mean over all batches since the reset.
            norm.training, norm.momentum = True, None
        if _run(model, batches) == 0:
            raise ValueError("batches must hold at least one batch, got none")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers(recurse=False):
                buffer.copy_(buffers[name])
        raise
    finally:
        for module, flag in training:
            module.training = flag
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def freeze_statistics(model: nn.Module, frozen: bool = True) -> None:
    """Keep batch normalisation in eval mode through every ``model.train()``; its statistics do not move.

    A momentum of 0 would not do, because training mode normalises by the statistics of the batch. So
    ``train`` of each such layer is replaced on the instance; this survives ``deepcopy`` and pickle. With
    ``frozen=False`` it is undone, and the layers follow their parents' mode from the next ``model.train()``
    on.

    Raises:
        ValueError: when there is no batch normalisation with running statistics.
    """
    for norm in _norms(model):
        if frozen:
            norm.eval()
            norm.train = partial(_stay_in_eval, norm)  # type: ignore[method-assign,assignment]
        else:
            vars(norm).pop("train", None)


def _stay_in_eval(norm: nn.Module, mode: bool = True) -> nn.Module:
    return norm


def _norms(model: nn.Module) -> list[_BatchNorm]:
    require_module(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(
            f"model must hold batch normalisation with running statistics, got {type(model).__name__}"
        )
    return norms


def _run(model: nn.Module, batches: Iterable[Any]) -> int:
    count = 0
    with torch.no_grad():
        for count, batch in enumerate(batches, 1):  # noqa: B007
            model(batch[0] if isinstance(batch, tuple | list) else batch)
    return count
