"""The search as a whole: epochs of steps, evaluation, and a state from which it goes on bit for bit."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from jackpot_kernels.convert import MaskedLayer, convert, masked_layers, overlap, sparsity
from jackpot_kernels.data import Batches
from jackpot_kernels.initialize import initialize
from jackpot_kernels.normalization import freeze_statistics, recalibrate
from jackpot_kernels.ops.pack_mask import unpack_mask
from jackpot_kernels.search.evaluation import evaluate, require_fit
from jackpot_kernels.search.graph import GraphedStep
from jackpot_kernels.search.optimizer import SRPopup
from jackpot_kernels.search.settings import SearchSettings
from jackpot_kernels.search.state import load_exactly

Record = dict[str, Any]

# As many batches at most estimate normalisation statistics and gradient criteria.
_CALIBRATION_BATCHES = 100


class Search:
    """A search for a mask in a pre-trained classifier: cross-entropy, and a cosine learning rate by epoch.

    Call ``begin`` or ``load_state_dict`` once, then iterate over ``run``. Whenever ``run`` has yielded,
    ``state_dict`` is exact: another ``Search`` that loads it goes on with the same bits and the same records,
    their ``seconds`` aside.

    Args:
        model: the pre-trained network, converted in place; its weights keep their bits.
        train, test: data sets of (input, label).
        settings: see ``SearchSettings``.
        device: where the search runs.

    Raises:
        ValueError: when the model has no layer to mask, or fewer outputs than the labels need.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        test: Dataset,
        settings: SearchSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.device = settings, torch.device(device)
        shared: dict[str, int] = {"seed": settings.seed, "workers": settings.workers}
        self.train = Batches(train, settings.batch_size, self.device, **shared)
        self.test = Batches(test, settings.batch_size, self.device, **shared)
        model = model.to(self.device)
        require_fit(model, self.train)
        if settings.normalization == "frozen":
            freeze_statistics(model)
        self.model = convert(model)
        self._epoch = self._batch = 0  # epochs done, and batches of the next one
        self._totals = self._no_totals()
        self._seconds, self._since = 0.0, time.perf_counter()

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

    def begin(self) -> Record:
        """Give the masks their start (Eq. 8) and return the record of it, with the dense network's score."""
        torch.manual_seed(self.settings.seed)
        dense = evaluate(self.model, self.test, self.settings.amp)
        initialize_masks(self.model, self.settings, self.train)
        self._start = {name: layer.mask_words.clone() for name, layer in self._searched().items()}
        self._make_optimizer()
        return {
            "kind": "start",
            "settings": asdict(self.settings),
            "total_steps": self.total_steps,
            "weights": sum(layer.weight.numel() for layer in masked_layers(self.model).values()),
            "dense_loss": dense.loss,
            "dense_accuracy": dense.accuracy,
            **self._test_scores(),
        }

    def run(self) -> Iterator[Record]:
        """Yield a record after each step and each epoch, and one at the end.

        Their ``kind`` is "tick" or, each ``log_every`` steps, "step" with figures; "epoch"; "end". All but
        ticks wait for the device.
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
        """Return all that the search needs to go on: tensors, numbers and names only."""
        return {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "start": self._start,
            "optimizer": self._optimizer.state_dict(),
            "position": (self._epoch, self._batch),
            "totals": self._totals,
            "seconds": self._elapsed(),
            "rng": _rng_state(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the place of the search that ``state`` comes from; model and data must be the same ones.

        Raises:
            ValueError: when ``state`` is of another network or of other settings.
        """
        if SearchSettings(**state["settings"]) != self.settings:
            raise ValueError("settings of the state must be those of the search, got others")
        load_exactly("state of the search", self.model, state["model"])
        self._start = {name: words.to(self.device) for name, words in state["start"].items()}
        for name, layer in masked_layers(self.model).items():
            layer.scores.requires_grad_(name in self._start)
        self._make_optimizer()
        self._optimizer.load_state_dict(state["optimizer"])
        self._epoch, self._batch = state["position"]
        self._totals = state["totals"].to(self.device)
        self._seconds = state["seconds"]
        _set_rng_state(state["rng"], self.device)

    def _make_optimizer(self) -> None:
        s = self.settings
        self._optimizer = SRPopup(
            self.model,
            lr=s.lr,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            total_steps=self.total_steps,
            scope=s.scope,
            schedule=s.schedule,
            pairs=s.pairs,
            seed=s.seed,
        )
        self._take_step = GraphedStep(self._optimizer, self._compute)

    def _set_lr(self) -> None:
        """Let the learning rate fall along a cosine from epoch to epoch, towards 0 after the last."""
        passed = self._epoch / self.settings.epochs
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 + math.cos(math.pi * passed)) / 2

    def _train_step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss, right = self._take_step(inputs, labels)
        self._totals += torch.stack([loss.double(), right])
        return loss

    def _compute(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            outputs = self.model(inputs)
            loss = F.cross_entropy(outputs, labels)
        return loss, (outputs.argmax(1) == labels).double().mean()

    def _tick(self) -> Record:
        return {"kind": "tick", "step": self.step}

    def _step_record(self, loss: Tensor) -> Record:
        stats = self._optimizer.stats().values()
        return {
            "kind": "step",
            "step": self.step,
            "epoch": self._epoch + 1,
            "loss": loss.item(),
            "lr": self._optimizer.param_groups[0]["lr"],
            "proposed": sum(layer.proposed for layer in stats),
            "granted": sum(layer.granted for layer in stats),
            "skipped_steps": self._optimizer.skipped_steps,
        }

    def _end_epoch(self) -> Record:
        loss, accuracy = (self._totals / self.steps_per_epoch).tolist()
        record = {
            "kind": "epoch",
            "step": self.step,
            "epoch": self._epoch + 1,
            "lr": self._optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_accuracy": accuracy,
            **self._test_scores(),
            "overlap": self._overlap(self._searched()),
            "skipped_steps": self._optimizer.skipped_steps,
            "seconds": self._elapsed(),
        }
        self._epoch, self._batch, self._totals = self._epoch + 1, 0, self._no_totals()
        return record

    def _end(self) -> Record:
        searched = self._searched()
        masked, overall = sparsity(self.model)
        return {
            "kind": "end",
            "step": self.step,
            "sparsity_masked": masked,
            "sparsity_overall": overall,
            "layers": [
                {
                    "name": name,
                    "weights": layer.weight.numel(),
                    "kept": layer.num_kept,
                    "overlap": self._overlap({name: layer}) if name in searched else 1.0,
                }
                for name, layer in masked_layers(self.model).items()
            ],
            "seconds": self._elapsed(),
        }

    def _test_scores(self) -> Record:
        if self.settings.normalization == "recalibrate":
            recalibrate(self.model, islice(self.train.ordered(), _CALIBRATION_BATCHES))
        score = evaluate(self.model, self.test, self.settings.amp)
        return {"test_loss": score.loss, "test_accuracy": score.accuracy}

    def _searched(self) -> dict[str, MaskedLayer]:
        return {
            name: layer for name, layer in masked_layers(self.model).items() if layer.scores.requires_grad
        }

    def _overlap(self, layers: Mapping[str, MaskedLayer]) -> float:
        start = {name: unpack_mask(self._start[name], layer.weight.shape) for name, layer in layers.items()}
        return overlap({name: layer.mask for name, layer in layers.items()}, start)

    def _no_totals(self) -> Tensor:
        """Return zeros to sum loss and accuracy of an epoch's batches in."""
        return torch.zeros(2, dtype=torch.float64, device=self.device)

    def _elapsed(self) -> float:
        """Return the seconds spent so far, and count on from here."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        return self._seconds


def initialize_masks(model: nn.Module, settings: SearchSettings, train: Batches) -> None:
    """Give a converted model the masks and scores that ``settings`` start from."""
    generator = torch.Generator().manual_seed(settings.seed)
    common: dict[str, Any] = {
        "sparsity": settings.sparsity,
        "keep_last_dense": settings.keep_last_dense,
        "eta": settings.eta,
    }
    initialize(
        model,
        criterion=settings.criterion,
        budget=settings.budget,
        loss_fn=F.cross_entropy,
        batches=islice(train.ordered(), _CALIBRATION_BATCHES),
        generator=generator,
        **common,
    )
    if settings.random_scores:
        layers = {n: layer for n, layer in masked_layers(model).items() if layer.scores.requires_grad}
        drawn = {name: _random_scores(layer, generator) for name, layer in layers.items()}
        budget = {name: layer.num_kept for name, layer in layers.items()}
        initialize(model, criterion=drawn, budget=budget, **common)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.scores.copy_(drawn[name])


def _random_scores(layer: MaskedLayer, generator: torch.Generator) -> Tensor:
    """Draw scores as edge-popup does: the absolute value of Kaiming's uniform with a = sqrt(5)."""
    fan_in = layer.weight[0].numel()
    draw = torch.rand(layer.weight.shape, generator=generator) / math.sqrt(fan_in)
    return draw.to(layer.weight.device)


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
