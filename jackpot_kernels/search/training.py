"""Ordinary training: the dense network that a search starts from, and fine-tuning under a fixed mask."""

from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jackpot_kernels.convert import masked_layers, require_masked_layers
from jackpot_kernels.search.epochs import EpochLoop, Record
from jackpot_kernels.search.graph import GraphedStep
from jackpot_kernels.search.settings import TrainingSettings


def unfreeze(model: nn.Module, everything: bool = False) -> None:
    """Let the weights of masked layers train under their masks, which stay as they are (Eq. 31).

    Kept weights get the gradient ``dL/d(weight * mask)``, pruned ones a zero: weight decay moves these, but
    what the network computes never holds them. Scores stop training.

    Args:
        model: network with masked layers.
        everything: also biases, normalisation and plain layers, which ``convert`` froze.

    Raises:
        ValueError: when there is no masked layer.
    """
    layers = require_masked_layers(model).values()
    if everything:
        model.requires_grad_()
    for layer in layers:
        layer.weight.requires_grad_()
        layer.scores.requires_grad_(False)
        # A compiled layer does not drop it, and takes it as it is once the weight is frozen again.
        layer.keep_nothing()


class Training(EpochLoop[TrainingSettings]):
    """Training of a classifier by SGD on the cross-entropy, of every parameter that takes a gradient.

    A plain network trains whole. One with masked layers trains what ``unfreeze`` set free, under masks that
    do not change. It runs and resumes as ``EpochLoop`` says.

    Args:
        model: the network; trained in place.
        train, test: data sets of (input, label).
        settings: see ``TrainingSettings``.
        device: where the training runs.

    Raises:
        ValueError: when no parameter takes a gradient, or the model has fewer outputs than the labels need.
    """

    _optimizer: torch.optim.SGD

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        test: Dataset,
        settings: TrainingSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, train, test, settings, device)
        if settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not self._parameters():
            raise ValueError(
                f"model must have parameters to train (see unfreeze), got {type(model).__name__} without"
            )

    def begin(self) -> Record:
        """Seed what the network draws and return the record of the start, with its score on the test set."""
        torch.manual_seed(self.settings.seed)
        self._make_optimizer()
        return {
            "kind": "start",
            "settings": asdict(self.settings),
            "total_steps": self.total_steps,
            "parameters": sum(parameter.numel() for parameter in self._parameters()),
            **self._test_scores(),
        }

    def _parameters(self) -> list[nn.Parameter]:
        """Return what trains; scores do not, though they may take gradients."""
        scores = {id(layer.scores) for layer in masked_layers(self.model).values()}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in scores]

    def _make_optimizer(self) -> None:
        s, graphed = self.settings, self.device.type == "cuda"
        # A captured step reads the learning rate on the device.
        self._rate: float | Tensor = torch.tensor(s.lr, device=self.device) if graphed else s.lr
        self._optimizer = torch.optim.SGD(
            self._parameters(),
            lr=self._rate,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            nesterov=s.nesterov,
            fused=graphed or None,
        )
        self._take_step = self._plain_step
        if graphed:
            self._take_step = GraphedStep(self._optimizer, self._compute, model=self.model)

    def _set_lr(self) -> None:
        self._rate = self._rate.fill_(self._lr()) if isinstance(self._rate, Tensor) else self._lr()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate

    def _lr_after(self, passed: float) -> float:
        if self.settings.schedule == "cosine":
            return self._cosine(passed)
        return self.settings.lr / (1 if passed < 0.5 else 10 if passed < 0.75 else 100)

    def _end(self) -> Record:
        return {"kind": "end", "step": self.step, "seconds": self._elapsed()}
