"""Layers whose weight stands still while a mask over it is searched."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jackpot_kernels._validate import require_dtype, require_shape, require_values
from jackpot_kernels.functional import (
    compute_dtype,
    convolution,
    linear,
    require_convolution,
    require_linear,
)
from jackpot_kernels.ops import masked_conv, masked_linear
from jackpot_kernels.ops.dispatch import choose_backend
from jackpot_kernels.ops.effective_weight import effective_weight
from jackpot_kernels.ops.masked import differentiable
from jackpot_kernels.ops.pack_mask import has_bits_after, pack_mask, unpack_mask

Layer = TypeVar("Layer", bound="MaskedLayer")
_TENSORS = ("weight", "bias", "scores", "mask_words")
# Where a module keeps its parameters or buffers. As attributes they are found by a search in Python, which a
# forward pass of a frozen dense layer, from the cold caches that a convolution leaves, would rather not make.
_Tensors = dict[str, Any]


class MaskedLayer(nn.Module):
    """What a plain layer gains under a mask; a mixin that stands before its ``nn`` class.

    ``weight`` has any floating dtype and memory format. ``scores`` is a float32 Parameter, ``mask_words`` the
    packed mask, both in logical row-major order; neither changes with the layer's dtype or memory format.
    The words are bits, which no average of models may touch.

    ``backend`` is as for ``jackpot_kernels.masked_linear``, and may be set at any time. With "dense" and
    "mixed" the layer keeps ``weight * mask`` in the compute dtype, with "fused" nothing, or ``weight`` in the
    compute dtype where that is not its own. Write to weight and mask by torch's in-place operations, or give
    the layer others: nothing tells it of a write through ``.data`` or NumPy, nor a compiled one of any.
    """

    backend: str = "auto"
    weight: Tensor
    bias: Any
    scores: nn.Parameter
    mask_words: Tensor

    # The plain class, those of its arguments that it keeps as attributes; the operation and its kernels.
    _plain: ClassVar[type[nn.Module]]
    _arguments: ClassVar[tuple[str, ...]]
    _operation: ClassVar[str]
    _kernels: ClassVar[Collection[str]]

    # The effective weight is built when a forward pass first needs it, and again when weight or mask are not
    # the tensors, in the state, that it was built from. Whoever patches it together with the mask, as the
    # optimizer does at each step, writes to both once: what counts is by how many writes the mask is ahead.
    _effective: Tensor | None = None
    _built_from: tuple[Tensor | None, Tensor | None] = (None, None)
    _built_at: tuple[int, ...] = ()

    # What the fused kernels read where the compute dtype is not the weight's, and what it was cast from.
    _cast: Tensor | None = None
    _cast_from: tuple[Tensor | None, int, int] = (None, 0, 0)

    @classmethod
    def from_dense(cls: type[Layer], module: nn.Module) -> Layer:
        """Return the masked layer of a plain one: it shares weight and bias, now frozen, and prunes nothing.

        Hooks go along, and so do attributes, tensors and modules that were put on it.

        Raises:
            TypeError: ``module`` is not of the plain class.
        """
        if not isinstance(module, cls._plain):
            raise TypeError(f"module must be an nn.{cls._plain.__name__}, got {type(module).__name__}")
        layer = _blank(cls, module, cls._arguments)
        layer.weight, layer.bias = module.weight, module.bias
        for frozen in (layer.weight, layer.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        layer._keep_all()
        return layer

    def to_dense(self) -> nn.Module:
        """Return a plain layer of its own that holds ``weight * mask``; it takes gradients."""
        plain = _blank(self._plain, self, self._arguments)
        plain.weight = nn.Parameter(effective_weight(self.weight, self.mask_words))
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return plain

    def reset_parameters(self) -> None:
        """Draw weight and bias as the plain layer does; keep every weight, with a score of 1."""
        super().reset_parameters()  # type: ignore[misc]
        self._keep_all()

    def _keep_all(self) -> None:
        shape, device = self.weight.shape, self.weight.device
        if 0 in shape:
            raise ValueError(f"weight must have no empty dimension, got shape {list(shape)}")
        words = pack_mask(torch.ones(shape, dtype=torch.bool, device=device))
        if "scores" not in self._parameters or self.scores.device != device:
            self.scores = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))
            self.register_buffer("mask_words", words)
            return
        with torch.no_grad():
            self.scores.fill_(1)
            self.mask_words.copy_(words)

    @property
    def mask(self) -> Tensor:
        """A fresh bool tensor of the weight's shape, True where kept; assign one to change the mask."""
        return unpack_mask(self.mask_words, self.weight.shape)

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        require_dtype("mask", mask, torch.bool)
        require_shape("mask", mask, self.weight.shape)
        self.mask_words.copy_(pack_mask(mask.to(self.mask_words.device)))
        self._effective = None

    @property
    def num_kept(self) -> int:
        """How many weights the mask keeps; waits for the device."""
        require_values("mask", self.mask_words)
        return int(self.mask.sum())

    @property
    def sparsity(self) -> float:
        """The fraction of weights removed, in [0, 1]; waits for the device."""
        return 1 - self.num_kept / self.weight.numel()

    def extra_repr(self) -> str:
        known = "" if self.mask_words.is_meta else f", sparsity={self.sparsity:.4g}"
        return super().extra_repr() + known

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``weight * mask`` (Eq. 4) in ``dtype``, by default that of a forward pass here and now.

        The tensor is kept, and patched in place by the optimizer: do not write to it. ``torch.compile`` takes
        a kept one as it is and keeps none: the fastest graph is that of a layer that ran once before.
        ``torch.export`` takes none.
        """
        parameters: _Tensors = self._parameters
        buffers: _Tensors = self._buffers
        weight, words, kept = parameters["weight"], buffers["mask_words"], self._effective
        if dtype is None:
            dtype = compute_dtype(weight)
        elif not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
        if kept is not None and kept.dtype != dtype:
            kept = None
        if torch.compiler.is_compiling():
            # An exported program would hold a kept one as a constant, whatever weights it loads.
            if kept is None or torch.compiler.is_exporting():
                return effective_weight(weight, words, dtype)
            return kept
        if kept is not None and self._is_fresh(weight, words, kept):
            return kept
        # A tensor made in inference mode could be neither saved for a later backward pass nor patched.
        with torch.inference_mode(False):
            self._effective = made = effective_weight(weight, words, dtype)
        self._built_from, self._built_at = (weight, words), _state(weight, words, made)
        return made

    @property
    def cached_effective_weight(self) -> Tensor | None:
        """The effective weight that is kept; None if none is kept up to date."""
        if self._effective is not None and not self._is_fresh(self.weight, self.mask_words, self._effective):
            self._effective = None
        return self._effective

    @property
    def patchable_effective_weight(self) -> Tensor | None:
        """The effective weight to patch in place together with the mask; None if none is kept.

        It may be out of date, which is too slow to ask at every step and layer: the next forward pass asks,
        and builds it anew where it is.
        """
        return self._effective

    def keep_nothing(self) -> None:
        """Drop what is kept of the weight; a forward pass that needs it makes it anew."""
        self._effective = self._cast = None

    @property
    def cached_cast_weight(self) -> Tensor | None:
        """The weight in the compute dtype that is kept for the fused kernels; None if none is up to date."""
        if self._cast is not None and not self._is_cast_of(self.weight):
            self._cast = None
        return self._cast

    def _is_cast_of(self, weight: Tensor) -> bool:
        source, address, version = self._cast_from
        return source is weight and (address, version) == (weight.data_ptr(), _version(weight))

    def _is_fresh(self, weight: Tensor, words: Tensor, made: Tensor) -> bool:
        old_weight, old_words = self._built_from
        return weight is old_weight and words is old_words and self._built_at == _state(weight, words, made)

    def _prepare(self, x: Tensor, groups: int = 1) -> tuple[str, Tensor | None]:
        """Return the backend of a forward pass, and what its kernel may use besides weight and mask.

        A weight that is not frozen changes, and is masked or cast anew there.
        """
        parameters: _Tensors = self._parameters
        try:
            weight, _ = parameters["weight"], parameters["scores"]
        except KeyError as error:
            raise RuntimeError(not_a_parameter(error.args[0])) from None
        backend = choose_backend(self._operation, self.backend, self._kernels, x, weight, groups)
        if weight.requires_grad or backend == "reference":
            keeps = self._effective is not None or self._cast is not None
            if keeps and weight.requires_grad:
                self._effective = self._cast = None
            return backend, None
        if backend != "fused":
            return backend, self.effective_weight()
        if self._effective is not None and not torch.compiler.is_compiling():
            self._effective = None
        return backend, self._cast_weight()

    def _differentiable(self, kept: Tensor | None) -> Tensor:
        """Return the effective weight with its gradients, for the plain layer's own forward pass.

        That pass checks its arguments in C++; only when it fails are they looked at here, to say in one
        sentence what did not fit. To check them beforehand took 1.5 ms of the 128 of a forward pass of
        ResNet-32 at 64 images.
        """
        parameters: _Tensors = self._parameters
        buffers: _Tensors = self._buffers
        weight = parameters["weight"]
        dtype = compute_dtype(weight) if kept is None else kept.dtype
        return differentiable(weight, parameters["scores"], buffers["mask_words"], kept, dtype)

    def _cast_weight(self) -> Tensor | None:
        """Return the weight in the compute dtype, kept as the effective weight is; None if it has that."""
        weight, kept = self.weight, self._cast
        dtype = compute_dtype(weight)
        if weight.dtype == dtype:
            return None
        if kept is not None and kept.dtype != dtype:
            kept = None
        if torch.compiler.is_compiling():
            return weight.to(dtype) if kept is None or torch.compiler.is_exporting() else kept
        if kept is not None and self._is_cast_of(weight):
            return kept
        with torch.inference_mode(False):
            self._cast = made = weight.detach().to(dtype)
        self._cast_from = weight, weight.data_ptr(), _version(weight)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._effective = self._cast = None
        exact = {id(self.scores), id(self.scores.grad), id(self.mask_words)}

        def moved(tensor: Tensor) -> Tensor:
            """Apply ``fn``, of which scores and mask take the device only."""
            result = fn(tensor)
            same = result.dtype == tensor.dtype and result.stride() == tensor.stride()
            return result if same or id(tensor) not in exact else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        self._effective = self._cast = None
        scores, words = state_dict.get(prefix + "scores"), state_dict.get(prefix + "mask_words")
        state_dict = dict(state_dict)
        # With assign=True the tensors themselves become the layer's.
        if isinstance(scores, Tensor):
            state_dict[prefix + "scores"] = scores.to(torch.float32).contiguous()
        if isinstance(words, Tensor) and words.dtype != torch.int32:
            args[-1].append(
                f"{prefix}mask_words must be int32, got {str(words.dtype).removeprefix('torch.')}"
            )
            state_dict[prefix + "mask_words"] = self.mask_words
        elif isinstance(words, Tensor) and has_bits_after(words, self.weight.numel()):
            args[-1].append(f"{prefix}mask_words must have no bits after the last weight, got some")
            state_dict[prefix + "mask_words"] = self.mask_words
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles rebuild what is kept when they need it.
        made = {"_effective": None, "_built_from": (None, None), "_cast": None, "_cast_from": (None, 0, 0)}
        return super().__getstate__() | made


class MaskedLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` under a mask, with the same arguments: ``x @ (weight * mask).T + bias`` (Eq. 4)."""

    _plain = nn.Linear
    _arguments = ("in_features", "out_features")
    _operation, _kernels = "masked_linear", masked_linear.KERNELS

    def forward(self, x: Tensor) -> Tensor:
        backend, kept = self._prepare(x)
        if backend == "dense":
            try:
                return F.linear(x, self._differentiable(kept), self.bias)
            except RuntimeError:
                require_linear(x, self.weight, self.bias)
                raise
        return linear(x, self.weight, self.scores, self.mask_words, kept, self.bias, backend)


class _MaskedConv(MaskedLayer, nn.modules.conv._ConvNd):
    """The forward pass of every masked convolution."""

    _arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    _operation, _kernels = "masked_conv", masked_conv.KERNELS

    def forward(self, x: Tensor) -> Tensor:
        backend, kept = self._prepare(x, self.groups)
        if backend == "dense":
            try:
                return self._conv_forward(x, self._differentiable(kept), self.bias)
            except RuntimeError:
                require_convolution(x, self.weight, self.bias, self.groups)
                raise
        padding: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return convolution(
            x,
            self.weight,
            self.scores,
            self.mask_words,
            kept,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            backend,
        )


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """``nn.Conv1d`` under a mask, with the same arguments: a convolution with ``weight * mask`` (Eq. 4)."""

    _plain = nn.Conv1d


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """``nn.Conv2d`` under a mask, with the same arguments: a convolution with ``weight * mask`` (Eq. 4)."""

    _plain = nn.Conv2d


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """``nn.Conv3d`` under a mask, with the same arguments: a convolution with ``weight * mask`` (Eq. 4)."""

    _plain = nn.Conv3d


def not_a_parameter(name: str) -> str:
    return f"{name} must be a parameter, got one that a parametrization or a hook computes"


def _blank(kind: type[Any], like: Any, arguments: tuple[str, ...]) -> Any:
    """Return a layer of another class with the arguments of ``like`` and tensors without memory."""
    kept = {name: getattr(like, name) for name in arguments}
    layer = kind(**kept, bias=like.bias is not None, device="meta", dtype=like.weight.dtype)
    _carry_over(like, layer)
    return layer


def _carry_over(like: nn.Module, layer: nn.Module) -> None:
    """Give a layer what else stands on another: hooks, and what a person has put there."""
    own, of_modules = vars(layer), vars(nn.Module())
    for name, value in vars(like).items():
        if name in ("_parameters", "_buffers", "_modules"):
            own[name].update({key: v for key, v in value.items() if key not in (*own[name], *_TENSORS)})
        elif name in of_modules or not (name in own or hasattr(MaskedLayer, name)):
            own[name] = value


def _state(weight: Tensor, words: Tensor, made: Tensor) -> tuple[int, ...]:
    """Return what changes when weight or mask are given other memory, or written to without ``made``."""
    ahead = _version(words) - made._version
    return weight.data_ptr(), _version(weight), words.data_ptr(), ahead


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
