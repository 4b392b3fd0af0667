"""How large a run is: an experiment names runs in the paper's terms, and a scale turns them into its own."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

Options = tuple[tuple[str, Any], ...]

ALL = ("full", "reduced", "smoke")
# What each network of the paper is trained on and tested with.
DATA_OF = {
    "vgg19-cifar10": "cifar10",
    "resnet32-cifar10": "cifar10",
    "vgg19-cifar100": "cifar100",
    "resnet32-cifar100": "cifar100",
    "resnet50": "imagenet",
    "mobilenet-v1": "imagenet-signed",
    "efficientnet-b4": "imagenet-380",
}


@dataclass(frozen=True)
class Spec:
    """A run in the paper's terms; ``source`` is the one whose network or mask it takes up."""

    kind: str
    network: str
    epochs: int = 0
    options: Options = ()
    source: "Spec | None" = None


@dataclass(frozen=True)
class Run:
    """A run as it is made, complete but for the defaults of the package's settings; equal runs are one.

    Args:
        kind: "train" (the dense network), "library" (its weights from the library it comes from),
            "untrained", "search", "mask" (a criterion without a search), "finetune" (Eq. 31) or "distortion"
            (Fig. 6).
        network, data: names of ``jackpot_kernels.models`` and ``jackpot_kernels.data``.
        images: size of the class-balanced training subset; None takes all.
        options: of ``SearchSettings`` or ``TrainingSettings``, sorted by name.
        source: the run that this one starts from.
    """

    kind: str
    network: str
    data: str
    images: int | None
    epochs: int
    seed: int
    options: Options = ()
    source: "Run | None" = None

    @property
    def configuration(self) -> dict[str, Any]:
        """What the key is made of, as JSON can hold it."""
        shallow = {name: getattr(self, name) for name in asdict(self)}
        source = None if self.source is None else self.source.configuration
        return {**shallow, "options": dict(self.options), "source": source}

    @property
    def key(self) -> str:
        """A name of this very configuration, fit for a file."""
        canonical = json.dumps(self.configuration, sort_keys=True)
        return f"{self.kind}-{self.network}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"

    @property
    def lineage(self) -> "list[Run]":
        """This run and those it starts from, the dense network last."""
        return [self, *(self.source.lineage if self.source else [])]

    def __str__(self) -> str:
        options = dict(self.options)
        names = ("sparsity", "method", "criterion", "random_scores", "schedule", "pairs", "eta", "compat")
        told = [f"{name}={options[name]}" for name in names if name in options]
        return " ".join([self.kind, self.network, *told, f"epochs={self.epochs} seed={self.seed}"])


class Part(NamedTuple):
    """What a scale does in one kind of run."""

    images: int | None = None
    options: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Scale:
    """The size of every run.

    Args:
        seeds: of every search; dense networks are trained once.
        networks: what stands for each network of the paper; others are not run.
        epochs: ours for each number of epochs of the paper; others are not run. Empty: the paper's.
        dense_epochs: of dense training.
        train, search, finetune, distortion: training images and options.
    """

    name: str
    seeds: int
    networks: Mapping[str, str]
    epochs: Mapping[int, int]
    dense_epochs: int
    train: Part
    search: Part
    finetune: Part
    distortion: Part

    def run(self, spec: Spec, seed: int) -> Run | None:
        """Return the run that ``spec`` is at this scale, or None where there is none."""
        network = self.networks.get(spec.network)
        epochs = self.epochs.get(spec.epochs) if self.epochs else spec.epochs
        if network is None or epochs is None:
            return None
        data = DATA_OF.get(network) or network.rpartition("-")[2]
        if spec.kind == "dense":
            return self._dense(network, data)
        if spec.kind == "untrained":
            return Run("untrained", network, data, self.search.images, 0, seed)
        source = self.run(spec.source, seed) if spec.source else None
        if spec.source and source is None:
            return None
        part = {"finetune": self.finetune, "distortion": self.distortion}.get(spec.kind, self.search)
        ours = _OF_IMAGENET if data.startswith("imagenet") else {}
        options = {**part.options, **ours, **dict(spec.options)}
        if spec.kind == "mask":
            options = {name: value for name, value in options.items() if name not in _OF_STEPS}
            # Magnitudes of one network draw nothing.
            if options.get("criterion") == "magnitude" and source and source.kind != "search":
                seed = 0
        return Run(spec.kind, network, data, part.images, epochs, seed, _sorted(options), source)

    def _dense(self, network: str, data: str) -> Run:
        if data.startswith("imagenet"):
            return Run("library", network, data, None, 0, 0)
        options = _sorted(self.train.options)
        return Run("train", network, data, self.train.images, self.dense_epochs, 0, options)


# Options that only steps read; a run without any is the same whatever they are.
_OF_STEPS = ("evaluate_every", "weight_decay", "lr", "momentum", "schedule", "pairs", "method")
_OF_IMAGENET: Mapping[str, Any] = {"weight_decay": 1e-4, "workers": 8}


def _sorted(options: Mapping[str, Any]) -> Options:
    return tuple(sorted(options.items()))


_FAST = {"amp": True, "channels_last": True}
_SMALL = {**_FAST, "batch_size": 100, "normalization": "recalibrate", "evaluate_every": 1000}

FULL = Scale(
    name="full",
    seeds=3,
    networks={network: network for network in DATA_OF},
    epochs={},
    dense_epochs=160,
    train=Part(options=_FAST),
    search=Part(options=_FAST),
    finetune=Part(options={**_FAST, "batch_size": 256, "schedule": "cosine"}),
    distortion=Part(options={"batch_size": 256, "batches": 16, "draws": 16}),
)
REDUCED = Scale(
    name="reduced",
    seeds=3,
    networks={"resnet32-cifar10": "resnet20-cifar10", "vgg19-cifar10": "vgg19-narrow-cifar10"},
    epochs={0: 0, 10: 2, 30: 5, 150: 10},
    dense_epochs=6,
    train=Part(options={**_FAST, "batch_size": 128, "schedule": "cosine", "evaluate_every": 1000}),
    search=Part(images=8_000, options=_SMALL),
    finetune=Part(
        images=8_000, options={**_FAST, "batch_size": 100, "schedule": "cosine", "evaluate_every": 1000}
    ),
    distortion=Part(images=8_000, options={"batch_size": 50, "batches": 4, "draws": 3}),
)
SMOKE = Scale(
    name="smoke",
    seeds=1,
    networks=dict.fromkeys(DATA_OF, "digits"),
    epochs={0: 0, 5: 1, 10: 1, 30: 2, 60: 2, 100: 2, 150: 1, 160: 2, 300: 2, 1000: 2},
    dense_epochs=2,
    train=Part(options={"batch_size": 128, "schedule": "cosine"}),
    search=Part(options={"batch_size": 128, "normalization": "recalibrate"}),
    finetune=Part(options={"batch_size": 128}),
    distortion=Part(options={"batch_size": 32, "batches": 2, "draws": 2}),
)
SCALES = {scale.name: scale for scale in (FULL, REDUCED, SMOKE)}
