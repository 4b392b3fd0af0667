"""Turn a plain network into a masked one and back, and tell what is pruned."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from jackpot_kernels._validate import require_dtype, require_module, require_whole
from jackpot_kernels.layers import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedLayer,
    MaskedLinear,
    not_a_parameter,
)

_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
}
# In eval mode these read the weights of their layers instead of calling them, unless this attribute is false.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_FAST_PATH_BEFORE = "_fast_path_before_convert"


class Sparsity(NamedTuple):
    """Fractions removed, each in [0, 1]; see ``sparsity``."""

    masked: float
    overall: float


def convert(model: nn.Module, exclude: str | Iterable[str] = ()) -> nn.Module:
    """Replace every ``nn.Linear`` and ``nn.Conv1d/2d/3d`` by its masked layer, in place.

    Nothing is pruned yet. All parameters are frozen, those of excluded layers, biases and normalisation too;
    only scores take gradients. Only these exact types are replaced: a subclass may read its weight without
    calling ``forward``, as the output projection of ``nn.MultiheadAttention`` does. Exclude others whose
    weight is read without calling them: no mask applies there. A layer that stands in several places stays
    one layer. A weight that other modules share (an embedding, say) stays shared and whole there: it is
    masked in the converted layer only, and ``finalize`` parts them. Layers that are masked already stay as
    they are. Hooks and attributes of a replaced layer go along.

    Args:
        model: any network; its weights keep their bits.
        exclude: names of modules, or patterns such as ``"*.downsample.*"``, that stay plain with all they
            contain.

    Returns:
        ``model`` itself, or the masked layer when ``model`` is a single layer.

    Raises:
        ValueError: when there is no layer to mask, an entry of ``exclude`` matches none or a masked one, a
            weight is empty, not floating-point or computed by a hook, a layer has a ``forward`` of its own,
            or a lazy module has not run yet. The model is then as it was.
        TypeError: when ``model`` is no module or its parameters are sharded. The model is then as it was.
    """
    require_module(model)
    for name, parameter in model.named_parameters():
        require_whole(f"parameter {name!r}", parameter)
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} must have a shape, got a lazy one; run the model once first"
            )
    places = list(model.named_modules(remove_duplicate=False))
    excluded = _excluded(places, (exclude,) if isinstance(exclude, str) else exclude)
    plain = [(name, m) for name, m in places if type(m) in _MASKED and id(m) not in excluded]
    if not plain and not masked_layers(model):
        raise ValueError(
            f"model must hold an nn.Linear or nn.Conv1d/2d/3d to mask, got {type(model).__name__}"
        )
    for name, layer in plain:
        _require_maskable(name, layer)
    masked = {id(layer): _MASKED[type(layer)].from_dense(layer) for _, layer in plain}
    model = _replace(model, [(name, masked[id(layer)]) for name, layer in plain])
    scores = {id(layer.scores) for layer in masked_layers(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in scores:
            parameter.requires_grad_(False)
    _leave_fast_paths(model)
    return model


def finalize(model: nn.Module) -> nn.Module:
    """Replace every masked layer by the plain one that holds ``weight * mask``, in place; pruned is +0.

    Parameters stay frozen, or not, as they were.

    Returns:
        ``model`` itself, or the plain layer when ``model`` is a single masked layer.

    Raises:
        TypeError: when ``model`` is no module or a weight is sharded.
        ValueError: when there is no masked layer, or a parametrization computes what one holds.
    """
    for name, layer in require_masked_layers(model).items():
        for key in ("weight", "bias", "scores"):
            if key not in layer._parameters:
                raise ValueError(not_a_parameter(f"{key} of {name!r}"))
        require_whole(f"weight of {name!r}", layer.weight)
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, MaskedLayer)]
    plain = {id(layer): _to_plain(layer) for _, layer in places}
    model = _replace(model, [(name, plain[id(layer)]) for name, layer in places])
    for module in model.modules():
        if _FAST_PATH_BEFORE in vars(module):
            setattr(module, *vars(module).pop(_FAST_PATH_BEFORE))
    return model


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Return the masked layers by name, in module order; a layer that stands in several places comes once.

    Raises:
        TypeError: when ``model`` is no module.
    """
    require_module(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def searched_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Return those whose scores require a gradient, as ``masked_layers`` does.

    Raises:
        ValueError: when there is none.
    """
    layers = {name: layer for name, layer in masked_layers(model).items() if layer.scores.requires_grad}
    if not layers:
        raise ValueError(
            f"model must hold masked layers to search (see convert), got {type(model).__name__} without"
        )
    return layers


def sparsity(model: nn.Module) -> Sparsity:
    """Return the fraction of weights removed, over the masked layers and over the whole network.

    ``masked`` is over the weights of the masked layers; the last of them, when it is kept whole as
    ``initialize`` does by default, does not count there. ``overall`` is over all of the network's weights:
    every parameter of two or more dimensions, so linear and convolution weights, masked or not, embeddings
    and attention projections, but no biases and no normalisation.

    Raises:
        TypeError: when ``model`` is no module.
        ValueError: when there is no masked layer, or masks are on the meta device.
    """
    layers = list(require_masked_layers(model).values())
    numel = [layer.weight.numel() for layer in layers]
    kept = [layer.num_kept for layer in layers]
    searched = len(layers) - 1 if len(layers) > 1 and kept[-1] == numel[-1] else len(layers)
    return Sparsity(
        masked=1 - sum(kept[:searched]) / sum(numel[:searched]),
        overall=(sum(numel) - sum(kept)) / (sum(numel) + num_plain_weights(model)),
    )


def overlap(
    masks_a: nn.Module | Mapping[str, Tensor] | Tensor, masks_b: nn.Module | Mapping[str, Tensor] | Tensor
) -> float:
    """Return the share of weights on which two masks agree, ``1 - ||m_a - m_b||_1 / k`` (Eq. 7).

    Args:
        masks_a, masks_b: bool tensors, dicts of them by layer name, or models with masked layers.

    Raises:
        TypeError: when a mask is no bool tensor.
        ValueError: when names or shapes differ, or there is no weight to compare.
    """
    a, b = _named_masks("masks_a", masks_a), _named_masks("masks_b", masks_b)
    if a.keys() != b.keys():
        raise ValueError(
            f"masks_a and masks_b must name the same layers, got {sorted(a.keys() ^ b.keys())} in one only"
        )
    differing = 0
    for name, mask in a.items():
        for other in (mask, b[name]):
            require_dtype(f"mask of {name!r}", other, torch.bool)
        if mask.shape != b[name].shape:
            raise ValueError(
                f"masks of {name!r} must have one shape, got {tuple(mask.shape)} and {tuple(b[name].shape)}"
            )
        differing += int((mask != b[name].to(mask.device)).sum())
    total = sum(mask.numel() for mask in a.values())
    if total == 0:
        raise ValueError("masks_a and masks_b must hold at least one weight, got none")
    return 1 - differing / total


def _excluded(places: Iterable[tuple[str, nn.Module]], patterns: Iterable[str]) -> set[int]:
    """Return the identities of the layers that a pattern names, or whose containing module it names."""
    layers = [(name, m) for name, m in places if type(m) in _MASKED or isinstance(m, MaskedLayer)]
    excluded: set[int] = set()
    if not isinstance(patterns, Iterable):
        raise TypeError(f"exclude must hold names, got {type(patterns).__name__}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude must hold names, got {type(pattern).__name__}")
        matched = [
            (name, m) for name, m in layers if any(fnmatchcase(path, pattern) for path in _paths(name))
        ]
        if not matched:
            raise ValueError(f"exclude must name layers that can be masked, got {pattern!r}")
        for name, module in matched:
            if isinstance(module, MaskedLayer):
                raise ValueError(
                    f"exclude must name plain layers, but {pattern!r} names {name!r}, which is masked already"
                )
            excluded.add(id(module))
    return excluded


def _paths(name: str) -> Iterator[str]:
    """Yield the name itself and those of the modules that contain it."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _require_maskable(name: str, layer: nn.Module) -> None:
    if "forward" in vars(layer):
        raise ValueError(f"forward of {name!r} must be that of its class, got one of its own; exclude it")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"weight of {name!r} must be a parameter, but a hook computes it; remove the hook or exclude it"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight of {name!r} must be floating-point, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"weight of {name!r} must not be empty, got shape {list(weight.shape)}")


def require_masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Return the masked layers by name, or refuse a model that has none."""
    layers = masked_layers(model)
    if not layers:
        raise ValueError(
            f"model must hold masked layers (see convert), got {type(model).__name__} without any"
        )
    return layers


def _replace(model: nn.Module, replacements: Iterable[tuple[str, nn.Module]]) -> nn.Module:
    for name, module in replacements:
        if not name:
            return module
        model.set_submodule(name, module)
    return model


def _to_plain(layer: MaskedLayer) -> nn.Module:
    plain = layer.to_dense()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    return plain


def _leave_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for kind, switch in _FAST_PATHS.items():
            if isinstance(module, kind) and _FAST_PATH_BEFORE not in vars(module) and masked_layers(module):
                setattr(module, _FAST_PATH_BEFORE, (switch, getattr(module, switch, False)))
                setattr(module, switch, False)


def num_plain_weights(model: nn.Module) -> int:
    """Count the weights outside masked layers, shared ones once."""
    plain = [module for module in model.modules() if not isinstance(module, MaskedLayer)]
    sizes = {id(p): p.numel() for m in plain for p in m.parameters(recurse=False) if p.dim() > 1}
    return sum(sizes.values())


def _named_masks(name: str, masks: nn.Module | Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
    if isinstance(masks, nn.Module):
        return {name: layer.mask for name, layer in require_masked_layers(masks).items()}
    if not isinstance(masks, Tensor | Mapping):
        raise TypeError(f"{name} must be a mask, a dict of masks or a model, got {type(masks).__name__}")
    return {"mask": masks} if isinstance(masks, Tensor) else dict(masks)
