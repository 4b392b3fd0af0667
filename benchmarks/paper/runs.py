"""One run: from its configuration to its result, with what later runs take up as a checkpoint beside it."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.paper.experiments import SWAPS
from benchmarks.paper.results import Result
from benchmarks.paper.scales import Run
from jackpot_kernels.convert import convert, masked_layers, overlap, searched_layers, sparsity
from jackpot_kernels.data import DATA, Batches, Images
from jackpot_kernels.environment import environment
from jackpot_kernels.files import write_whole
from jackpot_kernels.models import MODELS
from jackpot_kernels.normalization import recalibrate
from jackpot_kernels.ops.pack_mask import unpack_mask
from jackpot_kernels.search.distortion import agreement, measure_distortion
from jackpot_kernels.search.epochs import EpochLoop, Record
from jackpot_kernels.search.evaluation import evaluate, evaluating
from jackpot_kernels.search.loop import Search, initialize_masks
from jackpot_kernels.search.settings import SearchSettings, TrainingSettings
from jackpot_kernels.search.state import load_exactly
from jackpot_kernels.search.training import Training, unfreeze

Masks = dict[str, Tensor]

# Batches that estimate normalisation statistics, as in a search.
_CALIBRATION_BATCHES = 100
_ROOT = Path(__file__).parents[2]


class Workshop:
    """Where runs are made: a folder for checkpoints and a device."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.checkpoints = folder / "checkpoints"
        self.device = torch.device(device)

    def make(self, run: Run) -> Result:
        """Make a run and return its result.

        Raises:
            ValueError: when a checkpoint that it starts from is damaged or another run's.
            FileNotFoundError: when that checkpoint or the data set is missing.
        """
        begun = time.perf_counter()
        measured = _KINDS[run.kind](self, run)
        return {
            "key": run.key,
            "configuration": run.configuration,
            "seed": run.seed,
            "seconds": time.perf_counter() - begun,
            **measured,
            # ImageNet is read by whichever loader is installed, and each cuts its images in its own way.
            "loader": type(load(run.data, run.images)[0]).__name__,
            **_circumstances(self.device),
        }

    def checkpoint(self, run: Run) -> Path:
        return self.checkpoints / f"{run.key}.safetensors"

    def keep(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        """Write the checkpoint of a run beside its place, then rename it."""
        path = self.checkpoint(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(path, save(whole, {"run": run.key}))

    def kept(self, run: Run) -> dict[str, Tensor]:
        """Return what ``keep`` wrote."""
        path = self.checkpoint(run)
        try:
            with safe_open(path, "pt") as file:
                owner = (file.metadata() or {}).get("run")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"checkpoint must be a whole safetensors file, got {path} ({error})") from None
        if owner != run.key:
            raise ValueError(f"checkpoint {path} must be of the run {run.key}, got that of {owner}")
        return tensors

    def network(self, run: Run) -> nn.Module:
        """Return the dense network that a run goes back to."""
        dense = run.lineage[-1]
        model = build(run.network)
        load_exactly(f"checkpoint {self.checkpoint(dense)}", model, self.kept(dense))
        return model

    def masked_network(self, run: Run) -> nn.Module:
        """Return the dense network under the masks that a search found."""
        model = convert(self.network(run))
        for name, mask in self.masks(run, model).items():
            masked_layers(model)[name].mask = mask
        return model

    def masks(self, run: Run, model: nn.Module) -> Masks:
        """Return the masks that a search found in the layers of ``model``."""
        shapes = {name: layer.weight.shape for name, layer in masked_layers(model).items()}
        return {name: unpack_mask(words, shapes[name]) for name, words in self.kept(run).items()}

    def batches(self, data: Dataset, run: Run) -> Batches:
        options = dict(run.options)
        size = options.get("batch_size", SearchSettings.batch_size)
        return Batches(data, size, self.device, seed=run.seed, workers=options.get("workers", 0))


def build(network: str, pretrained: bool = False) -> nn.Module:
    """Return a network by its name in ``jackpot_kernels.models``.

    Raises:
        ModuleNotFoundError: when the library that it comes from is not installed.
    """
    return _named(MODELS, network)(**({"pretrained": True} if pretrained else {}))


@cache
def load(data: str, images: int | None) -> tuple[Dataset, Dataset]:
    """Return training and test set by name in ``jackpot_kernels.data``, ``images`` of the former.

    Raises:
        FileNotFoundError, ValueError: when the data set is missing or damaged.
    """
    train, test = _named(DATA, data)()
    if images is not None:
        if not isinstance(train, Images):
            raise ValueError(f"images must be None for data that has no subsets, got {images} of {data}")
        train = train.subset(images, seed=0)
    return train, test


def _named(known: Mapping[str, str], name: str) -> Callable[..., Any]:
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def _train(workshop: Workshop, run: Run) -> Result:
    torch.manual_seed(run.seed)
    settings = TrainingSettings(epochs=run.epochs, seed=run.seed, **dict(run.options))
    training = Training(build(run.network), *load(run.data, run.images), settings, workshop.device)
    _, epochs, _ = _watch(training)
    workshop.keep(run, training.model.state_dict())
    measured = {"weights": _num_weights(training.model), "dense_accuracy": epochs[-1]["test_accuracy"]}
    return _course(epochs) | measured | _top5(workshop, run, training.model)


def _take_up(workshop: Workshop, run: Run) -> Result:
    """Keep a network as it is, untrained or from its library, and measure it."""
    torch.manual_seed(run.seed)
    model = build(run.network, pretrained=run.kind == "library").to(workshop.device)
    _, test = load(run.data, run.images)
    accuracy = evaluate(model, workshop.batches(test, run)).accuracy
    workshop.keep(run, model.state_dict())
    measured = {"weights": _num_weights(model), "accuracy": accuracy, "dense_accuracy": accuracy}
    return measured | _top5(workshop, run, model)


def _search(workshop: Workshop, run: Run) -> Result:
    settings = SearchSettings(epochs=run.epochs, seed=run.seed, **dict(run.options))
    search = Search(workshop.network(run), *load(run.data, run.images), settings, workshop.device)
    start, epochs, end = _watch(search)
    workshop.keep(run, {name: layer.mask_words for name, layer in masked_layers(search.model).items()})
    return {
        **_course(epochs),
        "weights": start["weights"],
        "dense_accuracy": start["dense_accuracy"],
        "start_accuracy": start["test_accuracy"],
        "overlap": epochs[-1]["overlap"],
        "sparsity_masked": end["sparsity_masked"],
        "sparsity_overall": end["sparsity_overall"],
        **_top5(workshop, run, search.model),
    }


def _mask(workshop: Workshop, run: Run) -> Result:
    """Measure the mask of a criterion, with stale and with recalibrated normalisation statistics."""
    settings = SearchSettings(seed=run.seed, **dict(run.options))
    model = convert(workshop.network(run).to(workshop.device))
    train, test = (workshop.batches(data, run) for data in load(run.data, run.images))
    dense = evaluate(model, test, settings.amp).accuracy
    initialize_masks(model, settings, train)
    stale = evaluate(model, test, settings.amp).accuracy
    recalibrate(model, train.sampled(_CALIBRATION_BATCHES))
    recalibrated = evaluate(model, test, settings.amp).accuracy
    searched = {name: layer.mask for name, layer in searched_layers(model).items()}
    other = searched
    if run.source is not None and run.source.kind == "search":
        other = {name: mask for name, mask in workshop.masks(run.source, model).items() if name in searched}
    masked, overall = sparsity(model)
    return {
        "weights": _num_weights(model),
        "dense_accuracy": dense,
        "accuracy": recalibrated if settings.normalization == "recalibrate" else stale,
        "stale_accuracy": stale,
        "recalibrated_accuracy": recalibrated,
        "overlap": overlap(searched, other),
        "sparsity_masked": masked,
        "sparsity_overall": overall,
    }


def _finetune(workshop: Workshop, run: Run) -> Result:
    """Train the weights that a search kept, under its masks (Eq. 31)."""
    assert run.source is not None
    settings = TrainingSettings(epochs=run.epochs, seed=run.seed, **dict(run.options))
    model = workshop.masked_network(run.source)
    unfreeze(model, everything=True)
    training = Training(model, *load(run.data, run.images), settings, workshop.device)
    _, epochs, _ = _watch(training)
    masked, overall = sparsity(training.model)
    return _course(epochs) | {
        "weights": _num_weights(training.model),
        "sparsity_masked": masked,
        "sparsity_overall": overall,
    }


def _distortion(workshop: Workshop, run: Run) -> Result:
    """Measure what swaps in the starting mask do to the loss of some batches (Fig. 6)."""
    options = dict(run.options)
    num_batches, draws = options.pop("batches"), options.pop("draws")
    settings = SearchSettings(seed=run.seed, **options)
    model = convert(workshop.network(run).to(workshop.device))
    train = workshop.batches(load(run.data, run.images)[0], run)
    initialize_masks(model, settings, train)
    batches = islice(train.shuffled(0), num_batches)
    records = measure_distortion(model, batches, SWAPS, draws=draws, seed=run.seed)
    measured: Result = {"distortion": [record._asdict() for record in records]}
    for (kind, q), share in agreement(records).items():
        epsilons = [record.epsilon for record in records if (record.kind, record.q) == (kind, q)]
        measured[f"mean_{kind}_{q}"] = mean(epsilons)
        measured[f"deviation_{kind}_{q}"] = stdev(epsilons) if len(epsilons) > 1 else None
        measured[f"agreement_{kind}_{q}"] = share
    return measured


def _watch(loop: EpochLoop[Any]) -> tuple[Record, list[Record], Record]:
    """Run a loop and return the records of its start, its epochs and its end."""
    start, epochs = loop.begin(), []
    for record in loop.run():
        if record["kind"] == "epoch":
            epochs.append(record)
    return start, epochs, record


def _course(epochs: list[Record]) -> Result:
    """Return the accuracy of the last epoch and what every epoch told; seconds are each epoch's own."""
    names = (
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "overlap",
        "skipped_steps",
    )
    before = [0.0, *(record["seconds"] for record in epochs)]
    tested = [record["test_accuracy"] for record in epochs if "test_accuracy" in record]
    return {
        "accuracy": epochs[-1]["test_accuracy"],
        "best_on_test": max(tested),
        "times_tested": len(tested),
        "epochs": [
            {name: record[name] for name in names if name in record} | {"seconds": record["seconds"] - since}
            for record, since in zip(epochs, before, strict=False)
        ],
    }


def _top5(workshop: Workshop, run: Run, model: nn.Module) -> Result:
    """Return the share of images whose class is among the five likeliest, where the paper tells it."""
    if not run.data.startswith(("imagenet", "digits")):
        return {}
    right = count = 0
    with evaluating(model):
        for inputs, labels in workshop.batches(load(run.data, run.images)[1], run).ordered():
            likeliest = model(inputs).topk(5).indices
            right += int((likeliest == labels[:, None]).sum())
            count += len(labels)
    return {"top5": right / count}


def _num_weights(model: nn.Module) -> int:
    """Count what can be masked."""
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d | nn.Conv3d))
    return sum(layer.weight.numel() for layer in layers)


def _circumstances(device: torch.device) -> Result:
    """Return where and with what a run was made."""
    found = environment()
    cpu = "{processor}, {capability}".format(**found["cpu"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "versions": found["versions"],
        "commit": commit(),
    }


@cache
def commit() -> str:
    """Return the commit of this tree, "-dirty" where it has changes, or "unknown" outside a repository.

    Results are no such changes. ``JACKPOT_COMMIT`` tells it where git cannot, as in a copy without history.
    """
    if told := os.environ.get("JACKPOT_COMMIT"):
        return told
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
        return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


_KINDS: Mapping[str, Callable[[Workshop, Run], Result]] = {
    "train": _train,
    "library": _take_up,
    "untrained": _take_up,
    "search": _search,
    "mask": _mask,
    "finetune": _finetune,
    "distortion": _distortion,
}
