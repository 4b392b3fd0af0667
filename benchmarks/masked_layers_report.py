"""From the measurements of masked layers to tables, plots, targets and dispatch rules."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure as Plot

from benchmarks.markdown import markdown
from benchmarks.shapes import Layer
from jackpot_kernels.ops.dispatch import Problem, decide, rules_for

Row = Mapping[str, Any]
Record = Mapping[str, Any]

# The share that "auto" may be slower than the best of its backends.
SLACK = 1.05
OURS = ("dense", "mixed", "fused")


class Cell(NamedTuple):
    """One layer of a family, in one mode."""

    family: str
    layer: str
    mode: str


class Target(NamedTuple):
    """A figure that was aimed at; ``value`` is None where it has not been measured."""

    title: str
    value: float | None
    limit: float
    count: int  # of shapes behind it

    @property
    def verdict(self) -> str:
        return (
            "not yet measured" if self.value is None else "met" if self.value >= self.limit else "**not met**"
        )


def medians(record: Record) -> dict[Cell, dict[str, float]]:
    """Return the median seconds of each executor, "auto" among them where what it stands for was measured."""
    cells: dict[Cell, dict[str, float]] = {}
    for row in record["rows"]:
        cell = cells.setdefault(Cell(row["family"], row["layer"], row["mode"]), {})
        cell[row["executor"]] = row["median_s"]
    layers = shapes(record["rows"])
    for cell, times in cells.items():
        choice = auto(record["device"], layers[cell.layer])
        if choice in times and cell.mode != "score gradient":
            times["auto"] = times[choice]
    return cells


def auto(device: str, layer: Layer) -> str:
    """Return the backend that "auto" stands for on a device, by the rules as they are now."""
    operation = "masked_linear" if layer.is_linear else "masked_conv"
    rows, columns, *window = layer.weight
    problem = Problem(layer.tokens, rows, columns, tuple(window), layer.groups, torch.bfloat16)
    return decide(rules_for(device).get(operation, ()), problem)


def shapes(rows: Iterable[Row]) -> dict[str, Layer]:
    """Return the layers by name."""
    return {row["layer"]: Layer(tuple(row["shape"][0]), *row["shape"][1:]) for row in rows}


def targets(record: Record) -> list[Target]:
    """Return every figure of the issue that asked for the kernels."""
    cells, layers = medians(record), shapes(record["rows"])

    def figure(
        title: str, limit: float, mode: str, over: str, under: str, holds: Callable[[Cell, Layer], bool]
    ) -> Target:
        ratios = [
            times[over] / times[under]
            for cell, times in cells.items()
            if cell.mode == mode and over in times and under in times and holds(cell, layers[cell.layer])
        ]
        return Target(title, statistics.geometric_mean(ratios) if ratios else None, limit, len(ratios))

    # "auto" against the best of those that it chooses from, where it does worst.
    choices = [
        min(times[backend] for backend in OURS if backend in times) / times["auto"]
        for cell, times in cells.items()
        if {"dense", "fused", "auto"} <= times.keys() and cell.mode in ("forward", "both")
    ]

    def square(cell: Cell, layer: Layer) -> bool:
        return layer.weight == (4096, 4096) and layer.batch <= 2048

    def pointwise(cell: Cell, layer: Layer) -> bool:
        return cell.family == "ResNet-50" and layer.weight[2:] == (1, 1)

    memory = record.get("training memory")
    saved = memory and (memory["reference"] - memory["fused"]) / memory["effective weights and masks"]
    return [
        figure(
            "eager / auto, all shapes, forward and backward", 1.3, "both", "eager", "auto", lambda *_: True
        ),
        figure("library / auto, all shapes, forward", 0.97, "forward", "library", "auto", lambda *_: True),
        Target(
            "best of dense, mixed and fused / auto, the worst of all shapes",
            min(choices, default=None),
            1 / SLACK,
            len(choices),
        ),
        figure(
            "eager / fused, linears of at most 64 tokens, forward",
            2.5,
            "forward",
            "eager",
            "fused",
            lambda _, layer: layer.is_linear and layer.batch <= 64,
        ),
        figure(
            "library product, times w, added / fused score gradient, 4096 x 4096, at most 2048 tokens",
            1.15,
            "score gradient",
            "library",
            "fused",
            square,
        ),
        figure(
            "library / fused, 1x1 convolutions of ResNet-50, forward",
            0.85,
            "forward",
            "library",
            "fused",
            pointwise,
        ),
        Target(
            "peak memory saved in a training step of VGG-19, in effective weights and masks",
            saved or None,
            1.0,
            1 if saved else 0,
        ),
    ]


def write_report(record: Record, folder: Path) -> str:
    """Write tables and plots beside the measurements, and return the table of targets."""
    lines = [
        [t.title, f">= {t.limit:.3g}", "" if t.value is None else f"{t.value:.3g}", str(t.count), t.verdict]
        for t in targets(record)
    ]
    summary = markdown(["geometric means of ratios of medians", "target", "measured", "shapes", ""], lines)
    cells = medians(record)
    parts = [summary]
    for family in dict.fromkeys(cell.family for cell in cells):
        of_family = {cell: times for cell, times in cells.items() if cell.family == family}
        parts += [f"## {family}", _table(family, record)]
        _plot(family, of_family, folder / f"masked_layers_{_slug(family)}.png")
    parts.append(
        "\n".join(
            [
                f"- device: {record['device']}",
                f"- commit: {record['commit']}",
                *(f"- {name}: {version}" for name, version in record["versions"].items()),
                *(f"- command: `{command}`" for command in record["commands"]),
            ]
        )
    )
    (folder / "masked_layers.md").write_text("\n\n".join(parts) + "\n")
    return summary


def _table(family: str, record: Record) -> str:
    choices = {name: auto(record["device"], layer) for name, layer in shapes(record["rows"]).items()}
    lines = [
        [
            row["layer"],
            row["mode"],
            row["executor"] + (" (auto)" if row["executor"] == choices[row["layer"]] else ""),
            f"{row['median_s'] * 1e6:.1f}",
            *(f"{row[name] * scale:.4g}" if name in row else "" for name, scale in _COLUMNS.values()),
        ]
        for row in record["rows"]
        if row["family"] == family
    ]
    return markdown(["layer", "mode", "executor", "median, µs", *_COLUMNS], lines)


_COLUMNS = {
    "least bytes, MB": ("bytes", 1e-6),
    "TFLOP/s": ("tflops", 1),
    "peak memory, MB": ("peak_bytes", 1e-6),
}


def _plot(family: str, cells: Mapping[Cell, Mapping[str, float]], path: Path) -> None:
    """Plot how many times faster than eager each executor is, forward and backward together."""
    both = {cell.layer: times for cell, times in cells.items() if cell.mode == "both" and "eager" in times}
    plot = Plot(figsize=(9, 1.5 + 0.25 * max(len(both), 4)), layout="constrained")
    axes = plot.add_subplot()
    for executor in dict.fromkeys(
        name for times in both.values() for name in times if name not in ("eager", "auto")
    ):
        points = [
            (times["eager"] / times[executor], place)
            for place, times in enumerate(both.values())
            if executor in times
        ]
        axes.scatter(*zip(*points, strict=True), label=executor, s=18)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as eager, forward and backward", title=family)
    axes.set_yticks(range(len(both)), list(both), fontsize=7)
    axes.invert_yaxis()
    if both:
        axes.legend()
    plot.savefig(path, dpi=150)


class Kind(NamedTuple):
    """Layers that share a rule."""

    operation: str
    condition: str
    holds: Callable[[Layer], bool]


KINDS = (
    Kind("masked_linear", "", lambda layer: layer.is_linear),
    Kind(
        "masked_conv",
        "p.window == (1, 1) and p.groups == 1",
        lambda layer: layer.weight[2:] == (1, 1) and layer.groups == 1,
    ),
    Kind("masked_conv", "p.columns == 1 and p.groups > 1", lambda layer: layer.groups > 1),
    Kind(
        "masked_conv",
        "len(p.window) == 2 and p.window != (1, 1) and p.groups == 1",
        lambda layer: not layer.is_linear and layer.weight[2:] != (1, 1) and layer.groups == 1,
    ),
)


def rules(record: Record) -> str:
    """Return the entry of ``RULES`` in ``jackpot_kernels/ops/dispatch.py`` that the measurements support.

    A rule takes "mixed" or "fused" for a kind of layers, up to some tokens, from some weights on: the one and
    the bounds with the largest gain, if it is nowhere within them slower than dense by more than 5 %.
    """
    entries: dict[str, list[str]] = {}
    for kind in KINDS:
        found = {name: _best_bounds(record, kind.holds, name) for name in OURS[1:]}
        best = max((name for name in found if found[name]), key=lambda name: found[name].total, default=None)
        if best:
            tokens, weights, gain, count, _ = found[best]
            conditions = [
                kind.condition,
                "p.dtype.itemsize == 2",
                f"p.tokens <= {tokens}",
                f"p.rows * p.columns * math.prod(p.window) >= {weights}",
            ]
            condition = " and ".join(filter(None, conditions))
            entries.setdefault(kind.operation, []).append(
                f"            # {gain:.3g} times as fast as dense in the geometric mean of {count} shapes.\n"
                f'            Rule("{best}", lambda p: {condition}),\n'
            )
    body = "".join(
        f'        "{operation}": (\n{"".join(lines)}        ),\n' for operation, lines in entries.items()
    )
    return f'    "{record["device"]}*": {{\n{body}    }},' if body else f"# none for {record['device']}"


class Bounds(NamedTuple):
    """Within which a backend gains; ``total`` is the sum of the logarithms of its gains."""

    tokens: int  # at most
    weights: int  # at least
    gain: float  # in the geometric mean
    count: int  # of shapes
    total: float


def _best_bounds(record: Record, holds: Callable[[Layer], bool], backend: str) -> Bounds | None:
    """Return the bounds with the largest gain of a backend over "dense"; None where nothing is gained."""
    layers = shapes(record["rows"])
    gains: dict[str, list[float]] = {}
    for cell, times in medians(record).items():
        if (
            holds(layers[cell.layer])
            and cell.mode in ("forward", "both")
            and {"dense", backend} <= times.keys()
        ):
            gains.setdefault(cell.layer, []).append(times["dense"] / times[backend])
    points = [
        (layers[name].tokens, math.prod(layers[name].weight), min(values), values[-1])
        for name, values in gains.items()
    ]
    best: Bounds | None = None
    for tokens in {point[0] for point in points}:
        for weights in {point[1] for point in points}:
            inside = [p for p in points if p[0] <= tokens and p[1] >= weights]
            if not inside or min(p[2] for p in inside) < 1 / SLACK:
                continue
            total = sum(math.log(p[3]) for p in inside)
            if total > 0 and (best is None or total > best.total):
                mean = statistics.geometric_mean([p[3] for p in inside])
                best = Bounds(tokens, weights, mean, len(inside), total)
    return best


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
