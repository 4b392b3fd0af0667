"""What a search and a training share: epochs of steps, evaluation, and a state to go on from bit for bit."""

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from jackpot_kernels.data import Batches
from jackpot_kernels.search.evaluation import evaluate, require_fit
from jackpot_kernels.search.settings import SearchSettings, TrainingSettings
from jackpot_kernels.search.state import load_exactly

Record = dict[str, Any]
Settings = TypeVar("Settings", SearchSettings, TrainingSettings)


class Optimizer(Protocol):
    """What the loop itself asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class EpochLoop(ABC, Generic[Settings]):
    """Epochs of steps on the cross-entropy of a classifier, with a learning rate by epoch.

    Call ``begin`` or ``load_state_dict`` once, then iterate over ``run``. Whenever ``run`` has yielded,
    ``state_dict`` is exact: another loop that loads it goes on with the same bits and the same records, their
    ``seconds`` aside.

    Args:
        model: the network, moved to the device.
        train, test: data sets of (input, label).
        settings: what to do.
        device: where to do it.

    Raises:
        ValueError: when the model has fewer outputs than the labels need, or does not take the inputs.
    """

    _optimizer: Optimizer
    _take_step: Callable[[Tensor, Tensor], Any]

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        test: Dataset,
        settings: Settings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings: Settings = settings
        self.device = torch.device(device)
        if settings.amp:
            _warn_of_emulation(self.device)
        shared: dict[str, int] = {"seed": settings.seed, "workers": settings.workers}
        self.train = Batches(train, settings.batch_size, self.device, **shared)
        # Without gradients there is room for more, and the host launches a batch of few images no faster: in
        # batches of 256 a test of ResNet-32 took 0.3 s on an H100, as long as 48 steps of the search.
        many = self.device.type == "cuda" and isinstance(test, TensorDataset)
        self.test = Batches(test, settings.batch_size * (4 if many else 1), self.device, **shared)
        self.model = model.to(self.device)
        require_fit(self.model, self.train)
        self._epoch = self._batch = 0  # epochs done, and batches of the next one
        self._totals = self._no_totals()
        self._seconds, self._since = 0.0, time.perf_counter()

    @abstractmethod
    def begin(self) -> Record:
        """Make ready for the first step and return the record of the start."""

    @abstractmethod
    def _make_optimizer(self) -> None:
        """Set ``_optimizer``, and ``_take_step``, which returns loss and accuracy before the step."""

    @abstractmethod
    def _lr_after(self, passed: float) -> float:
        """Return the learning rate after the fraction ``passed`` of the epochs."""

    def _cosine(self, passed: float) -> float:
        """Let the learning rate fall along a cosine from epoch to epoch, towards 0 after the last."""
        return self.settings.lr * (1 + math.cos(math.pi * passed)) / 2

    @abstractmethod
    def _end(self) -> Record:
        """Return the last record."""

    def _step_figures(self) -> Record:
        """Return what else a step's record tells."""
        return {}

    def _epoch_figures(self) -> Record:
        """Return what else an epoch's record tells."""
        return {}

    @property
    def steps_per_epoch(self) -> int:
        return self.train.shuffled_batches

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self._epoch * self.steps_per_epoch + self._batch

    def run(self) -> Iterator[Record]:
        """Yield a record after each step and each epoch, and one at the end.

        Their ``kind`` is "tick" or, each ``log_every`` steps, "step" with figures; "epoch"; "end". All but
        ticks wait for the device. Epochs after which nothing is evaluated have no test scores.
        """
        self._since = time.perf_counter()
        while self._epoch < self.settings.epochs:
            self.model.train()
            self._set_lr()
            for inputs, labels in self.train.shuffled(self._epoch, self._batch):
                loss = self._train_step(inputs, labels)
                self._batch += 1
                yield self._step_record(loss) if self.step % self.settings.log_every == 0 else self._tick()
            yield self._end_epoch()
        yield self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on: tensors, numbers and names only."""
        return {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "position": (self._epoch, self._batch),
            "totals": self._totals,
            "seconds": self._elapsed(),
            "rng": _rng_state(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the place of the loop that ``state`` comes from; model and data must be the same ones.

        Raises:
            ValueError: when ``state`` is of another network or of other settings.
        """
        if type(self.settings)(**state["settings"]) != self.settings:
            raise ValueError("settings of the state must be those given here, got others")
        load_exactly("state", self.model, state["model"])
        self._load_start(state)
        self._make_optimizer()
        self._optimizer.load_state_dict(state["optimizer"])
        self._epoch, self._batch = state["position"]
        self._totals = state["totals"].to(self.device)
        self._seconds = state["seconds"]
        _set_rng_state(state["rng"], self.device)

    def _load_start(self, state: Mapping[str, Any]) -> None:
        """Take from ``state`` what else ``begin`` sets."""
        return

    def _set_lr(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr()

    def _lr(self) -> float:
        return self._lr_after(self._epoch / self.settings.epochs)

    def _train_step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss, right = self._take_step(inputs, labels)
        self._totals += torch.stack([loss.double(), right])
        return loss

    def _plain_step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step in the ordinary way; return loss and accuracy before it."""
        self._optimizer.zero_grad()
        loss, right = self._compute(inputs, labels)
        loss.backward()
        self._optimizer.step()
        return loss.detach(), right

    def _compute(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            outputs = self._network(inputs)
            loss = F.cross_entropy(outputs, labels)
        return loss, (outputs.argmax(1) == labels).double().mean()

    @cached_property
    def _network(self) -> Callable[[Tensor], Tensor]:
        """The model as steps run it."""
        return torch.compile(self.model) if self.settings.compile else self.model

    def _tick(self) -> Record:
        return {"kind": "tick", "step": self.step}

    def _step_record(self, loss: Tensor) -> Record:
        return {
            "kind": "step",
            "step": self.step,
            "epoch": self._epoch + 1,
            "loss": loss.item(),
            "lr": self._lr(),
            **self._step_figures(),
        }

    def _end_epoch(self) -> Record:
        loss, accuracy = (self._totals / self.steps_per_epoch).tolist()
        record = {
            "kind": "epoch",
            "step": self.step,
            "epoch": self._epoch + 1,
            "lr": self._lr(),
            "train_loss": loss,
            "train_accuracy": accuracy,
            **(self._test_scores() if self._is_evaluated(self._epoch + 1) else {}),
            **self._epoch_figures(),
            "seconds": self._elapsed(),
        }
        self._epoch, self._batch, self._totals = self._epoch + 1, 0, self._no_totals()
        return record

    def _is_evaluated(self, epoch: int) -> bool:
        return epoch % self.settings.evaluate_every == 0 or epoch == self.settings.epochs

    def _test_scores(self) -> Record:
        score = evaluate(self.model, self.test, self.settings.amp)
        return {"test_loss": score.loss, "test_accuracy": score.accuracy}

    def _no_totals(self) -> Tensor:
        """Return zeros to sum loss and accuracy of an epoch's batches in."""
        return torch.zeros(2, dtype=torch.float64, device=self.device)

    def _elapsed(self) -> float:
        """Return the seconds spent so far, and count on from here."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        return self._seconds


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _warn_of_emulation(device: torch.device) -> None:
    """Tell of a processor on which bfloat16 makes steps slower, many times so for convolutions."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    if device.type == "cpu" and not supported():
        message = "amp computes in bfloat16, which this processor emulates: float32 is likely to be faster"
        warnings.warn(message, stacklevel=4)
