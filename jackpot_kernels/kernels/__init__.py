"""Triton kernels of the masked layers: the mask is applied in registers, from one bit a weight.

Nothing here is imported before ``backend="fused"`` is used, and triton may be missing until then.
"""
