"""Plots of the report, drawn as the paper draws them, from finished runs alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import MaxNLocator

from benchmarks.paper.experiments import EXPERIMENTS, SWAPS, Cell, Experiment, Row
from benchmarks.paper.tables import Findings, Summary, epochs_of
from jackpot_kernels.report.plots import BLUE, GREEN, GREY, ORANGE, YELLOW, Figure

_LOOKS = tuple(
    zip((BLUE, ORANGE, GREEN, YELLOW, GREY, "#CC79A7", "#56B4E9", "black"), "osD^vPX*", strict=True)
)


def draw(name: str, findings: Findings, folder: Path) -> Figure | None:
    """Draw an experiment into ``folder``, or return None where it has no plot or nothing has been run."""
    experiment = EXPERIMENTS[name]
    if not experiment.plot or not any(findings.row(row) for row in experiment.rows):
        return None
    plot, caption = _PLOTS[experiment.plot](experiment, findings)
    path = folder / f"{name}.png"
    plot.savefig(path, dpi=120)
    return Figure(path, caption)


Drawn = tuple[Plot, str]
Point = tuple[float, Summary]


def _panels(titles: Sequence[str]) -> tuple[Plot, list[Axes]]:
    plot = Plot(figsize=(max(6.4, 4.4 * len(titles)), 4.4), layout="constrained")
    panels = [plot.add_subplot(1, len(titles), i + 1) for i in range(len(titles))]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.grid(color="#E4E4E4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return plot, panels


def _line(axes: Axes, points: Iterable[Point], label: str, look: tuple[str, str], **options: Any) -> None:
    """Draw means, with deviations where there are some."""
    told = list(points)
    if told:
        xs, ys = [x for x, _ in told], [s.mean for _, s in told]
        some = any(s.deviation is not None for _, s in told)
        deviations = [s.deviation or 0.0 for _, s in told] if some else None
        colour, marker = look
        axes.errorbar(xs, ys, deviations, color=colour, marker=marker, capsize=3, label=label, **options)


def _legend(plot: Plot, panels: Iterable[Axes]) -> None:
    """Put one legend under all panels."""
    named = {name: h for axes in panels for h, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    plot.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _found(row: Row, findings: Findings) -> list[tuple[int, Summary]]:
    """Return the summaries of a row with the columns in which there are some."""
    summaries = ((column, findings.summary(cell)) for column, cell in enumerate(row.cells))
    return [(column, summary) for column, summary in summaries if summary is not None]


def _groups(experiment: Experiment, findings: Findings) -> dict[str, list[Row]]:
    """Return the rows that have results, by group."""
    groups: dict[str, list[Row]] = {}
    for row in experiment.rows:
        if findings.row(row):
            groups.setdefault(row.group, []).append(row)
    return groups


def _plot_sweep(experiment: Experiment, findings: Findings) -> Drawn:
    groups = _groups(experiment, findings)
    shown = sorted(
        {column for rows in groups.values() for row in rows for column, _ in _found(row, findings)}
    )
    titles = [_title(group, rows[0].cells, findings) for group, rows in groups.items()]
    plot, panels = _panels(titles)
    for axes, rows in zip(panels, groups.values(), strict=True):
        looks = dict(zip(dict.fromkeys(_base(row) for row in rows), _LOOKS, strict=False))
        for row in rows:
            points = [(shown.index(column), summary) for column, summary in _found(row, findings)]
            style = "-" if _base(row) == row.label else "--"
            _line(axes, points, row.label, looks[_base(row)], linestyle=style)
        axes.set_xticks(range(len(shown)), [experiment.columns[column] for column in shown])
        axes.set(xlabel="sparsity of the masked layers", ylabel="%")
        axes.margins(x=0.2)
    _legend(plot, panels)
    return plot, f"{experiment.title}, by sparsity; mean and deviation over the seeds."


def _base(row: Row) -> str:
    """Return what a row is called whatever its statistics."""
    return row.label.removesuffix(", recalibrated")


def _title(name: str, cells: Iterable[Cell | None], findings: Findings) -> str:
    """Return the paper's name of a network, or at other scales that of ours."""
    return name if findings.scale.name == "full" else findings.networks(cells) or name


def _plot_courses(experiment: Experiment, findings: Findings, measures: Mapping[str, str]) -> Drawn:
    """Draw a measure of every epoch; of several the first that all epochs have."""
    columns = [
        c for c, _ in enumerate(experiment.columns) if any(findings.of(r.cells[c]) for r in experiment.rows)
    ]
    plot, panels = _panels(_column_titles(experiment, columns, findings))
    for axes, column in zip(panels, columns, strict=True):
        courses = {
            row.label: [r["epochs"] for (r,) in findings.of(row.cells[column])] for row in experiment.rows
        }
        epochs = [epoch for runs in courses.values() for run in runs for epoch in run]
        measure = next(m for m in measures if all(epoch.get(m) is not None for epoch in epochs))
        for (label, runs), look in zip(courses.items(), cycle(_LOOKS), strict=False):
            _line(axes, _by_epoch(runs, measure), label, look, markersize=4)
        axes.set(xlabel="epoch", ylabel=measures[measure])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(plot, panels)
    return plot, f"{experiment.title}; mean and deviation over the seeds."


def _column_titles(experiment: Experiment, columns: Iterable[int], findings: Findings) -> list[str]:
    cells = {column: [row.cells[column] for row in experiment.rows if row.cells] for column in columns}
    return [_title(experiment.columns[column], cells[column], findings) for column in cells]


def _by_epoch(runs: Sequence[Sequence[Mapping[str, Any]]], measure: str) -> list[Point]:
    factor = 100 if measure.endswith("accuracy") else 1
    points = []
    for epochs in zip(*runs, strict=True):
        values = [factor * epoch[measure] for epoch in epochs]
        spread = stdev(values) if len(values) > 1 else None
        points.append((epochs[0]["epoch"], Summary(mean(values), spread, len(values))))
    return points


def _plot_convergence(experiment: Experiment, findings: Findings) -> Drawn:
    measures = {"test_accuracy": "test accuracy (%)", "train_accuracy": "training accuracy (%)"}
    return _plot_courses(experiment, findings, measures)


def _plot_losses(experiment: Experiment, findings: Findings) -> Drawn:
    return _plot_courses(experiment, findings, {"train_loss": "training loss (nats)"})


def _plot_cost(experiment: Experiment, findings: Findings) -> Drawn:
    """Draw accuracy against epochs: the paper's values hollow, ours filled."""
    plot, panels = _panels(_column_titles(experiment, range(len(experiment.columns)), findings))
    labels = list(dict.fromkeys(row.label for row in experiment.rows))
    looks = dict(zip(labels, cycle(_LOOKS), strict=False))
    for column, axes in enumerate(panels):
        for label in labels:
            colour, marker = looks[label]
            rows = [row for row in experiment.rows if row.label == label]
            quoted = [
                (int(row.cost.split()[0]), float(row.quoted[column].split("±")[0]))
                for row in rows
                if column < len(row.quoted) and row.quoted[column]
            ]
            if quoted:
                xs, ys = zip(*quoted, strict=True)
                style, name = ":" if len(quoted) > 1 else "none", f"{label}, paper"
                axes.plot(xs, ys, color=colour, marker=marker, mfc="none", linestyle=style, label=name)
            _line(axes, _costed(rows, column, findings), f"{label}, measured", looks[label])
        axes.set(xlabel="epochs of training or searching", ylabel="accuracy (%)", xscale="log")
    _legend(plot, panels)
    return plot, f"{experiment.title}. Hollow: what the paper states, of its networks; filled: ours."


def _costed(rows: Iterable[Row], column: int, findings: Findings) -> list[Point]:
    """Return our accuracies in a column, by our epochs."""
    points = []
    for row in rows:
        cell = row.cells[column] if column < len(row.cells) else None
        summary = findings.summary(cell)
        if cell is not None and summary is not None:
            points.append((float(cell.runs(findings.scale, findings.seeds)[0][0].epochs), summary))
    return sorted(points)


def _plot_epochs(experiment: Experiment, findings: Findings) -> Drawn:
    """Draw accuracy and overlap against the epochs of the search."""
    plot, panels = _panels(experiment.columns)
    searches = [row for row in experiment.rows if not row.label.startswith("starting mask")]
    start = experiment.rows[1]
    for column, axes in enumerate(panels):
        begun = findings.summary(start.cells[column])
        points = ({0.0: begun} if begun else {}) | dict(_costed(searches, column, findings))
        _line(axes, enumerate(points.values()), "SR-popup", _LOOKS[0])
        axes.set_xticks(range(len(points)), [f"{epochs:.0f}" for epochs in points])
        axes.set(xlabel="epochs", ylabel="%")
    caption = "0 epochs: the starting mask, statistics recalibrated; mean and deviation over the seeds."
    return plot, f"{experiment.title}. {caption}"


def _plot_bars(experiment: Experiment, findings: Findings) -> Drawn:
    rows = [row for row in experiment.rows if findings.row(row)]
    plot, (axes,) = _panels([""])
    width = 0.8 / len(experiment.columns)
    for column, (name, (colour, _)) in enumerate(zip(experiment.columns, _LOOKS, strict=False)):
        told = [(i, s) for i, row in enumerate(rows) if (s := findings.summary(row.cells[column]))]
        places = [i + width * (column - (len(experiment.columns) - 1) / 2) for i, _ in told]
        deviations = [s.deviation or 0.0 for _, s in told]
        axes.bar(
            places, [s.mean for _, s in told], width, yerr=deviations, color=colour, label=name, capsize=3
        )
    axes.set_xticks(range(len(rows)), [row.label for row in rows])
    means = [s.mean for row in rows for _, s in _found(row, findings)]
    axes.set(
        xlabel="sparsity of the masked layers", ylabel="accuracy (%)", ylim=(max(0, min(means) - 5), None)
    )
    _legend(plot, [axes])
    return plot, f"{experiment.title}; mean and deviation over the seeds."


def _plot_differences(experiment: Experiment, findings: Findings) -> Drawn:
    """Draw paired differences, a dot for each seed."""
    rows = [row for row in experiment.rows if findings.row(row)]
    columns = [c for c, cell in enumerate(rows[0].cells) if cell and cell.minus]
    plot, panels = _panels([experiment.columns[c] for c in columns])
    plot.set_figheight(1.6 + 0.45 * len(rows))
    names = [
        f"{_title(row.group, row.cells, findings)}, {row.label}, {epochs_of(row, findings)} epochs"
        for row in rows
    ]
    for axes, column in zip(panels, columns, strict=True):
        axes.axvline(0, color="black", linewidth=1)
        for y, row in enumerate(rows):
            values = findings.values(row.cells[column])
            axes.plot(values, [y] * len(values), "o", color=GREY, mfc="none")
            summary = findings.summary(row.cells[column])
            if summary:
                axes.errorbar(
                    summary.mean, y, xerr=summary.deviation or 0.0, color=BLUE, marker="D", capsize=4
                )
        axes.set_yticks(range(len(rows)), names if axes is panels[0] else [""] * len(rows))
        axes.invert_yaxis()
        axes.set(xlabel="difference in accuracy (points)")
    return plot, "Paired differences: circles are seeds, diamonds their mean with the standard deviation."


def _plot_distortion(experiment: Experiment, findings: Findings) -> Drawn:
    """Draw the distribution of ε by the number of swaps, and how often Eq. 22 is right."""
    cell = experiment.rows[0].cells[0]
    records = [record for (result,) in findings.of(cell) for record in result["distortion"]]
    plot, panels = _panels(["random swaps", "best swaps", "loss moves as Eq. 22 expects"])
    for axes, kind in zip(panels, ("random", "best"), strict=False):
        by_q = {q: [r["epsilon"] for r in records if (r["kind"], r["q"]) == (kind, q)] for q in SWAPS}
        axes.boxplot(list(by_q.values()), tick_labels=[str(q) for q in by_q], showfliers=False)
        axes.set(xlabel="q", ylabel="ε (nats)")
    for column, kind, look in zip((2, 5), ("random", "best"), _LOOKS, strict=False):
        told = [
            (float(q), findings.summary(row.cells[column]))
            for q, row in zip(SWAPS, experiment.rows, strict=True)
        ]
        _line(panels[2], [(q, summary) for q, summary in told if summary], kind, look)
    panels[2].set(xlabel="q", ylabel="% of swaps", xscale="log")
    _legend(plot, panels)
    caption = "Boxes: quartiles over batches, draws and seeds; whiskers: to 1.5 times their distance."
    return plot, f"{experiment.title}. {caption}"


_PLOTS: Mapping[str, Callable[[Experiment, Findings], Drawn]] = {
    "sweep": _plot_sweep,
    "convergence": _plot_convergence,
    "losses": _plot_losses,
    "cost": _plot_cost,
    "epochs": _plot_epochs,
    "bars": _plot_bars,
    "differences": _plot_differences,
    "distortion": _plot_distortion,
}
