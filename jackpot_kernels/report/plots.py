"""Plots of a search, of a training and of the demo, as PNG files."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

Records = Sequence[Mapping[str, Any]]

# Told apart by people with any colour vision (Okabe and Ito).
BLUE, ORANGE, GREEN, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#6E6E6E"
_STYLE: dict[Any, Any] = {
    "figure.figsize": (7.2, 4.0),
    "figure.dpi": 150,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


class Figure(NamedTuple):
    """A plot on disk and the sentence that goes under it."""

    path: Path
    caption: str


def search_figures(records: Records, folder: Path) -> list[Figure]:
    """Draw what a search did, from the records of its log; figures without data are left out."""
    by_kind = {kind: [r for r in records if r["kind"] == kind] for kind in ("start", "step", "epoch", "end")}
    if not by_kind["epoch"]:
        return []
    start, end = by_kind["start"][0], by_kind["end"]
    figures = [
        plot_accuracy(start, by_kind["epoch"], folder / "accuracy.png"),
        plot_loss(start, by_kind["epoch"], folder / "loss.png"),
    ]
    if by_kind["step"]:
        figures.append(plot_swaps(by_kind["step"], folder / "swaps.png"))
    figures.append(plot_overlap(by_kind["epoch"], folder / "overlap.png"))
    if end:
        figures.append(plot_layers(end[-1]["layers"], folder / "layers.png"))
    return figures


def training_figures(records: Records, folder: Path) -> list[Figure]:
    """Draw how a training went, from the records of its log; figures without data are left out."""
    epochs = [record for record in records if record["kind"] == "epoch"]
    start = next(record for record in records if record["kind"] == "start")
    if not epochs:
        return []
    return [
        plot_accuracy(start, epochs, folder / "accuracy.png"),
        plot_loss(start, epochs, folder / "loss.png"),
    ]


def plot_accuracy(start: Mapping[str, Any], epochs: Records, path: Path) -> Figure:
    """Plot training and test accuracy by epoch; epoch 0 is the start."""
    tested = _tested(start, epochs)
    with _axes(path) as axes:
        if "dense_accuracy" in start:
            axes.axhline(
                100 * start["dense_accuracy"], color=GREY, linestyle="--", label="dense network, test"
            )
        numbers = [epoch["epoch"] for epoch in epochs]
        axes.plot(numbers, _percent(epochs, "train_accuracy"), color=ORANGE, label="training")
        axes.plot(list(tested), _percent(list(tested.values()), "test_accuracy"), color=BLUE, label="test")
        axes.set(xlabel="epoch", ylabel="accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    number, last = tested.popitem()
    dense = f", the dense network {start['dense_accuracy']:.2%}" if "dense_accuracy" in start else ""
    caption = (
        f"Accuracy by epoch; epoch 0 is the start. On the test set epoch {number} reaches "
        f"{last['test_accuracy']:.2%}{dense}."
    )
    return Figure(path, caption)


def plot_loss(start: Mapping[str, Any], epochs: Records, path: Path) -> Figure:
    """Plot training and test loss by epoch."""
    tested = _tested(start, epochs)
    with _axes(path) as axes:
        numbers = [epoch["epoch"] for epoch in epochs]
        if "dense_loss" in start:
            axes.axhline(start["dense_loss"], color=GREY, linestyle="--", label="dense network, test")
        axes.plot(numbers, [e["train_loss"] for e in epochs], color=ORANGE, label="training")
        axes.plot(list(tested), [e["test_loss"] for e in tested.values()], color=BLUE, label="test")
        axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
        _label_decades(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return Figure(path, "Loss by epoch, on a logarithmic scale.")


def plot_swaps(steps: Records, path: Path) -> Figure:
    """Plot the swaps that scores proposed and that the schedule granted, by step."""
    with _axes(path) as axes:
        numbers = [step["step"] for step in steps]
        axes.plot(numbers, [s["proposed"] for s in steps], color=ORANGE, linewidth=1.2, label="proposed")
        axes.plot(numbers, [s["granted"] for s in steps], color=BLUE, linewidth=1.2, label="granted")
        axes.set(xlabel="step", ylabel="swaps in the step")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
    caption = (
        "Swaps by step, on a scale that is logarithmic above 1: pruned weights whose scores had risen above "
        "the threshold (proposed), and those of them that entered the mask (granted)."
    )
    return Figure(path, caption)


def plot_overlap(epochs: Records, path: Path) -> Figure:
    """Plot the overlap of the mask with the starting one, by epoch (Eq. 7)."""
    with _axes(path) as axes:
        numbers = [0, *(epoch["epoch"] for epoch in epochs)]
        axes.plot(numbers, [100.0, *_percent(epochs, "overlap")], color=GREEN)
        axes.set(xlabel="epoch", ylabel="overlap (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    caption = (
        f"Share of the searched weights on which the mask agrees with the starting one; "
        f"{epochs[-1]['overlap']:.2%} at the end."
    )
    return Figure(path, caption)


def plot_layers(layers: Sequence[Mapping[str, Any]], path: Path) -> Figure:
    """Plot the sparsity of each layer, in the order of the network."""
    height = max(1.6, 0.32 * len(layers) + 1.0)
    with _axes(path, figsize=(7.2, height)) as axes:
        sparsity = [100 * (1 - layer["kept"] / layer["weights"]) for layer in layers]
        bars = axes.barh([layer["name"] or "model" for layer in layers], sparsity, color=BLUE, height=0.65)
        labels = [f"{s:.1f} % of {layer['weights']:,}" for s, layer in zip(sparsity, layers, strict=True)]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.set(xlabel="weights removed (%)", xlim=(0, 130))
        axes.set_xticks(range(0, 101, 20))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return Figure(path, "Sparsity of each layer.")


def plot_methods(
    methods: Mapping[str, Mapping[float, tuple[float, float]]], dense: tuple[float, float], path: Path
) -> Figure:
    """Plot test errors against sparsity, on a logarithmic scale, a line for each method.

    Args:
        methods: for each name, mean and deviation of the accuracy by sparsity, in [0, 1].
        dense: mean and deviation of the dense network.
    """
    with _axes(path, legend_columns=2) as axes:
        axes.axhline(100 * (1 - dense[0]), color=GREY, linestyle="--", label="dense")
        looks = cycle(zip((GREY, YELLOW, ORANGE, GREEN, BLUE), "vsD^o", strict=True))
        for (name, scores), (colour, marker) in zip(methods.items(), looks, strict=False):
            errors = [100 * (1 - accuracy) for accuracy, _ in scores.values()]
            deviations = [100 * deviation for _, deviation in scores.values()]
            places = range(len(errors))
            axes.errorbar(places, errors, deviations, color=colour, marker=marker, capsize=3, label=name)
        axes.set_xticks(places, [f"{sparsity:.0%}" for sparsity in scores])
        axes.set(xlabel="sparsity of the masked layers", ylabel="test error (%)", yscale="log")
        _label_decades(axes)
    return Figure(path, "Test error at the last epoch, mean and standard deviation over the seeds.")


@contextmanager
def _axes(path: Path, *, legend_columns: int = 3, **figure: Any) -> Iterator[Axes]:
    """Give axes to draw on, and save them as a PNG with the legend above."""
    with plt.rc_context(_STYLE):
        drawing, axes = plt.subplots(layout="constrained", **figure)
        try:
            yield axes
            names = len(axes.get_legend_handles_labels()[1])
            if names:
                drawing.legend(loc="outside upper left", ncols=min(names, legend_columns))
            drawing.savefig(path)
        finally:
            plt.close(drawing)


def _label_decades(axes: Axes) -> None:
    """Label a logarithmic scale with plain numbers at 1, 2 and 5 of each decade."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _tested(start: Mapping[str, Any], epochs: Records) -> dict[int, Mapping[str, Any]]:
    """Return the records with test scores by epoch, the start as epoch 0."""
    return {0: start} | {epoch["epoch"]: epoch for epoch in epochs if "test_accuracy" in epoch}


def _percent(records: Records, key: str) -> list[float]:
    return [100 * record[key] for record in records]
