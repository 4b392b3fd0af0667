"""From the raw JSON of a run to a table and plots; a figure that was not measured is an error."""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from benchmarks.harness import ratio
from benchmarks.markdown import markdown
from benchmarks.shapes import TRAINED

RESULTS = Path(__file__).parent / "results"


class Figure(NamedTuple):
    """A ratio of median times; of several contenders on a side the fastest counts."""

    title: str
    bench: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    target: str = ""  # such as ">= 40"
    network: str | None = None  # the only one it is measured on


SGD = ("fused SGD", "compiled SGD")
FIGURES = (
    Figure("search step: eager reference ÷ ours", "bench_search_step", ("eager",), ("ours",), ">= 40"),
    Figure("search step: compiled reference ÷ ours", "bench_search_step", ("compile",), ("ours",), ">= 40"),
    Figure("search step: authors' operations ÷ ours", "bench_search_step", ("authors",), ("ours",)),
    Figure("search step ÷ mere SGD update", "bench_search_step_to_sgd", ("ours",), SGD, "<= 1.4"),
    Figure("score update ÷ mere SGD update", "bench_score_update", ("ours",), SGD),
    Figure("threshold: np.partition ÷ ours", "bench_threshold", ("np.partition",), ("ours",), ">= 3"),
    Figure("swap: eager reference ÷ ours", "bench_swap", ("eager",), ("ours",)),
    Figure("pack mask: eager reference ÷ ours", "bench_pack_mask", ("eager",), ("ours",)),
    Figure("pack mask: np.packbits ÷ ours", "bench_pack_mask", ("np.packbits",), ("ours",)),
    Figure("unpack mask: eager reference ÷ ours", "bench_unpack_mask", ("eager",), ("ours",)),
    Figure("unpack mask: np.unpackbits ÷ ours", "bench_unpack_mask", ("np.unpackbits",), ("ours",)),
    Figure("effective weight: eager reference ÷ ours", "bench_effective_weight", ("eager",), ("ours",)),
    Figure(
        "training step: search ÷ dense SGD",
        "bench_training_step",
        ("ours",),
        ("fused SGD", "foreach SGD"),
        "<= 1.02",
        TRAINED,
    ),
)
# Processors that other programs may keep busy during a contest before its figures are called disturbed.
DISTURBANCE = 0.1
# Title, target and the fact that bench_state tells.
BYTES = (
    ("state, bytes per weight", "<= 16.25", "state"),
    ("workspace beside it, bytes per weight", "", "workspace"),
)


class Entry(NamedTuple):
    """One benchmark on one network."""

    bench: str
    network: str
    seconds: dict[str, list[float]]  # by contender, round for round
    facts: dict[str, Any]


class Row(NamedTuple):
    """What was measured of a figure on one network: the value, and the quartiles of its rounds."""

    title: str
    target: str
    network: str
    value: float
    quartiles: tuple[float, float] | None
    disturbed: bool = False

    @property
    def margin(self) -> float:
        """How many times better than its target the value is; 1 where there is no target."""
        if not self.target:
            return 1.0
        relation, limit = self.target.split()
        return self.value / float(limit) if relation == ">=" else float(limit) / self.value

    def __str__(self) -> str:
        spread = f" ({self.quartiles[0]:.3g}–{self.quartiles[1]:.3g})" if self.quartiles else ""
        verdict = "" if self.margin >= 1 else " **not met**"
        return f"{self.value:.4g}{spread}{verdict}" + (" (disturbed)" if self.disturbed else "")


def write_report(raw: Path, results: Path = RESULTS) -> Path:
    """Write raw JSON, table and plots into a folder of ``results`` named after the processor; return it.

    Raises:
        ValueError: when a figure is missing or incomplete; nothing is written then.
    """
    run = json.loads(raw.read_text())
    entries = read_entries(run)
    networks = run["machine_info"]["networks"]
    rows = make_rows(entries, networks)
    parts = [_figures_table(rows, networks), _times_table(entries), _facts(run, entries)]
    processor = run["machine_info"]["environment"]["cpu"]["processor"]
    folder = results / re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(raw.read_text())
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")
    _plot_margins(rows, folder / "targets.png")
    _plot_times(
        [entry for entry in entries if entry.bench == "bench_search_step"], folder / "search_step.png"
    )
    return folder


def read_entries(run: Mapping[str, Any]) -> list[Entry]:
    """Return every benchmark of a run."""
    entries = []
    for benchmark in run["benchmarks"]:
        bench, network = benchmark["name"].rstrip("]").split("[", 1)
        facts = dict(benchmark["extra_info"])
        seconds = {"ours": benchmark["stats"]["data"], **facts.pop("others", {})}
        entries.append(Entry(bench, network, seconds, facts))
    return entries


def make_rows(entries: Iterable[Entry], networks: Sequence[str]) -> list[Row]:
    """Return a row for each figure and network.

    Raises:
        ValueError: when a figure was not measured on a network, or a contender has no times.
    """
    found = {(entry.bench, entry.network): entry for entry in entries}
    rows = []
    for figure in FIGURES:
        for network in [figure.network] if figure.network else networks:
            entry = _require(found, (figure.bench, network))
            over, under = fastest(entry, figure.over), fastest(entry, figure.under)
            low, _, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)])
            disturbed = (entry.facts.get("disturbance") or 0) > DISTURBANCE
            rows.append(Row(figure.title, figure.target, network, ratio(over, under), (low, high), disturbed))
    for title, target, fact in BYTES:
        for network in networks:
            value = _require(_require(found, ("bench_state", network)).facts, fact)
            rows.append(Row(title, target, network, value, None))
    return rows


def _require(mapping: Mapping[Any, Any], key: Any) -> Any:
    if key not in mapping:
        raise ValueError(f"results must hold {key}, got only {list(mapping)}")
    return mapping[key]


def fastest(entry: Entry, contenders: Sequence[str]) -> list[float]:
    """Return the times of the contender with the lowest median."""
    times = [_require(entry.seconds, contender) for contender in contenders]
    if any(len(t) < 2 for t in times):
        raise ValueError(f"{entry.bench} on {entry.network} must have two rounds at least, got {times}")
    return min(times, key=statistics.median)


def _figures_table(rows: Sequence[Row], networks: Sequence[str]) -> str:
    columns = list(dict.fromkeys([*networks, *(row.network for row in rows)]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.title, row.target), {})[row.network] = str(row)
    lines = [
        [title, target, *(cells_of.get(c, "") for c in columns)]
        for (title, target), cells_of in cells.items()
    ]
    return markdown(["figure (quartiles of the rounds)", "target", *columns], lines)


def _times_table(entries: Iterable[Entry]) -> str:
    lines = [
        [
            entry.bench.removeprefix("bench_"),
            entry.network,
            contender,
            f"{statistics.median(t) * 1e3:.3f}",
            str(len(t)),
            _busy(entry),
        ]
        for entry in entries
        if len(entry.seconds) > 1
        for contender, t in entry.seconds.items()
    ]
    return markdown(["benchmark", "network", "contender", "median, ms", "rounds", "others busy"], lines)


def _busy(entry: Entry) -> str:
    """Return how many processors other programs kept busy meanwhile."""
    disturbance = entry.facts.get("disturbance")
    return "unknown" if disturbance is None else f"{disturbance:.2f}"


def _facts(run: Mapping[str, Any], entries: Iterable[Entry]) -> str:
    """Return where the figures come from, as a list."""
    machine, commit = run["machine_info"], run["commit_info"]
    environment = machine["environment"]
    facts = {
        "processor": environment["cpu"]["processor"],
        "threads": environment["cpu"]["threads"],
        "instructions": environment["cpu"]["capability"],
        "commit": commit["id"] + (" with changes" if commit["dirty"] else ""),
        "date": run["datetime"],
        "command": f"`{machine['command']}`",
        "disturbed": f"other programs kept more than {DISTURBANCE} processors busy meanwhile",
    } | environment["versions"]
    for entry in entries:
        if entry.bench == "bench_search_step":
            for fact in ("swaps proposed", "layers scanned again"):
                facts[f"{fact}, {entry.network}"] = f"{_require(entry.facts, fact):.4g}"
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _plot_margins(rows: Sequence[Row], path: Path) -> None:
    """Plot how many times better than its target each figure is; left of the line it is not met."""
    aimed = [row for row in rows if row.target]
    titles = list(dict.fromkeys(f"{row.title} {row.target}" for row in aimed))
    plot, axes = _new_plot(1 + 0.5 * len(titles))
    for network in dict.fromkeys(row.network for row in aimed):
        points = [
            (row.margin, titles.index(f"{row.title} {row.target}")) for row in aimed if row.network == network
        ]
        axes.scatter(*zip(*points, strict=True), label=network)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="times better than the target")
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.legend()
    plot.savefig(path, dpi=150)


def _plot_times(entries: Sequence[Entry], path: Path) -> None:
    """Plot the median time of a search step, by network and contender."""
    contenders = list(entries[0].seconds)
    plot, axes = _new_plot(4)
    height = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        medians = [statistics.median(entry.seconds[contender]) * 1e3 for entry in entries]
        bars = axes.barh([y + i * height for y in range(len(entries))], medians, height, label=contender)
        axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.set(xscale="log", xlabel="search step, ms")
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(entries))], [entry.network for entry in entries])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend()
    plot.savefig(path, dpi=150)


def _new_plot(height: float) -> tuple[Plot, Axes]:
    plot = Plot(figsize=(9, height), layout="constrained")
    return plot, plot.add_subplot()
