"""Find lottery jackpots: masks that remove most weights of a pre-trained network without training any.

An ordinary training loop between ``initialize`` and ``finalize``, with ``SRPopup`` as its optimizer, is a
search: see ``convert``, ``initialize``, ``SRPopup``, ``finalize`` and ``save_jackpot``.
"""

from importlib.metadata import version

from jackpot_kernels.convert import convert, finalize, masked_layers, overlap, sparsity
from jackpot_kernels.files import load_jackpot, save_jackpot
from jackpot_kernels.functional import (
    masked_conv1d,
    masked_conv2d,
    masked_conv2d_score_grad_,
    masked_conv3d,
    masked_linear,
    masked_linear_score_grad_,
)
from jackpot_kernels.initialize import initialize
from jackpot_kernels.layers import MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear
from jackpot_kernels.normalization import freeze_statistics, recalibrate
from jackpot_kernels.ops.dispatch import use_backend
from jackpot_kernels.ops.pack_mask import pack_mask, unpack_mask
from jackpot_kernels.ops.swap import swap_
from jackpot_kernels.ops.threshold import threshold
from jackpot_kernels.search import SRPopup

__version__ = version("jackpot_kernels")

__all__ = [
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedLinear",
    "SRPopup",
    "__version__",
    "convert",
    "finalize",
    "freeze_statistics",
    "initialize",
    "load_jackpot",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv2d_score_grad_",
    "masked_conv3d",
    "masked_layers",
    "masked_linear",
    "masked_linear_score_grad_",
    "overlap",
    "pack_mask",
    "recalibrate",
    "save_jackpot",
    "sparsity",
    "swap_",
    "threshold",
    "unpack_mask",
    "use_backend",
]
