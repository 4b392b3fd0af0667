"""Tensors as the copy engine of Hopper and what came after it moves them, a tile at a time."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def has_whole_rows(matrix: Tensor) -> bool:
    """Tell whether rows lie one behind the other and start at multiples of 16 bytes."""
    row, column = matrix.stride()
    starts_aligned = matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0
    return column == 1 and row >= matrix.shape[1] and starts_aligned


def describe(tensor: Tensor, *tile: int) -> TensorDescriptor:
    """Return what a kernel loads and stores tiles of a tensor with."""
    return TensorDescriptor.from_tensor(tensor, list(tile))
