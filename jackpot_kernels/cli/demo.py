"""``jackpot demo``."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jackpot_kernels.cli.common import one_sentence, print_table, stderr, writing
from jackpot_kernels.environment import environment
from jackpot_kernels.files import write_whole

if TYPE_CHECKING:
    from jackpot_kernels.cli.comparison import Comparison, Run


def demo(
    output: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("jackpot-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every search.")] = 20,
    dense_epochs: Annotated[int, typer.Option(min=1, help="Epochs of dense training.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Networks to train and prune.")] = 3,
) -> None:
    """Train a small network on handwritten digits, prune it in every way, and compare."""
    with one_sentence():
        import jackpot_kernels.report  # noqa: F401  (a missing extra shows now and not after the runs)
        from jackpot_kernels.cli.comparison import SETTINGS, Comparison
        from jackpot_kernels.data import digits

        data = digits()
        settings = replace(SETTINGS, epochs=epochs)
        with writing("output", output):
            output.mkdir(parents=True, exist_ok=True)
            (output / "results.json").touch()
    begun = time.perf_counter()
    with writing("output", output), _progress() as (bar, task), _one_thread():
        comparison = Comparison(
            data,
            settings,
            dense_epochs=dense_epochs,
            seeds=seeds,
            watch=lambda text: bar.update(task, advance=1, description=text),
        )
        bar.update(task, total=comparison.total_epochs)
        runs = _run(comparison, output)
    with writing("output", output):
        _finish(comparison, runs, time.perf_counter() - begun, output)


@contextmanager
def _progress() -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=stderr()) as bar:
        yield bar, bar.add_task("starting", total=None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the network gains little from more, and loses much where cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(comparison: "Comparison", output: Path) -> "list[Run]":
    """Make all runs; keep the first dense network and the first jackpot at the lowest sparsity as files."""
    from safetensors.torch import save

    from jackpot_kernels.cli.comparison import DENSE, OURS, SPARSITIES
    from jackpot_kernels.files import save_jackpot

    runs = []
    for run, network in comparison.run():
        runs.append(run)
        if (run.method, run.seed) == (DENSE, 0):
            write_whole(output / "dense.safetensors", save(network.state_dict()))
        if (run.method, run.sparsity, run.seed) == (OURS, SPARSITIES[0], 0):
            save_jackpot(network, output / "jackpot.safetensors", source="jackpot demo")
    return runs


def _finish(comparison: "Comparison", runs: "list[Run]", seconds: float, output: Path) -> None:
    """Write results and report, and print the table."""
    settings = asdict(comparison.settings) | {
        "dense_epochs": comparison.dense_epochs,
        "seeds": comparison.seeds,
    }
    facts = environment()
    results = {
        "settings": settings,
        "processor": facts["cpu"]["processor"],
        "versions": facts["versions"],
        "seconds": seconds,
        "runs": [run._asdict() for run in runs],
    }
    write_whole(output / "results.json", json.dumps(results, indent=1).encode())
    header, rows = _table(runs)
    title = f"Test accuracy in % at the last epoch, mean ± deviation, seeds: {comparison.seeds}"
    print_table(header, rows, title=title)
    report = _report(comparison, runs, seconds, output)
    jackpot = quote(str(output / "jackpot.safetensors"))
    typer.echo(f"{len(runs)} runs in {seconds:.0f} s; no search trained a weight.")
    typer.echo(f"report: {report}")
    typer.echo(f"next:   jackpot evaluate {jackpot} --model digits --data digits")


def _table(runs: "list[Run]") -> tuple[list[str], list[list[str]]]:
    """Return the header and a row for each method, from the runs alone."""
    from jackpot_kernels.cli.comparison import METHODS, SPARSITIES, summary

    rows = []
    for method in METHODS:
        scores = (summary(runs, method, sparsity) for sparsity in SPARSITIES)
        rows.append([method, *(f"{100 * mean:.1f} ± {100 * deviation:.1f}" for mean, deviation in scores)])
    return ["sparsity", *(f"{sparsity:.0%}" for sparsity in SPARSITIES)], rows


def _report(comparison: "Comparison", runs: "list[Run]", seconds: float, output: Path) -> Path:
    """Write the page: the table, accuracy against sparsity, and the first search at the lowest sparsity."""
    from jackpot_kernels.cli.comparison import DENSE, METHODS, OURS, SPARSITIES, summary
    from jackpot_kernels.report import Table, plot_methods, search_figures, write_page

    scores = {m: {s: summary(runs, m, s) for s in SPARSITIES} for m in METHODS if m != DENSE}
    methods = plot_methods(scores, summary(runs, DENSE, 0.0), output / "methods.png")
    search = search_figures(comparison.records[OURS, SPARSITIES[0], 0], output)
    named = [figure._replace(caption=f"{OURS} at {SPARSITIES[0]:.0%}. {figure.caption}") for figure in search]
    settings = comparison.settings
    write_page(
        output / "report.html",
        title="Lottery jackpots in a small network for handwritten digits",
        lead=(
            f"Test accuracy in % at the last epoch, mean ± deviation, seeds: {comparison.seeds}. "
            f"Each network was trained for {comparison.dense_epochs} epochs; each search then ran for "
            f"{settings.epochs} and trained no weight, its normalisation statistics recalibrated before each "
            f"evaluation. {len(runs)} runs took {seconds:.0f} s."
        ),
        table=Table(*_table(runs)),
        figures=[methods, *named],
        facts=[(name, str(value)) for name, value in asdict(settings).items()],
    )
    return output / "report.html"
