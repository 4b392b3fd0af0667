"""The operators: one file each, under the same name on every floor from schema to benchmark."""

from jackpot_kernels import _extension

_extension.load()
