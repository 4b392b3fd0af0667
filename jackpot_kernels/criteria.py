"""Criteria: the importance ``s`` of every weight that starts the mask (Eq. 8); more important ranks first."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from jackpot_kernels.convert import MaskedLayer, finalize, masked_layers

LossFunction = Callable[[Any, Any], Tensor]
Batches = Iterable[tuple[Any, Any]]

CRITERIA = ("magnitude", "snip", "grasp", "random")


def magnitude(layers: Mapping[str, MaskedLayer]) -> dict[str, Tensor]:
    """Importance ``|w|``.

    Args:
        layers: masked layers by name.

    Returns:
        float32 tensors of the weights' shapes, contiguous.
    """
    return {name: _as_importance(layer.weight.detach().abs()) for name, layer in layers.items()}


def random(layers: Mapping[str, MaskedLayer], generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Importance drawn uniformly from [0, 1), layer by layer, with the generator (torch's own when None).

    Drawn on the generator's device, and on the CPU without one, so that a seed gives one mask on any device.
    """
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    source = generator.device if generator is not None else torch.device("cpu")
    draws = {
        name: torch.rand(layer.weight.shape, generator=generator, dtype=torch.float32, device=source)
        for name, layer in layers.items()
    }
    return {name: draw.to(layers[name].weight.device) for name, draw in draws.items()}


def snip(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> dict[str, Tensor]:
    """Importance ``|w * g|`` with ``g = dL/dw`` at the whole network, averaged over the batches (SNIP).

    Runs on a copy in eval mode: weights, gradients, flags and normalisation statistics of ``model`` stay as
    they are.

    Args:
        model: network with masked layers; their masks do not matter.
        loss_fn: ``loss_fn(model(x), y)`` is a scalar.
        batches: pairs (x, y) on the model's device.

    Returns:
        float32 tensors of the weights' shapes, contiguous, by layer name.

    Raises:
        TypeError: when ``loss_fn`` is no function, or ``batches`` cannot be gone through.
        ValueError: when there is no batch.
    """
    _require_callable_and_batches(loss_fn, batches)
    whole, weights = _whole_copy(model)
    return {
        name: _as_importance((weights[name].detach().float() * gradient).abs())
        for name, gradient in _gradients(whole, weights, loss_fn, batches).items()
    }


def grasp(model: nn.Module, loss_fn: LossFunction, batches: Batches) -> dict[str, Tensor]:
    """Importance ``w * (H g)``: what a weight adds to the squared gradient norm, to first order (GraSP).

    Without weight ``i`` the squared norm ``g'g`` changes by ``-2 w_i (H g)_i``. To preserve the gradient
    flow, the weights go whose removal lowers it least, which are those with the highest ``-w * (H g)``, as in
    GraSP's published code; the text of arXiv 2104.08700 names the other end. Runs on a copy, as ``snip``
    does; the batches are held in memory, because they are needed twice.

    Args, Returns and Raises are those of ``snip``.
    """
    _require_callable_and_batches(loss_fn, batches)
    whole, weights = _whole_copy(model)
    batches = list(batches)
    gradients = _gradients(whole, weights, loss_fn, batches)
    products = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}  # H g
    for x, y in batches:
        loss = loss_fn(whole(x), y)
        parts = torch.autograd.grad(loss, list(weights.values()), create_graph=True, materialize_grads=True)
        pairs = zip(parts, gradients.values(), strict=True)
        norm = sum(((p.float() * g).sum() for p, g in pairs), parts[0].new_zeros((), dtype=torch.float32))
        # A loss that is linear in every weight has no second derivative.
        if norm.requires_grad:
            seconds = torch.autograd.grad(norm, list(weights.values()), materialize_grads=True)
            for product, second in zip(products.values(), seconds, strict=True):
                product += second.float() / len(batches)
    return {name: _as_importance(weights[name].detach().float() * hg) for name, hg in products.items()}


def given(layers: Mapping[str, MaskedLayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check the importance that a person gives: a floating-point tensor of the weight's shape for each layer.

    Raises:
        TypeError: when an entry is no floating-point tensor.
        ValueError: when a name is unknown or missing, or a shape is wrong.
    """
    for name in tensors:
        if name not in layers:
            raise ValueError(f"criterion must name masked layers, got {name!r}")
    for name, layer in layers.items():
        if name not in tensors:
            raise ValueError(f"criterion must name every masked layer, got none for {name!r}")
        tensor, shape = tensors[name], tuple(layer.weight.shape)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"criterion of {name!r} must be a floating-point tensor, got {kind}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"criterion of {name!r} must have shape {shape}, got {tuple(tensor.shape)}")
    return {
        name: _as_importance(tensors[name].detach().to(layer.weight.device)) for name, layer in layers.items()
    }


def _require_callable_and_batches(loss_fn: LossFunction, batches: Batches) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
    # Python goes through what has indices, too, as a torch Dataset.
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches must be pairs (x, y), got {type(batches).__name__}")


def _as_importance(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _whole_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a plain copy with nothing pruned, in eval mode, and the weights to differentiate by."""
    whole = deepcopy(model).eval().requires_grad_(False)
    names = list(masked_layers(whole))
    for layer in masked_layers(whole).values():
        layer.mask = torch.ones_like(layer.mask)
    whole = finalize(whole)
    return whole, {name: whole.get_submodule(name).get_parameter("weight").requires_grad_() for name in names}


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], loss_fn: LossFunction, batches: Batches
) -> dict[str, Tensor]:
    """Return ``dL/dw`` averaged over the batches, in float32."""
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count = 0
    for x, y in batches:
        parts = torch.autograd.grad(loss_fn(model(x), y), list(weights.values()), materialize_grads=True)
        for total, part in zip(totals.values(), parts, strict=True):
            total += part.float()
        count += 1
    if count == 0:
        raise ValueError("batches must hold at least one pair (x, y), got none")
    return {name: total / count for name, total in totals.items()}
