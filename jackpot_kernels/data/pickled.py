"""Pickles of plain values and uint8 arrays, read without executing what they name."""

import pickle
from io import BytesIO
from typing import Any

import numpy as np


def read_pickled(content: bytes) -> Any:
    """Return what a pickle of Python 2 holds: containers, byte strings, numbers and arrays of uint8.

    The three names by which NumPy pickles an array stand for builders of our own, and every other name is
    refused: nothing that a pickle asks for is imported or called. Arrays are found in the dictionary that the
    pickle is, not deeper.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        values = _Unpickler(BytesIO(content), encoding="bytes").load()
    except Exception as error:
        raise ValueError(f"pickle must be whole and hold plain values and uint8 arrays ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"pickle must hold a dictionary, got {type(values).__name__}")
    return {key: value.array if isinstance(value, _Array) else value for key, value in values.items()}


class _Array:
    """Stands for ``numpy.ndarray``: made empty, then given its state."""

    array = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, column_major, raw = state
        if not isinstance(dtype, _Dtype) or dtype.name != b"u1" or column_major:
            raise ValueError("its array is of another type or order")
        self.array = np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    """Stands for ``numpy.dtype``, known by its name alone."""

    def __init__(self, name: Any, *flags: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*arguments: Any) -> _Array:
    return _Array()


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it names {module}.{name}")
        return _KNOWN[module, name]
