"""Which runs answer which table or figure: data, in the paper's terms.

An entry of ``EXPERIMENTS`` has rows of cells. A cell holds the run it reads, or nothing where the paper alone
has a value; a scale decides which of the runs are made, and equal runs of several entries are made once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from benchmarks.paper.paper_values import OURS, TABLES
from benchmarks.paper.scales import ALL, Run, Scale, Spec

VGG, RESNET = "vgg19-cifar10", "resnet32-cifar10"
VGG_100, RESNET_100 = "vgg19-cifar100", "resnet32-cifar100"
NAMES = {
    VGG: "VGGNet-19",
    RESNET: "ResNet-32",
    VGG_100: "VGGNet-19, CIFAR-100",
    RESNET_100: "ResNet-32, CIFAR-100",
    "resnet50": "ResNet-50",
    "mobilenet-v1": "MobileNet-V1",
    "efficientnet-b4": "EfficientNet-B4",
}
EPOCHS = 30  # of the paper's ablations
SWAPS = (1, 4, 16, 64, 256, 1024)  # at once, in Fig. 6


@dataclass(frozen=True)
class Cell:
    """One figure: a measure of a run, less that of ``minus`` with the same seed where there is one.

    Args:
        measure: entry of a result.
        factor: from the measure to what is shown, which is % of a fraction.
    """

    spec: Spec
    measure: str = "accuracy"
    minus: Spec | None = None
    factor: float = 100
    scales: tuple[str, ...] = ALL

    def runs(self, scale: Scale, seeds: int) -> list[tuple[Run, ...]]:
        """Return the runs of each seed, (run,) or (run, minus)."""
        if scale.name not in self.scales:
            return []
        found = []
        for seed in range(1 if self.spec.network in _ONE_SEED else seeds):
            runs = [scale.run(spec, seed) for spec in (self.spec, self.minus) if spec is not None]
            whole = tuple(run for run in runs if run is not None)
            if len(whole) == len(runs) and whole not in found:
                found.append(whole)
        return found


class Row(NamedTuple):
    """A row: what it is called, its cost as the paper states it, the paper's values, and ours."""

    group: str
    label: str
    cost: str = ""
    quoted: tuple[str, ...] = ()
    cells: tuple[Cell | None, ...] = ()


class Experiment(NamedTuple):
    """A table or figure of the paper, or a question that it leaves open.

    Args:
        plot: how it is drawn, by the name of a function of ``figures``; empty for none.
        note: what a reader must know.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    plot: str = ""
    note: str = ""

    def runs(self, scale: Scale, seeds: int) -> list[Run]:
        """Return the runs it reads, seed by seed within a cell, each once."""
        cells = [cell for row in self.rows for cell in row.cells if cell is not None]
        return list(dict.fromkeys(run for c in cells for runs in c.runs(scale, seeds) for run in runs))


_ONE_SEED = {"resnet50", "mobilenet-v1", "efficientnet-b4"}  # as in the paper


def _dense(network: str) -> Spec:
    return Spec("dense", network)


def _search(network: str, sparsity: float, epochs: int = EPOCHS, **options: Any) -> Spec:
    chosen = tuple(sorted({"sparsity": sparsity, **options}.items()))
    return Spec("search", network, epochs, chosen, _dense(network))


def _mask(source: Spec, sparsity: float, criterion: str) -> Spec:
    return Spec("mask", source.network, 0, (("criterion", criterion), ("sparsity", sparsity)), source)


def _edge_popup(network: str, sparsity: float, epochs: int = EPOCHS) -> Spec:
    """Edge-popup: from random scores, every swap granted; the layers' budgets are the magnitudes'."""
    return _search(network, sparsity, epochs, schedule="constant", random_scores=True)


def _warm_edge_popup(network: str, sparsity: float, epochs: int = EPOCHS) -> Spec:
    return _search(network, sparsity, epochs, schedule="constant")


def _uniform(spec: Spec) -> Spec:
    """Return the same search with the same share of weights in each layer, as edge-popup was published."""
    return replace(spec, options=tuple(sorted({**dict(spec.options), "budget": "uniform"}.items())))


def _untrained(spec: Spec) -> Spec:
    """Return the same search in random weights."""
    return replace(spec, source=Spec("untrained", spec.network))


def _larger_only(cells: Iterable[Cell | None]) -> tuple[Cell | None, ...]:
    """Leave these cells out of the reduced scale."""
    return tuple(c and replace(c, scales=tuple(s for s in c.scales if s != "reduced")) for c in cells)


Ours = Mapping[tuple[str, str, str], tuple[Cell | None, ...]]


def _beside(table: str, ours: Ours) -> tuple[Row, ...]:
    """Put our cells beside the rows of a table of the paper, by group, method and cost."""
    quoted = TABLES[table].rows
    unknown = ours.keys() - {row[:3] for row in quoted}
    assert not unknown, f"{table} of the paper has no rows {sorted(unknown)}"
    return tuple(Row(*row, ours.get(row[:3], ())) for row in quoted)


def _against_training(table: str, networks: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of Tables 1 and 2, and what the starting masks alone reach."""
    ours: dict[tuple[str, str, str], tuple[Cell | None, ...]] = {}
    more = []
    for group, network in networks.items():
        ours[group, "dense", "-"] = (Cell(_dense(network)), None)
        for epochs in (10, 30):
            searches = [_search(network, sparsity, epochs) for sparsity in (0.9, 0.95)]
            ours[group, OURS, f"{epochs} (S)"] = tuple(Cell(search) for search in searches)
        starts = tuple(Cell(search, "start_accuracy") for search in searches)
        more.append(Row(group, "magnitude mask alone", "0", cells=starts))
    return _beside(table, ours) + tuple(more)


def _imagenet(spec: Spec) -> tuple[Cell, ...]:
    return (Cell(spec), Cell(spec, "top5"))


def _table3() -> tuple[Row, ...]:
    ours: dict[tuple[str, str, str], tuple[Cell | None, ...]] = {}
    for group, sparsity in (("80%", 0.8), ("90%", 0.9)):
        ours[group, "dense", "-"] = _imagenet(_dense("resnet50"))
        for epochs in (30, 60):
            ours[group, OURS, f"{epochs} (S)"] = _imagenet(_search("resnet50", sparsity, epochs))
    return _beside("table3", ours)


def _table4() -> tuple[Row, ...]:
    ours: dict[tuple[str, str, str], tuple[Cell | None, ...]] = {}
    for network in ("mobilenet-v1", "efficientnet-b4"):
        ours[NAMES[network], "dense", "-"] = _imagenet(_dense(network))
        for epochs in (30, 60):
            ours[NAMES[network], OURS, f"{epochs} (S)"] = _imagenet(_search(network, 0.8, epochs))
    return _beside("table4", ours)


# The rate of Zhou et al. themselves: the slope of the sigmoid makes gradients small. Decay would draw every
# probability to a half.
_SUPERMASK: Mapping[str, Any] = {"method": "supermask", "lr": 100.0, "weight_decay": 0.0}


def _searchers(network: str, epochs: int) -> dict[str, Spec]:
    """Return the weight searching methods of Table 5."""
    return {
        "Zhou et al.": _search(network, 0.9, epochs, **_SUPERMASK),
        "Edge-popup": _edge_popup(network, 0.9, epochs),
        "SR-popup (Ours)": _search(network, 0.9, epochs),
    }


def _table5() -> tuple[Row, ...]:
    ours: dict[tuple[str, str, str], tuple[Cell | None, ...]] = {
        ("ResNet-50", "dense", "-"): _imagenet(_dense("resnet50"))
    }
    for epochs in (30, 60):
        for method, spec in _searchers("resnet50", epochs).items():
            ours["ResNet-50", method, f"{epochs} (S)"] = _imagenet(spec)
    proxy = []
    for method, spec in _searchers(RESNET, EPOCHS).items():
        cells: tuple[Cell | None, ...] = (Cell(spec), None)
        if method == "Zhou et al.":
            cells = _larger_only(cells)
        proxy.append(Row("ResNet-32, CIFAR-10", method, f"{EPOCHS} (S)", cells=cells))
    return _beside("table5", ours) + tuple(proxy)


def _table6() -> tuple[Row, ...]:
    start = _mask(_dense(RESNET), 0.9, "magnitude")
    ours: dict[tuple[str, str, str], tuple[Cell | None, ...]] = {
        ("ResNet-32", "starting mask", "0 (S)"): (Cell(start, "stale_accuracy"), Cell(start, "overlap"))
    }
    for epochs in (10, 30, 60, 100, 300, 1000):
        search = _search(RESNET, 0.9, epochs)
        ours["ResNet-32", OURS, f"{epochs} (S)"] = (Cell(search), Cell(search, "overlap"))
    again = (Cell(start, "recalibrated_accuracy"), Cell(start, "overlap"))
    first, *others = _beside("table6", ours)
    return (first, Row("ResNet-32", "starting mask, statistics recalibrated", "0", cells=again), *others)


def _ablation(table: str, columns: Mapping[str, Mapping[str, Any]], quoted: Mapping[str, int]) -> Experiment:
    """Return an ablation of the paper: a search for each column, on ResNet-32 and on VGGNet-19.

    Args:
        columns: options of the search by column.
        quoted: which value of the paper's row stands in a column; others have none.
    """
    (row,) = TABLES[table].rows
    values = tuple(row.values[quoted[column]] if column in quoted else "" for column in columns)
    cells = {n: [Cell(_search(n, 0.9, **options)) for options in columns.values()] for n in (RESNET, VGG)}
    rows = (
        Row(row.group, row.method, row.cost, values, tuple(cells[RESNET])),
        Row(NAMES[VGG], row.method, row.cost, cells=tuple(cells[VGG])),
    )
    return Experiment(TABLES[table].title, tuple(columns), rows)


_CRITERIA = {"magnitude": "magnitude", "snip": "SNIP", "grasp": "GraSP", "random": "random"}
_SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_SMALLER = (0.9, 0.95)  # the others are run at full scale only


def _percent(sparsity: float) -> str:
    return f"{sparsity:.0%}"


def _over_sweep(make: Mapping[str, tuple[str, list[Spec]]], group: str) -> tuple[Row, ...]:
    """Return a row for each label, with a measure of a run at each sparsity of the sweep."""
    scales = [ALL if sparsity in _SMALLER else ("full",) for sparsity in _SWEEP]
    rows = []
    for label, (measure, specs) in make.items():
        cells = [Cell(spec, measure, scales=where) for spec, where in zip(specs, scales, strict=True)]
        rows.append(Row(group, label, cells=tuple(cells)))
    return tuple(rows)


def _weights(network: str) -> tuple[Row, ...]:
    """Rows of Fig. 2; magnitudes of random weights say nothing of what a layer should keep."""
    uniform = [_uniform(_edge_popup(network, s)) for s in _SWEEP]
    return _over_sweep(
        {
            "pre-trained, SR-popup": ("accuracy", [_search(network, s) for s in _SWEEP]),
            "pre-trained, edge-popup": ("accuracy", [_edge_popup(network, s) for s in _SWEEP]),
            "pre-trained, edge-popup, uniform": ("accuracy", uniform),
            "random, edge-popup, uniform": ("accuracy", [_untrained(spec) for spec in uniform]),
        },
        NAMES[network],
    )


def _criteria_rows(network: str, measures: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of Fig. 3 and 4: masks of the criteria, beside the jackpots they are compared with."""
    make = {
        name + suffix: (measure, [_mask(_edge_popup(network, s), s, criterion) for s in _SWEEP])
        for criterion, name in _CRITERIA.items()
        for measure, suffix in measures.items()
    }
    return _over_sweep(make, NAMES[network])


def _figure3(network: str) -> tuple[Row, ...]:
    jackpots = {
        "jackpot": ("accuracy", [_edge_popup(network, s) for s in _SWEEP]),
        "jackpot, SR-popup": ("accuracy", [_search(network, s) for s in _SWEEP]),
    }
    alone = {"stale_accuracy": "", "recalibrated_accuracy": ", recalibrated"}
    return _over_sweep(jackpots, NAMES[network]) + _criteria_rows(network, alone)


def _curves(variants: Mapping[str, Mapping[str, Any]], networks: Iterable[str]) -> tuple[Row, ...]:
    """Rows of searches at 90 %, whose course by epoch is drawn."""
    rows = []
    for label, options in variants.items():
        cells = tuple(Cell(_search(network, 0.9, **options)) for network in networks)
        rows.append(Row("", label, f"{EPOCHS} (S)", (), cells))
    return tuple(rows)


_ETAS = {"η = 0.99": {}, "η = 0.9": {"eta": 0.9}, "η = 0.5": {"eta": 0.5}}
_CIFAR = (VGG, RESNET, VGG_100, RESNET_100)
_RIVALS = ("SNIP", "LT", "OBD")


def _figure1() -> tuple[Row, ...]:
    quoted = [
        row for row in TABLES["table3"].rows if row.group == "90%" and row.method not in ("dense", OURS)
    ]
    rivals = tuple(Row("ResNet-50", row.method, row.cost, row.values[:1]) for row in quoted)
    values = {30: ("72.61",), 60: ("73.04",)}
    ours = tuple(
        Row("ResNet-50", OURS, f"{e} (S)", values.get(e, ()), (Cell(_search("resnet50", 0.9, e)),))
        for e in (5, 30, 60)
    )
    return rivals + ours


def _figure7() -> tuple[Row, ...]:
    """Accuracy at 95 % against epochs; the paper's figure has more points, which no text gives."""
    tables = [(TABLES["table1"], VGG, RESNET), (TABLES["table2"], VGG_100, RESNET_100)]

    def quoted(method: str, cost: str) -> tuple[str, ...]:
        return tuple(t.row(g, method, cost).values[1] for t, *_ in tables for g in ("VGGNet-19", "ResNet-32"))

    rivals = tuple(Row("", method, "160 (T)", quoted(method, "160 (T)")) for method in _RIVALS)
    ours = tuple(
        Row(
            "",
            OURS,
            f"{epochs} (S)",
            quoted(OURS, f"{epochs} (S)") if epochs in (10, 30) else (),
            tuple(Cell(_search(network, 0.95, epochs)) for network in _CIFAR),
        )
        for epochs in (10, 30, 160)
    )
    return rivals + ours


def _figure8() -> tuple[Row, ...]:
    searches = [(s, _search(RESNET, s)) for s in (0.8, 0.9, 0.95, 0.98)]
    return tuple(
        Row(
            "ResNet-32",
            _percent(sparsity),
            "30 (S) + 150 (T)",
            cells=(
                Cell(search),
                Cell(Spec("finetune", RESNET, 150, source=search)),
                Cell(search, "dense_accuracy"),
            ),
        )
        for sparsity, search in searches
    )


def _restriction() -> tuple[Row, ...]:
    """SR-popup against the same search without the restriction, seed by seed."""
    rows = []
    for network in (RESNET, VGG):
        for sparsity in (0.9, 0.95):
            for epochs in (10, 30):
                restricted = _search(network, sparsity, epochs)
                free = _warm_edge_popup(network, sparsity, epochs)
                authors = _search(network, sparsity, epochs, compat="authors")
                cells: tuple[Cell | None, ...] = (
                    Cell(restricted),
                    Cell(free),
                    Cell(restricted, minus=free),
                )
                theirs: tuple[Cell | None, ...] = (Cell(authors), Cell(restricted, minus=authors))
                if (network, sparsity, epochs) != (RESNET, 0.9, EPOCHS):
                    theirs = _larger_only(theirs)
                rows.append(Row(NAMES[network], _percent(sparsity), f"{epochs} (S)", cells=cells + theirs))
    return tuple(rows)


def _distortion() -> tuple[Row, ...]:
    """Rows of Fig. 6: of ε mean and deviation over batches and draws, in thousandths of a nat."""
    # Scores start level, so that the best swaps are those of the largest expected drop (Eq. 22).
    spec = Spec("distortion", RESNET, 0, (("eta", 1.0), ("sparsity", 0.9)), _dense(RESNET))
    rows = []
    for q in SWAPS:
        cells = [
            Cell(spec, f"{measure}_{kind}_{q}", factor=100 if measure == "agreement" else 1000)
            for kind in ("random", "best")
            for measure in ("mean", "deviation", "agreement")
        ]
        rows.append(Row("ResNet-32", f"q = {q}", cells=tuple(cells)))
    return tuple(rows)


_CRITERIA_NOTE = (
    "Overlap is that with the mask which edge-popup finds from random scores at the same sparsity, over the "
    "searched weights (Eq. 7): SR-popup's starts from magnitude's, and overlaps with it for that reason "
    "(Table 6). Its layers keep as many weights as magnitude's. Two random masks at 90% overlap by 82%."
)

# In the order of telling: what answers most comes first.
EXPERIMENTS = {
    "table1": Experiment(
        TABLES["table1"].title,
        TABLES["table1"].columns,
        _against_training("table1", {"ResNet-32": RESNET, "VGGNet-19": VGG}),
    ),
    "restriction": Experiment(
        "Does the restriction of Eq. 29 help? SR-popup against edge-popup from the same start",
        ("SR-popup", "edge-popup, warm", "SR − edge-popup", "authors' rule", "SR − authors' rule"),
        _restriction(),
        plot="differences",
        note=(
            "Differences are paired: the same dense network, order of images, augmentation and start in "
            "both. The paper's own comparison is Table 7, SR against w/o S. The authors' rule is what their "
            "published code does, in this package: every swap is granted, and a layer whose scores tie at "
            "the threshold is skipped."
        ),
    ),
    "table7": _ablation(
        "table7",
        {
            "w/o M": {"criterion": "random"},
            "w/o M, budgets of M": {"criterion": "random", "budget": "magnitude"},
            "w/o S": {"schedule": "constant"},
            "SR": {},
        },
        {"w/o M": 0, "w/o S": 1, "SR": 2},
    )._replace(
        note=(
            "w/o M starts from a random mask (Eq. 8 with random importance), so that all layers are about "
            "as sparse; with the budgets of M each keeps what magnitude gives it. w/o S grants every swap."
        )
    ),
    "table6": Experiment(
        TABLES["table6"].title,
        TABLES["table6"].columns,
        _table6(),
        plot="epochs",
        note=(
            "The starting mask is shown with the dense network's normalisation statistics, which it does not "
            "fit, and with statistics estimated anew, as every other figure of ours has them where the "
            "settings say recalibrate."
        ),
    ),
    "table8": _ablation(
        "table8",
        {"Inverse": {"pairs": "inverse"}, "Random": {"pairs": "random"}, "Ours": {}},
        {"Inverse": 0, "Random": 1, "Ours": 2},
    ),
    "table9": _ablation(
        "table9",
        {
            "Constant": {"schedule": "constant"},
            "Constant, q = 1": {"schedule": "single"},
            "Inverse": {"schedule": "inverse"},
            "Ours": {},
        },
        {"Constant": 0, "Inverse": 1, "Ours": 2},
    ),
    "fig5": Experiment(
        "Convergence from masks of existing criteria, 90%",
        tuple(NAMES[network] for network in _CIFAR),
        _curves({n: {"criterion": c} if c != "magnitude" else {} for c, n in _CRITERIA.items()}, _CIFAR),
        plot="convergence",
    ),
    "fig9": Experiment(
        "First score η of pruned weights, CIFAR-10 at 90%",
        (NAMES[RESNET], NAMES[VGG]),
        _curves(_ETAS, (RESNET, VGG)),
        plot="losses",
    ),
    "fig6": Experiment(
        "Distortion ε against the number of swaps q, in a magnitude mask at 90%",
        tuple(f"{kind}: {measure}" for kind in ("random", "best") for measure in ("ε", "± ε", "agree")),
        _distortion(),
        plot="distortion",
        note=(
            "ε is what the loss of a batch changes by when q pairs swap at once, less what Eq. 22 expects: "
            "mean and standard deviation over batches and draws, in thousandths of a nat. Agree: share of "
            "such swaps, in %, in which the loss moves as Eq. 22 expects. Best swaps are those that Eq. 22 "
            "expects most of."
        ),
    ),
    "fig2": Experiment(
        "Pre-trained against random weights",
        tuple(map(_percent, _SWEEP)),
        _weights(RESNET) + tuple(r._replace(cells=_larger_only(r.cells)) for r in _weights(VGG)),
        plot="sweep",
        note=(
            "The paper does not say how long it searched for its Fig. 2; here every search has the same "
            "epochs. Uniform: each layer has the same sparsity; elsewhere magnitude says what it keeps."
        ),
    ),
    "fig7": Experiment(
        "Cost against accuracy at 95%",
        tuple(NAMES[network] for network in _CIFAR),
        _figure7(),
        plot="cost",
    ),
    "fig8": Experiment(
        "Fine-tuning after the search, ResNet-32 on CIFAR-10",
        ("searched", "fine-tuned", "dense"),
        _figure8(),
        plot="bars",
        note="Fine-tuning trains the weights under the searched mask (Eq. 31).",
    ),
    "fig3": Experiment(
        "Masks of existing criteria without training",
        tuple(map(_percent, _SWEEP)),
        _figure3("resnet50") + _figure3(RESNET),
        plot="sweep",
        note="The paper shows ResNet-50 on ImageNet; ResNet-32 on CIFAR-10 stands beside it.",
    ),
    "fig4": Experiment(
        "Overlap of the criteria's masks with the jackpot",
        tuple(map(_percent, _SWEEP)),
        _criteria_rows("resnet50", {"overlap": ""}) + _criteria_rows(RESNET, {"overlap": ""}),
        plot="sweep",
        note=_CRITERIA_NOTE,
    ),
    "table2": Experiment(
        TABLES["table2"].title,
        TABLES["table2"].columns,
        _against_training("table2", {"ResNet-32": RESNET_100, "VGGNet-19": VGG_100}),
    ),
    "table5": Experiment(
        TABLES["table5"].title,
        TABLES["table5"].columns,
        _table5(),
        note=(
            "Zhou et al. is an adaptation to a sparsity that is asked for: masks are drawn as they do, and "
            "the most probable weights are kept. Its learning rate is theirs, not tuned for these networks. "
            "Edge-popup starts from random scores, with the layer budgets of magnitude."
        ),
    ),
    "table3": Experiment(TABLES["table3"].title, TABLES["table3"].columns, _table3()),
    "table4": Experiment(TABLES["table4"].title, TABLES["table4"].columns, _table4()),
    "fig1": Experiment(
        "Cost against accuracy, ResNet-50 on ImageNet at 90%", ("Top-1 acc.",), _figure1(), "cost"
    ),
}


def runs_of(names: Iterable[str], scale: Scale, seeds: int) -> list[Run]:
    """Return the runs of some experiments with all that they start from, dense networks first, each once."""
    wanted = [run for name in names for run in EXPERIMENTS[name].runs(scale, seeds)]
    runs = dict.fromkeys(ancestor for run in wanted for ancestor in reversed(run.lineage))
    return sorted(runs, key=lambda run: run.kind != "train")
