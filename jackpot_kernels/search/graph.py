"""A whole training step in one CUDA graph: forward, loss, backward, and the step of the optimizer."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from jackpot_kernels.search.captured import CapturedLayers, capturing_layers

_Layout = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


class GraphedStep:
    """One training step a call, captured once and then replayed, so that the host no longer slows the device.

    >>> step = GraphedStep(optimizer, lambda x, y: loss_fn(model(x), y))
    >>> for x, y in loader:
    ...     loss = step(x, y)

    Each call takes exactly one step, with the bits that the same step has without a graph. The first
    ``warm_up`` calls run step by step, as do those on a CPU, those whose inputs have shapes that did not run
    before the capture, and those whose shapes are not the captured ones, such as the last batch of an epoch.
    Learning rates and other settings of ``SRPopup`` may change from call to call, those of another optimizer
    where they are tensors on the device; masks or weights of masked layers that others change lead to a new
    capture.

    Args:
        optimizer: of the model that ``compute`` runs, ``SRPopup`` or one of torch's whose step waits for
            nothing; no other gradients than its own are cleared.
        compute: from the inputs to the loss, or to a tuple that begins with the loss; its work on the device
            must be the same at every call, and wait for nothing.
        scaler: for float16 autocast; its scale and its found-inf stay on the device.
        warm_up: steps before the capture, at least 1, for libraries to choose their algorithms.
        model: with masked layers that ``compute`` runs; ``SRPopup`` knows its own.

    Raises:
        ValueError: ``warm_up`` is below 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute: Callable[..., Tensor | tuple[Tensor, ...]],
        scaler: torch.amp.GradScaler | None = None,
        warm_up: int = 3,
        model: nn.Module | None = None,
    ) -> None:
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {warm_up}")
        self._optimizer, self._compute, self._scaler, self._model = optimizer, compute, scaler, model
        self._left = warm_up
        # Layouts of inputs that ran without a graph: for others, libraries have chosen no algorithms yet, and
        # in a capture they cannot time any.
        self._warm: set[_Layout] = set()
        # One for all steps without a graph: what a stream has freed serves no other.
        self._aside: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured = CapturedLayers(None)
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Take a step and return what ``compute`` returned, detached; the loss is that before the step."""
        if not (inputs and all(x.is_cuda for x in inputs)):
            self._optimizer.zero_grad()
            outputs = self._step(inputs)
        else:
            # Streams and graphs belong to the current device, which need not be that of the model.
            with torch.cuda.device(inputs[0].device):
                outputs = self._step_on_device(inputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _step_on_device(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._graph is not None and not self._captured.is_current:
            self._graph, self._captured, self._left = None, CapturedLayers(None), 1
        layout = _layout(inputs)
        if self._graph is None and self._left == 0 and layout in self._warm:
            self._capture(inputs)
        if self._graph is not None and layout == _layout(self._inputs):
            return self._replay(inputs)
        self._left = max(0, self._left - 1)
        self._warm.add(layout)
        return self._eager_step(inputs)

    def _eager_step(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._optimizer.zero_grad()
        # Capture runs on a stream of its own, where what was set up on the default stream would be a trap.
        present, aside = torch.cuda.current_stream(), self._aside or torch.cuda.Stream()
        self._aside = aside
        aside.wait_stream(present)
        try:
            with torch.cuda.stream(aside):
                outputs = self._step(inputs)
        finally:  # also what has begun and then failed may still read them
            present.wait_stream(aside)
            for x in inputs:
                x.record_stream(aside)
        for output in outputs:
            output.record_stream(present)
        return outputs

    def _step(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        computed = self._compute(*inputs)
        outputs = computed if isinstance(computed, tuple) else (computed,)
        if self._scaler is None:
            outputs[0].backward()
            self._optimizer.step()
        else:
            self._scaler.scale(outputs[0]).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return tuple(output.detach() for output in outputs)

    def _capturing(self) -> AbstractContextManager[CapturedLayers]:
        """Return what surrounds a capture, and yields what was captured."""
        capturing: Callable[[], AbstractContextManager[CapturedLayers]] | None
        capturing = getattr(self._optimizer, "capturing", None)
        return capturing() if capturing else capturing_layers(self._model)

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [x.clone() for x in inputs]
        # Gradients that the graph itself makes stay where they are from replay to replay.
        self._optimizer.zero_grad()
        # On a stream of its own, for torch's is on the device that captured first. Other threads, such as one
        # that pins batches, may go on meanwhile.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with self._capturing() as captured, capture:
            self._outputs = self._step(tuple(self._inputs))
        self._graph, self._captured = graph, captured

    def _replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._graph is not None
        with self._captured.replaying():
            for to, x in zip(self._inputs, inputs, strict=True):
                to.copy_(x, non_blocking=True)
            self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


def _layout(inputs: tuple[Tensor, ...] | list[Tensor]) -> _Layout:
    return tuple((x.shape, x.dtype, x.device) for x in inputs)
