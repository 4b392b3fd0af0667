"""Checks that name the argument, what was wanted and what came, in one sentence."""

import os
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def require_choice(name: str, value: str, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def require_path(name: str, path: str | os.PathLike[str]) -> None:
    # An integer would open the file of that descriptor, and close it.
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {type(path).__name__}")


def require_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def require_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def require_tensors(name: str, tensors: Sequence[Tensor]) -> None:
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    for tensor in tensors:
        require_tensor(name, tensor)


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    require_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {_short(dtype)}, got {_short(tensor.dtype)}")


def require_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def require_sizes(name: str, shape: Sequence[int]) -> None:
    if isinstance(shape, torch.Size):
        return  # whose numbers are tensors while torch.jit traces
    whole = isinstance(shape, Sequence) and all(isinstance(n, Integral | torch.SymInt) for n in shape)
    if not whole or any(n < 0 for n in shape):
        raise TypeError(f"{name} must be a list of integers of at least 0, got {shape!r}")


def require_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on meta; load a state or use to_empty first")


def require_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def require_one_device(**arguments: Tensor | Sequence[Tensor] | None) -> None:
    """Refuse tensors of several devices; where one is on meta, torch runs an operator's fake, which asks."""
    lists = {name: [value] if isinstance(value, Tensor) else value or () for name, value in arguments.items()}
    tensors = [(name, tensor) for name, values in lists.items() for tensor in values]
    for name, tensor in tensors:
        require_device(name, tensor, tensors[0][1].device)


def require_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= float(value) <= LARGEST_FLOAT32:
        raise ValueError(f"{name} must be finite in float32 and at least 0, got {float(value)}")


def require_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= int(seed) < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    return int(seed)


def require_whole(name: str, tensor: Tensor) -> None:
    # A DTensor alone has this; to ask for its class would import torch.distributed.tensor.
    if hasattr(tensor, "full_tensor"):
        kind = type(tensor).__name__
        raise TypeError(
            f"{name} must be a plain tensor, got a {kind} (sharded by FSDP or tensor parallelism)"
        )


def num_words(numel: int) -> int:
    """Return how many int32 words hold the mask of ``numel`` weights."""
    return (numel + 31) // 32


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
