"""The comparison that ``jackpot demo`` makes: one small network, every way to prune it, by runs alone."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from jackpot_kernels.convert import convert
from jackpot_kernels.data import Batches
from jackpot_kernels.models import digits_net
from jackpot_kernels.normalization import recalibrate
from jackpot_kernels.search.epochs import Record
from jackpot_kernels.search.evaluation import evaluate
from jackpot_kernels.search.loop import Search, initialize_masks
from jackpot_kernels.search.settings import SearchSettings

SPARSITIES = (0.90, 0.95, 0.98)
DENSE = "dense"
MAGNITUDE = "magnitude pruning"
RECALIBRATED = "magnitude pruning, recalibrated"
OURS = "SR-popup"
SEARCHES: dict[str, dict[str, Any]] = {
    "edge-popup, random scores": {"schedule": "constant", "random_scores": True},
    "edge-popup, warm start": {"schedule": "constant"},
    OURS: {"schedule": "quartic"},
}
# Every search gets what the better of the two magnitude rows gets: statistics of the network as it is pruned.
SETTINGS = SearchSettings(epochs=20, batch_size=128, normalization="recalibrate", log_every=1)
METHODS = (DENSE, MAGNITUDE, RECALIBRATED, *SEARCHES)


class Run(NamedTuple):
    """The test accuracy of one method, after the last epoch; the dense network has sparsity 0."""

    method: str
    sparsity: float
    seed: int
    accuracy: float


class Comparison:
    """Train a network for each seed, then prune it by every method at every sparsity.

    Args:
        data: training and test set.
        settings: of all searches; method, sparsity and seed are put in.
        dense_epochs: epochs of dense training.
        seeds: how many networks.
        watch: called after each epoch, with the name of what goes on.
    """

    def __init__(
        self,
        data: tuple[Dataset, Dataset],
        settings: SearchSettings,
        *,
        dense_epochs: int,
        seeds: int,
        watch: Callable[[str], None],
    ) -> None:
        self.settings, self.dense_epochs, self.seeds = settings, dense_epochs, seeds
        self.records: dict[tuple[str, float, int], list[Record]] = {}
        self._data, self._watch = data, watch

    @property
    def total_epochs(self) -> int:
        """Epochs of all training and all searches."""
        return self.seeds * (self.dense_epochs + len(SEARCHES) * len(SPARSITIES) * self.settings.epochs)

    def run(self) -> Iterator[tuple[Run, nn.Module]]:
        """Yield each run with its network: the dense one first, then all methods, for each seed."""
        for seed in range(self.seeds):
            settings = replace(self.settings, seed=seed)
            train, test = (
                Batches(d, settings.batch_size, torch.device("cpu"), seed=seed) for d in self._data
            )
            dense = self._train(train, seed)
            yield Run(DENSE, 0.0, seed, evaluate(dense, test).accuracy), dense
            for sparsity in SPARSITIES:
                settings = replace(settings, sparsity=sparsity)
                pruned = convert(deepcopy(dense))
                initialize_masks(pruned, settings, train)
                yield Run(MAGNITUDE, sparsity, seed, evaluate(pruned, test).accuracy), pruned
                recalibrate(pruned, train.ordered())
                yield Run(RECALIBRATED, sparsity, seed, evaluate(pruned, test).accuracy), pruned
                for method, choices in SEARCHES.items():
                    yield self._search(method, deepcopy(dense), replace(settings, **choices))

    def _train(self, train: Batches, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = digits_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.dense_epochs)
        model.train()
        for epoch in range(self.dense_epochs):
            for inputs, labels in train.shuffled(epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            scheduler.step()
            self._watch(f"seed {seed}: training the dense network")
        return model

    def _search(self, method: str, model: nn.Module, settings: SearchSettings) -> tuple[Run, nn.Module]:
        search = Search(model, *self._data, settings)
        records = [search.begin()]
        for record in search.run():
            records.append(record)
            if record["kind"] == "epoch":
                self._watch(f"seed {settings.seed}: {method} at {settings.sparsity:.0%}")
        last = [record for record in records if record["kind"] == "epoch"][-1]
        self.records[method, settings.sparsity, settings.seed] = records
        return Run(method, settings.sparsity, settings.seed, last["test_accuracy"]), search.model


def summary(runs: list[Run], method: str, sparsity: float) -> tuple[float, float]:
    """Return mean and standard deviation of the accuracy over the seeds; one seed deviates by 0."""
    level = 0.0 if method == DENSE else sparsity
    accuracies = [run.accuracy for run in runs if (run.method, run.sparsity) == (method, level)]
    return mean(accuracies), stdev(accuracies) if len(accuracies) > 1 else 0.0
