"""Tables of the report: the paper's values beside ours, from finished runs alone."""

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from benchmarks.paper.experiments import EXPERIMENTS, Cell, Experiment, Row
from benchmarks.paper.paper_values import SLIPS
from benchmarks.paper.results import Result, Results
from benchmarks.paper.scales import Run, Scale

NOT_RUN = "not run"
_SLIP = " †"


class Summary(NamedTuple):
    """A measure over the seeds, as it is shown; one seed has no deviation."""

    mean: float
    deviation: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


class Findings:
    """What the finished runs say about cells, at one scale and for a number of seeds."""

    def __init__(self, results: Results, scale: Scale, seeds: int) -> None:
        self.results, self.scale, self.seeds = results, scale, seeds

    def of(self, cell: Cell | None) -> list[tuple[Result, ...]]:
        """Return the results of a cell by seed; a seed counts when all that it takes is there."""
        found = []
        for runs in [] if cell is None else cell.runs(self.scale, self.seeds):
            results = tuple(result for result in map(self.results.get, runs) if result is not None)
            if len(results) == len(runs):
                found.append(results)
        return found

    def values(self, cell: Cell | None) -> list[float]:
        """Return the measure of a cell by seed, as it is shown, less that of its counterpart."""
        if cell is None:
            return []
        told = [results for results in self.of(cell) if all(r.get(cell.measure) is not None for r in results)]
        return [
            cell.factor * (results[0][cell.measure] - sum(other[cell.measure] for other in results[1:]))
            for results in told
        ]

    def summary(self, cell: Cell | None) -> Summary | None:
        values = self.values(cell)
        return (
            Summary(mean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None
        )

    def networks(self, cells: Iterable[Cell | None]) -> str:
        """Return the networks that cells are measured on at this scale."""
        found = [runs[0].network for c in cells if c for runs in c.runs(self.scale, self.seeds)]
        return ", ".join(dict.fromkeys(found))

    def row(self, row: Row) -> list[Result]:
        """Return the results of the runs that a row is about."""
        return list(
            {results[0]["key"]: results[0] for cell in row.cells for results in self.of(cell)}.values()
        )


def table(name: str, findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of an experiment, the paper's values before ours."""
    experiment = EXPERIMENTS[name]
    quoted = [
        c for c, _ in enumerate(experiment.columns) if any(_at(row.quoted, c) for row in experiment.rows)
    ]
    header = ["network", "method", "epochs, paper", *(f"paper: {experiment.columns[c]}" for c in quoted)]
    header += ["measured on", "epochs", *experiment.columns]
    header += ["seeds", "seconds a run", "sparsity, masked / all layers"]
    lines = []
    for row in experiment.rows:
        paper = [_at(row.quoted, c) + _mark(name, experiment, row, c) for c in quoted]
        cells = [_cell(row, c, findings) for c, _ in enumerate(experiment.columns)]
        ours = [findings.networks(row.cells), epochs_of(row, findings), *cells, *_costs(row, findings)]
        lines.append([row.group, row.label, row.cost, *paper, *ours])
    return header, lines


def footnotes(name: str) -> list[str]:
    """Return what must be known about values of the paper."""
    return [f"† The paper's {column} {slip}." for (table, column), slip in SLIPS.items() if table == name]


def _at(values: Sequence[str], index: int) -> str:
    return values[index] if index < len(values) else ""


def _mark(name: str, experiment: Experiment, row: Row, column: int) -> str:
    return _SLIP if _at(row.quoted, column) and (name, experiment.columns[column]) in SLIPS else ""


def _cell(row: Row, column: int, findings: Findings) -> str:
    cell = row.cells[column] if column < len(row.cells) else None
    if cell is None:
        return "" if row.cells else NOT_RUN
    summary = findings.summary(cell)
    if summary is None:
        return NOT_RUN
    wanted = len(cell.runs(findings.scale, findings.seeds))
    told = (
        str(summary)
        if cell.minus is None
        else f"{summary.mean:+.2f}" + str(summary)[len(f"{summary.mean:.2f}") :]
    )
    if summary.seeds < wanted:
        told += f" ({summary.seeds} of {wanted} seeds)"
    return told + _best(cell, findings)


def _best(cell: Cell, findings: Findings) -> str:
    """Return the best epoch on the test set, where more than the last was looked at."""
    tried = [r for (r, *others) in findings.of(cell) if not others and r.get("times_tested", 1) > 1]
    if cell.measure != "accuracy" or not tried:
        return ""
    return f" (best on test {100 * mean(r['best_on_test'] for r in tried):.2f})"


def epochs_of(row: Row, findings: Findings) -> str:
    """Return our epochs, for fine-tuning those of the search before it too."""
    cells = [cell for cell in row.cells if cell]
    runs = [(cell, runs[0]) for cell in cells for runs in cell.runs(findings.scale, findings.seeds)]
    return "; ".join(dict.fromkeys(_own_epochs(cell, run) for cell, run in runs))


def _own_epochs(cell: Cell, run: Run) -> str:
    if cell.measure == "start_accuracy":
        return "0"
    searched = f"{run.source.epochs} + " if run.kind == "finetune" and run.source else ""
    return f"{searched}{run.epochs}"


def _costs(row: Row, findings: Findings) -> list[str]:
    """Return number of seeds, seconds of a run and the sparsities, over masked and over all layers."""
    results = findings.row(row)
    if not results:
        return ["", "", ""]
    seeds = max(len(findings.of(cell)) for cell in row.cells)
    levels = [(r["sparsity_masked"], r["sparsity_overall"]) for r in results if "sparsity_masked" in r]
    told = dict.fromkeys(f"{100 * masked:.2f} / {100 * overall:.2f}" for masked, overall in levels)
    return [str(seeds), f"{mean(r['seconds'] for r in results):.1f}", "; ".join(told)]
