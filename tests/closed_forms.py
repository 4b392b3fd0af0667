"""Matmul and convolution under a mask, with gradients, in NumPy and float64; and how near is near enough."""

import itertools
import math

import numpy as np
import torch

PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def double(tensor):
    return tensor.detach().to(torch.float64).contiguous().numpy()


def linear(x, weight, mask, bias, grad):
    """Return y and the gradients of x, weight, scores and bias; all arrays are float64."""
    effective = weight * mask
    y = x @ effective.T + bias
    rows = grad.reshape(-1, len(weight))  # [N, M]
    g = rows.T @ x.reshape(-1, weight.shape[1])  # [M, K]
    return y, grad @ effective, g * mask, g * weight, rows.sum(0)


def conv(x, weight, mask, bias, grad_of, stride, dilation, groups, pads, mode="zeros"):
    """Return y and the gradients of x, weight, scores and bias.

    ``pads`` are (before, after) for each dimension; ``grad_of`` makes dL/dy from the shape of y.
    """
    # Where each padded element comes from; -1 stands for a zero.
    zeros = {"constant_values": -1} if mode == "zeros" else {}
    source = np.pad(np.arange(x.size).reshape(x.shape), [(0, 0), (0, 0), *pads], PAD_MODES[mode], **zeros)
    padded = np.where(source >= 0, x.reshape(-1)[source], 0)
    kernel = weight.shape[2:]
    geometry = list(zip(padded.shape[2:], kernel, stride, dilation, strict=True))
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in geometry]
    effective = (weight * mask).reshape(groups, -1, *weight.shape[1:])  # [G, O / G, I / G, ...]
    grad = grad_of((len(x), len(weight), *out))
    y = np.zeros((len(x), groups, effective.shape[1], math.prod(out)))  # [N, G, O / G, P]
    dy = grad.reshape(y.shape)
    g, dpadded = np.zeros_like(effective), np.zeros_like(padded)
    for offset in itertools.product(*map(range, kernel)):
        starts = [d * k for d, k in zip(dilation, offset, strict=True)]
        taps = [slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, out, strict=True)]
        window = padded[(..., *taps)]  # [N, I, ...]
        columns = window.reshape(len(x), groups, weight.shape[1], math.prod(out))  # [N, G, I / G, P]
        tap = (..., *offset)
        y += np.einsum("ngip,goi->ngop", columns, effective[tap])
        g[tap] = np.einsum("ngip,ngop->goi", columns, dy)
        dpadded[(..., *taps)] += np.einsum("ngop,goi->ngip", dy, effective[tap]).reshape(window.shape)
    dx = np.zeros(x.size)
    np.add.at(dx, source[source >= 0], dpadded[source >= 0])
    g = g.reshape(weight.shape)
    per_channel = grad.reshape(len(x), len(weight), math.prod(out))  # [N, O, P]
    y = y.reshape(per_channel.shape) + bias[:, None]
    return y.reshape(grad.shape), dx.reshape(x.shape), g * mask, g * weight, per_channel.sum((0, 2))


def assert_near(ours, theirs, truth, dtype):
    """Our error is at most twice PyTorch's own in the same dtype, plus a rounding of the largest element."""
    assert ours.shape == truth.shape
    if truth.size == 0:
        return
    error, their_error = (np.abs(double(t) - truth).max() for t in (ours, theirs))
    floor = 2 * torch.finfo(dtype).eps * np.abs(truth).max()
    assert error <= 2 * their_error + floor, (error, their_error, floor)
