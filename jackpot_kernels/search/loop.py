"""The search as a whole: a mask over a pre-trained classifier, from its start to its end."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from jackpot_kernels.convert import MaskedLayer, convert, masked_layers, overlap, searched_layers, sparsity
from jackpot_kernels.data import Batches
from jackpot_kernels.initialize import initialize
from jackpot_kernels.normalization import freeze_statistics, recalibrate
from jackpot_kernels.ops.pack_mask import unpack_mask
from jackpot_kernels.search.epochs import EpochLoop, Record
from jackpot_kernels.search.evaluation import evaluate
from jackpot_kernels.search.graph import GraphedStep
from jackpot_kernels.search.optimizer import SRPopup
from jackpot_kernels.search.settings import SearchSettings
from jackpot_kernels.search.supermask import Supermask

# As many batches at most estimate normalisation statistics and gradient criteria.
_CALIBRATION_BATCHES = 100


class Search(EpochLoop[SearchSettings]):
    """A search for a mask in a pre-trained classifier: cross-entropy, and a cosine learning rate by epoch.

    It runs and resumes as ``EpochLoop`` says.

    Args:
        model: the pre-trained network, converted in place; its weights keep their bits.
        train, test: data sets of (input, label).
        settings: see ``SearchSettings``.
        device: where the search runs.

    Raises:
        ValueError: when the model has no layer to mask, or fewer outputs than the labels need.
    """

    _optimizer: SRPopup | Supermask

    def __init__(
        self,
        model: nn.Module,
        train: Dataset,
        test: Dataset,
        settings: SearchSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, train, test, settings, device)
        if settings.normalization == "frozen":
            freeze_statistics(self.model)
        self.model = convert(self.model)
        if settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def begin(self) -> Record:
        """Give the masks their start (Eq. 8) and return the record of it, with the dense network's score."""
        torch.manual_seed(self.settings.seed)
        dense = evaluate(self.model, self.test, self.settings.amp)
        initialize_masks(self.model, self.settings, self.train)
        self._start = {name: layer.mask_words.clone() for name, layer in searched_layers(self.model).items()}
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

    def state_dict(self) -> dict[str, Any]:
        """Return all that the search needs to go on: tensors, numbers and names only."""
        return {**super().state_dict(), "start": self._start}

    def _load_start(self, state: Mapping[str, Any]) -> None:
        self._start = {name: words.to(self.device) for name, words in state["start"].items()}
        for name, layer in masked_layers(self.model).items():
            layer.scores.requires_grad_(name in self._start)

    def _make_optimizer(self) -> None:
        s = self.settings
        shared: dict[str, Any] = {
            "lr": s.lr,
            "momentum": s.momentum,
            "weight_decay": s.weight_decay,
            "scope": s.scope,
            "seed": s.seed,
        }
        if s.method == "supermask":
            supermask = Supermask(self.model, **shared)
            self._optimizer = supermask
            self._take_step = partial(self._drawn_step, supermask)
            return
        self._optimizer = popup = SRPopup(
            self.model,
            total_steps=self.total_steps,
            schedule=s.schedule,
            pairs=s.pairs,
            compat=s.compat,
            **shared,
        )
        # What waits for the device cannot be captured.
        self._take_step = self._plain_step if s.compat else GraphedStep(popup, self._compute)

    def _drawn_step(self, optimizer: Supermask, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.draw()
        return self._plain_step(inputs, labels)

    def _lr_after(self, passed: float) -> float:
        return self._cosine(passed)

    def _step_figures(self) -> Record:
        stats = self._optimizer.stats().values()
        return {
            "proposed": sum(layer.proposed for layer in stats),
            "granted": sum(layer.granted for layer in stats),
            "skipped_steps": self._optimizer.skipped_steps,
        }

    def _epoch_figures(self) -> Record:
        return {
            "overlap": self._overlap(searched_layers(self.model)),
            "skipped_steps": self._optimizer.skipped_steps,
        }

    def _end(self) -> Record:
        searched = searched_layers(self.model)
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
            recalibrate(self.model, self.train.sampled(_CALIBRATION_BATCHES))
        return super()._test_scores()

    def _overlap(self, layers: Mapping[str, MaskedLayer]) -> float:
        start = {name: unpack_mask(self._start[name], layer.weight.shape) for name, layer in layers.items()}
        return overlap({name: layer.mask for name, layer in layers.items()}, start)


def initialize_masks(model: nn.Module, settings: SearchSettings, train: Batches) -> None:
    """Give a converted model the masks and scores that ``settings`` start from."""
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
        batches=train.sampled(_CALIBRATION_BATCHES),
        generator=_generator(settings.seed, 2_246_822_519),
        **common,
    )
    if settings.random_scores:
        layers = searched_layers(model)
        generator = _generator(settings.seed, 2_654_435_761)
        drawn = {name: _random_scores(layer, generator) for name, layer in layers.items()}
        budget = {name: layer.num_kept for name, layer in layers.items()}
        initialize(model, criterion=drawn, budget=budget, **common)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.scores.copy_(drawn[name])


def _generator(seed: int, stream: int) -> torch.Generator:
    """Return a generator for one thing that is drawn; ``stream``, an odd number, tells them apart.

    The seed itself may have drawn the network's first weights: scores from it were their absolute values.
    """
    return torch.Generator().manual_seed((seed + 1) * stream % 2**32)


def _random_scores(layer: MaskedLayer, generator: torch.Generator) -> Tensor:
    """Draw scores as edge-popup does: the absolute value of Kaiming's uniform with a = sqrt(5)."""
    fan_in = layer.weight[0].numel()
    draw = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (draw / math.sqrt(fan_in)).to(layer.weight.device)
