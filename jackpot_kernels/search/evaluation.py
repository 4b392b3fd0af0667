"""How well a classifier does on a data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jackpot_kernels.data import Batches


class Score(NamedTuple):
    """Mean cross-entropy, and the fraction of samples classified right."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, batches: Batches, amp: bool = False) -> Score:
    """Return mean loss and accuracy over a data set, in eval mode; training flags are put back."""
    totals = torch.zeros(2, dtype=torch.float64, device=batches.device)
    count = 0
    with evaluating(model), torch.autocast(batches.device.type, torch.bfloat16, enabled=amp):
        for inputs, labels in batches.ordered():
            outputs = model(inputs).float()
            batches.require_classes(outputs.shape[1], labels)
            loss = F.cross_entropy(outputs, labels, reduction="sum")
            right = (outputs.argmax(1) == labels).sum()
            totals += torch.stack([loss.double(), right.double()])
            count += len(labels)
    loss_sum, num_right = totals.tolist()
    return Score(loss_sum / count, num_right / count)


def require_fit(model: nn.Module, batches: Batches) -> None:
    """Check that the model takes the inputs and has a class for each label, as far as labels are at hand.

    Raises:
        ValueError: when it does not, or the first samples do not fit in one batch.
    """
    try:
        inputs, labels = next(batches.ordered())
    except RuntimeError as error:
        raise ValueError(f"samples must fit in one batch, but fail: {error}") from None
    try:
        with evaluating(model):
            outputs = model(inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"model must take inputs of shape {list(inputs.shape)}, but fails: {error}"
        ) from None
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(inputs):
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model must give logits of shape [{len(inputs)}, classes], got {got}")
    batches.require_classes(outputs.shape[1], labels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients, and its training flags back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
