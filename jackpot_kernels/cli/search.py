"""``jackpot search``."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jackpot_kernels.cli.common import (
    DATA,
    MODELS,
    build_data,
    build_model,
    choose_device,
    fail,
    one_sentence,
    print_table,
    stderr,
)

if TYPE_CHECKING:
    from jackpot_kernels.search.folder import SearchFolder
    from jackpot_kernels.search.loop import Record, Search
    from jackpot_kernels.search.settings import SearchSettings

Names = dict[str, str]


def search(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Known name or module:callable: a network.")] = None,
    data: Annotated[str | None, typer.Option(help="Known name or module:callable: (train, test).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of its weights.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("jackpot-search"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --output.")] = False,
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to remove, in [0, 1).")] = 0.9,
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate of the scores; falls along a cosine.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Momentum of the scores.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the scores.")] = 5e-4,
    criterion: Annotated[str, typer.Option(help="magnitude, snip, grasp or random.")] = "magnitude",
    budget: Annotated[str, typer.Option(help="global, uniform or erk.")] = "global",
    scope: Annotated[str, typer.Option(help="Weights compete by layer, or global.")] = "layer",
    schedule: Annotated[str, typer.Option(help="quartic, inverse, constant or single.")] = "quartic",
    pairs: Annotated[str, typer.Option(help="best, inverse or random.")] = "best",
    eta: Annotated[float, typer.Option(help="First score of pruned weights.")] = 0.99,
    keep_last_dense: Annotated[bool, typer.Option(help="Keep all weights of the last layer.")] = True,
    normalization: Annotated[str, typer.Option(help="stats, frozen or recalibrate.")] = "stats",
    random_scores: Annotated[bool, typer.Option(help="Start from random scores, as edge-popup.")] = False,
    amp: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the data and all that is drawn.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps from one line of the log to the next.")] = 10,
    workers: Annotated[int, typer.Option(help="Processes that load data which is not in tensors.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Search a mask in a pre-trained network; Ctrl-C saves, --resume goes on, bit for bit."""
    from jackpot_kernels.search.folder import SearchFolder, SearchStopped, run

    folder = SearchFolder(output)
    with one_sentence():
        state = folder.load() if resume else None
        settings, names = _resumed(context, state) if state else _new(context)
        found = _build(settings, names, weights, device)
        if state:
            found.load_state_dict(state)
            folder.rewind(state)
        else:
            folder.create()
            folder.write(found.begin())
            folder.save({**found.state_dict(), "names": names})
    try:
        with _progress(found) as watch, _stop_question() as should_stop:
            run(found, folder, extra={"names": names}, watch=watch, should_stop=should_stop)
    except SearchStopped as stopped:
        typer.echo(f"{stopped}; go on with: jackpot search --output {output} --resume", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        fail(f"search stopped by: {error}; go on from its last checkpoint with --output {output} --resume")
    _finish(found, folder, names)


def _new(context: typer.Context) -> "tuple[SearchSettings, Names]":
    """Return settings and names as the command line gives them."""
    from jackpot_kernels.search.settings import SearchSettings

    for option, known in (("model", MODELS), ("data", DATA)):
        if context.params[option] is None:
            fail(f"--{option} must be {', '.join(known)} or module:callable, got none")
    settings = SearchSettings(**{field.name: context.params[field.name] for field in fields(SearchSettings)})
    return settings, {"model": context.params["model"], "data": context.params["data"]}


def _resumed(context: typer.Context, state: dict[str, Any]) -> "tuple[SearchSettings, Names]":
    """Return settings and names as the checkpoint has them, and refuse others on the command line."""
    from jackpot_kernels.search.settings import SearchSettings

    recorded = {**state["settings"], **state["names"]}
    for option, value in recorded.items():
        source = context.get_parameter_source(option)
        given = context.params[option]
        if source is not None and source.name == "COMMANDLINE" and given != value:
            fail(f"{option} must be {value} as in the search to resume, got {given}")
    return SearchSettings(**state["settings"]), state["names"]


def _build(settings: "SearchSettings", names: Names, weights: Path | None, device: str) -> "Search":
    from jackpot_kernels.search.loop import Search

    place = choose_device(device, search=True)
    train, test = build_data(names["data"])
    return Search(build_model(names["model"], weights), train, test, settings, place)


@contextmanager
def _progress(search: "Search") -> Iterator[Callable[["Record"], None]]:
    """Show a progress bar and yield what it watches records with."""
    epochs, steps = search.settings.epochs, search.steps_per_epoch
    figures: dict[str, str] = {}

    def text(step: int) -> str:
        epoch = min(step // steps + 1, epochs)
        return "  ".join([f"epoch {epoch}/{epochs}", *figures.values()])

    columns = (BarColumn(bar_width=12), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=stderr()) as bar:
        task = bar.add_task(text(search.step), total=search.total_steps, completed=search.step)

        def watch(record: "Record") -> None:
            if record["kind"] == "step":
                figures["loss"] = f"loss {record['loss']:.3f}"
                figures["swaps"] = f"swaps {record['granted']} of {record['proposed']}"
            elif record["kind"] == "epoch":
                figures["accuracy"] = f"accuracy {record['test_accuracy']:.2%}"
            bar.update(task, completed=record["step"], description=text(record["step"]))

        yield watch


@contextmanager
def _stop_question() -> Iterator[Callable[[], bool]]:
    """Yield a question that Ctrl-C or SIGTERM makes true; asked a second time, either ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(search: "Search", folder: "SearchFolder", names: Names) -> None:
    """Save the jackpot, write the report and print where they are."""
    from jackpot_kernels.files import save_jackpot

    jackpot = folder.path / "jackpot.safetensors"
    with one_sentence():
        save_jackpot(search.model, jackpot, source=names["model"])
        from jackpot_kernels.report import write_search_report

        records = folder.records()
        facts = {**names, "device": str(search.device)}
        report = write_search_report(records, folder.path, facts=facts)
    start, last, end = records[0], records[-2], records[-1]
    rows = [
        ("accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
        ("accuracy, dense network", f"{start['dense_accuracy']:.2%}"),
        ("sparsity, masked layers", f"{end['sparsity_masked']:.2%}"),
        ("sparsity, all weights", f"{end['sparsity_overall']:.2%}"),
        ("jackpot", str(jackpot)),
        ("report", str(report)),
    ]
    print_table(["", ""], rows)
