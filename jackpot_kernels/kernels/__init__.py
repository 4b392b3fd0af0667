"""Triton kernels of the masked layers: the mask is applied in registers, from one bit a weight.

Before an operator of kernels first runs, nothing here is imported but `availability` and `tuning`, which need
no triton: it may be missing until then.
"""
